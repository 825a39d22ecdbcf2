"""What a registry holds, kept up to date at the cost of what has changed.

A look reads the log of changes (`changes`), and then the names that it names. A registry whose names fit on one page is also
compared name by name at each look. In a larger one this goes on in the background, page by page (`survey`), for what is not in
the log: the champion of a name that was moved by hand, names that were deleted in MLflow, and everything at the first start.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from ptuning.errors import TrackingError
from ptuning.registry.changes import What
from ptuning.registry.registry import CHAMPION, FORMAT, PAGE, Registry, Version
from ptuning.settings.fields import NAME
from ptuning.tracking.client import asking

Entry = TypeVar("Entry")

NAMES = 100
"""Names of one page."""
FIRST, LATER = 0.25, 0.05
"""Parts of the time that the background may take: until every name was read once, and afterwards."""
RECENT = 20
"""Names of a look at what was changed last."""
LOOK_S = 1.0
"""Seconds after which a look leaves what is left to read to the next one."""


@dataclass(frozen=True)
class Listed(Generic[Entry]):
    """A name and its versions."""

    updated_ms: int
    """When a version was added or deleted."""
    champion: int | None
    versions: Mapping[int, Entry] = field(repr=False)
    read: bool = True
    """False: remembered from an earlier process, and not compared with the registry since."""

    @property
    def current(self) -> int | None:
        """The version that answers under the name: the champion, or the newest."""
        if self.champion in self.versions:
            return self.champion
        return max(self.versions, default=None)


class Listing(Generic[Entry]):
    """The names of one registry. `read` may be called from any thread, the rest from one at a time.

    Any method that asks may raise TrackingError: MLflow does not respond. What was not read is read by the next look.
    """

    def __init__(self, registry: Registry, shape: Callable[[Version], Entry], only: Iterable[str] = ()) -> None:
        """`shape`: what is kept of a version. `only`: the names to list; none: all."""
        self._registry = registry
        self._shape = shape
        self._only = frozenset(only)
        self._lock = threading.Lock()
        self.names: dict[str, Listed[Entry]] = {}
        self.whole = False
        """True: every name has been read."""
        self._last: int | None = None
        self._pending: dict[str, What] = {}
        self._token: str | None = None
        self._seen: set[str] = set()
        self._small = True
        self._credit, self._paid = 0.0, time.monotonic()
        self._recent = 0.0

    def restore(self, names: Mapping[str, Listed[Entry]]) -> None:
        """Names that an earlier process has read, unless they are known."""
        with self._lock:
            self.names = {**names, **self.names}

    def look(self) -> set[str]:
        """The names that have changed since the last look."""
        if not self._registry.is_there:
            changed = set(self.names)
            self.names.clear()
            return changed
        last = self._registry.changes.last()
        if self._last is not None and last > self._last:
            for change in self._registry.changes.after(self._last):
                if self._is_wanted(change.name):
                    whole = "changed" in (change.what, self._pending.get(change.name))
                    self._pending[change.name] = "changed" if whole else "created"
                self._last = change.number
        elif self._last is None or last < self._last:  # the first look, or an older copy of the database
            self._last, self._token, self.whole = last, None, False
        changed, until = set(), time.monotonic() + LOOK_S
        for name, what in list(self._pending.items()):
            if self.read(name, what):
                changed.add(name)
            del self._pending[name]
            if time.monotonic() > until:
                break
        if self._small:
            changed |= self._page()
        return changed

    def survey(self) -> set[str]:
        """Compare some more names, as far as the time allows; returns those that have changed."""
        changed: set[str] = set()
        now = time.monotonic()
        self._credit = min(1.0, self._credit + (now - self._paid) * (LATER if self.whole else FIRST))
        self._paid = now
        while not self._small and self._credit > 0 and self._registry.is_there:
            began = time.monotonic()
            if self.whole and began > self._recent:
                changed |= self._compare(self._models(RECENT, ["last_updated_timestamp DESC"])[0])
                self._recent = began + 30
            else:
                changed |= self._page()
            self._credit -= time.monotonic() - began
        return changed

    def read(self, name: str, what: What = "changed") -> bool:
        """Read one name now; True if it has changed. `created`: read only what came after the known versions."""
        if not self._is_wanted(name):
            return False
        known = self.names.get(name)
        try:
            with asking(self._registry.uri):
                model = self._registry.client.get_registered_model(name)
        except TrackingError as error:
            if error.code != "RESOURCE_DOES_NOT_EXIST":
                raise
            with self._lock:
                return self.names.pop(name, None) is not None
        above = max(known.versions, default=0) if known and known.read and what == "created" else 0
        condition = f"name = '{name}'" + (f" and version_number > {above}" if above else "")
        found = {version.version: self._shape(version) for version in self._versions(condition)}
        return self._keep(model, {**known.versions, **found} if known and above else found)

    def _is_wanted(self, name: str) -> bool:
        return (not self._only or name in self._only) and NAME.fullmatch(name) is not None

    def _keep(self, model: Any, versions: Mapping[int, Entry]) -> bool:
        champion = model.aliases.get(CHAMPION)
        now = Listed(int(model.last_updated_timestamp or 0), int(champion) if champion else None, versions)
        with self._lock:
            before = self.names.get(model.name)
            if versions:
                self.names[model.name] = now
            else:
                self.names.pop(model.name, None)
            return (before.champion, before.versions) != (now.champion, now.versions) if before else bool(versions)

    def _page(self) -> set[str]:
        """Compare one page of names; after the last one, those that were on none are gone."""
        first = self._token is None
        if first:
            self._seen = set()
        models, self._token = self._models(NAMES, ["name ASC"], self._token)
        changed = self._compare(models)
        self._seen.update(model.name for model in models)
        if self._token is None:
            self._small = first
            for name in set(self.names) - self._seen:
                if self.read(name):  # a page may have missed it, when others were deleted meanwhile
                    changed.add(name)
            self.whole = True
        else:
            self._small = False
        return changed

    def _compare(self, models: Iterable[Any]) -> set[str]:
        """Read again what differs from what is known."""
        changed, stale = set(), {}
        for model in models:
            if not self._is_wanted(model.name):
                continue
            known = self.names.get(model.name)
            if known is None or known.updated_ms != int(model.last_updated_timestamp or 0):
                stale[model.name] = model
            elif self._keep(model, known.versions):
                changed.add(model.name)
        if stale:
            found: dict[str, dict[int, Entry]] = {name: {} for name in stale}
            quoted = ", ".join(f"'{name}'" for name in stale)
            for version in self._versions(f"name IN ({quoted})" if len(stale) > 1 else f"name = {quoted}"):
                found[version.name][version.version] = self._shape(version)
            changed |= {name for name, model in stale.items() if self._keep(model, found[name])}
        return changed

    def _models(self, most: int, order: list[str], token: str | None = None) -> tuple[list[Any], str | None]:
        with asking(self._registry.uri):
            page = self._registry.client.search_registered_models(None, most, order, token)
        return list(page), page.token or None

    def _versions(self, condition: str) -> Iterator[Version]:
        for entry in self._registry.pages("search_model_versions", condition, PAGE):
            if entry.tags.get(FORMAT) == "1":
                yield Version.of(entry)
