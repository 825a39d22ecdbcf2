"""The versions of a replica that were brought: checked, with card and encoder in memory, and those that failed a check."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from ptuning.errors import TrackingError, UserError
from ptuning.inference.types import EngineBusy, EngineStopped
from ptuning.redaction import logger
from ptuning.serving.loading import Entry, Loader, Served
from ptuning.serving.residency import Residency

log = logger(__name__)

CARDS = 4096
"""Versions whose cards and encoders stay in memory; the least used leave first, their vectors with them."""
AGAIN = 60.0
"""Seconds until a refused version is checked again: its run may have been repaired."""
LISTED = 160
"""Maximum characters of the list of names in the error for an unknown model."""


class UnknownModel(UserError):
    """No such name, or what it names is refused."""


def unknown(names: Sequence[str], many: int, hint: str) -> UnknownModel:
    """The error for an id that nothing answers to. `names`: some of the `many` that there are."""
    listed = [name for place, name in enumerate(names, 1) if len(", ".join(names[:place])) <= LISTED]
    more = f", ... ({many} in all)" if many > len(listed) else ""
    return UnknownModel(
        f"there is no such model; the names are {', '.join(listed)}{more}, and versions are written name:3; {hint}"
    )


class Brought:
    """The brought versions of one replica. Thread-safe."""

    def __init__(self, loader: Loader, residency: Residency, lock: threading.RLock, is_served: Callable[[Entry], bool]) -> None:
        """`lock`: held while anything here is changed. `is_served`: False for a version that went while it was brought."""
        self._loader = loader
        self._residency = residency
        self._lock = lock
        self._is_served = is_served
        self._entries: dict[Entry, Served] = {}  # the least recently used first
        self._loading: dict[Entry, threading.Lock] = {}
        self._retry: dict[Entry, float] = {}
        self.refused: dict[str, str] = {}
        """Versions that failed a check, with the reason for clients; the log has the full reason."""
        self.revision = 0
        """Counts changes of what is refused."""

    def __contains__(self, entry: object) -> bool:
        return entry in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, entry: Entry) -> Served | None:
        """An entry, without counting as a use."""
        return self._entries.get(entry)

    def use(self, entry: Entry) -> Served | None:
        """An entry that is there; None: it must be brought."""
        with self._lock:
            served = self._entries.pop(entry, None)
            if served is not None:
                self._entries[entry] = served
            return served

    def bring(self, entry: Entry) -> Served:
        """An entry that may have to be brought. Of several that want it one brings it.

        Raises:
            UnknownModel: it is refused.
            TrackingError, EngineBusy, EngineStopped: it cannot be brought now.
        """
        if served := self.use(entry):
            return served
        with self._loading.setdefault(entry, threading.Lock()):
            try:
                if served := self.use(entry):
                    return served
                if (reason := self.refused.get(str(entry))) and time.monotonic() < self._retry.get(entry, 0):
                    raise UnknownModel(reason)
                return self._keep(entry, self._loader.load(entry))
            except (TrackingError, EngineBusy, EngineStopped, UnknownModel):
                raise
            except Exception as error:  # any error must not affect the other versions
                if not isinstance(error, UserError):
                    log.exception("%s could not be loaded", entry)
                raise self._refuse(entry, error) from None
            finally:
                self._loading.pop(entry, None)

    def due(self) -> list[Entry]:
        """Refused versions that are to be checked again."""
        now = time.monotonic()
        return [entry for entry, then in list(self._retry.items()) if then < now]

    def forget(self, entry: Entry) -> None:
        """It is no longer served."""
        with self._lock:
            self._leave(entry)
            self._retry.pop(entry, None)
            self.refused.pop(str(entry), None)

    def _keep(self, entry: Entry, served: Served) -> Served:
        with self._lock:
            if (known := self._entries.get(entry)) and served.prompt:  # two have brought it
                self._residency.leave(served.prompt)
                return known
            self._entries[entry] = served
            self._retry.pop(entry, None)
            self.revision += self.refused.pop(str(entry), None) is not None
            if not self._is_served(entry):
                self._leave(entry)  # this request is answered all the same
            while len(self._entries) > CARDS:
                self._leave(next(iter(self._entries)))
            return served

    def _refuse(self, entry: Entry, error: Exception) -> UnknownModel:
        reason = self._loader.reason(entry, error)
        with self._lock:
            self._retry[entry] = time.monotonic() + AGAIN
            self.revision += self.refused.get(str(entry)) != reason
            self.refused[str(entry)] = reason
        log.error("%s is refused, its name keeps what it had: %s", entry, error)
        return UnknownModel(reason)

    def _leave(self, entry: Entry) -> None:
        served = self._entries.pop(entry, None)
        if served is not None and served.prompt is not None:
            self._residency.leave(served.prompt)


class Names(Mapping[str, Served]):
    """What is served, by id."""

    def __init__(self, ids: Callable[[], Iterator[str]], find: Callable[[str], Served]) -> None:
        self._ids = ids
        self._find = find

    def __getitem__(self, model: str) -> Served:
        try:
            return self._find(model)
        except UnknownModel:
            raise KeyError(model) from None

    def __contains__(self, model: object) -> bool:
        return any(model == each for each in self)

    def __iter__(self) -> Iterator[str]:
        return self._ids()

    def __len__(self) -> int:
        return sum(1 for _ in self)
