"""The served versions by name: known by their tags, checked and brought when they are asked, and cached on disk.

A replica polls the registry instead of being notified through Serve's `user_config`: a promotion only changes MLflow, from any
machine, by people who need not know which clusters serve. So there is no second step that could be forgotten. The price is that
replicas may differ for `serve.refresh_s`; every answer names the version that gave it.

What a look finds new is checked at once, if it is not too much; of many thousand versions, those that were never asked cost a
few hundred bytes each. A version that fails a check is refused with a logged reason, and the name keeps its previous version.
Each request uses one immutable entry from start to end. The last good set is on disk (`snapshot`), so a server can start
without its registry.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, suppress

from ptuning import storage
from ptuning.data.encoder import Encoder
from ptuning.errors import TrackingError, suggest
from ptuning.inference.engine import Engine
from ptuning.inference.inputs import RAW
from ptuning.model.base import Base
from ptuning.redaction import logger, redact
from ptuning.registry.listing import Listing
from ptuning.registry.names import TunedNames, is_tuned_name
from ptuning.registry.registry import Registry
from ptuning.serving.brought import Brought, Names, UnknownModel, unknown
from ptuning.serving.loading import Entry, Loader, Served
from ptuning.serving.residency import Residency
from ptuning.serving.snapshot import Snapshot
from ptuning.tracking.client import OFFLINE

log = logger(__name__)

AT_ONCE = 64
"""Versions that are checked as soon as a look finds them; further ones are checked when they are asked."""
BRINGING = 2
"""Versions that are brought at the same time for requests."""
LIST = "/v1/models lists them all"
MANY = 1000
"""Names among which none is searched for one that is written alike."""
ABSENT_S, ABSENT = 5.0, 1000
"""Seconds for which a name that the registry does not have is not looked up again, and the number of such names."""


class ServedModels:
    """The served names of one replica. `find` may be called from any thread, `sync` and `survey` from one at a time."""

    def __init__(
        self,
        base: Base,
        engine: Engine,
        registry: Registry,
        folder: str,
        only: Iterable[str] = (),
        resident_bytes: int | None = None,
    ) -> None:
        """`only`: the names to serve; none: all. `resident_bytes`: the limit of `Residency`."""
        self.residency = Residency(engine, resident_bytes)
        self.registry = registry
        self._tuned = TunedNames(registry)
        self._only = frozenset(only)
        self._folder = storage.join(folder, "-".join([base.fingerprint.weights[:16], *filter(None, [base.stored_in])]))
        self.loader = Loader(base, engine, registry, self.residency, self._folder)
        self._snapshot = Snapshot(self._folder)
        self._listing: Listing[Entry] = Listing(registry, lambda version: Entry.of(version, base), only)
        self._syncing = threading.Lock()
        self._lock = threading.RLock()
        """Held while what follows is changed, never while anything is read or computed."""
        self._known: dict[str, dict[int, Entry]] = {}
        """Versions that may be asked, by name."""
        self._count = 0
        self._champions: dict[str, Entry] = {}
        """The last version of each name that was checked as its champion."""
        self._brought = Brought(self.loader, self.residency, self._lock, self._is_served)
        self._queue: dict[Entry, None] = {}
        """Versions to check at once."""
        self._bringing = ThreadPoolExecutor(BRINGING, "ptuning-bring")
        self._absent: dict[str, float] = {}
        self._reached = False
        self._revision = 0
        self.base_id = self.loader.base_id
        self._bare = Served(self.base_id, int(time.time()), Encoder(RAW, base.tokenizer, engine.longest))
        self.looked = 0.0
        """When the registry was last read, in Unix seconds."""

    @property
    def names(self) -> Mapping[str, Served]:
        """All served ids: the base, each name (its champion), each version. Reading one may bring it."""
        return Names(self._ids, self.find)

    @property
    def refused(self) -> Mapping[str, str]:
        """Versions that failed a check, with the reason for clients; the log has the full reason."""
        return self._brought.refused

    @property
    def versions(self) -> int:
        """Number of versions that are served."""
        return self._count - len(self.refused) - len(self._queue)

    @property
    def is_whole(self) -> bool:
        """False: the registry holds names that were not read yet; they are read when they are asked."""
        return self._listing.whole

    def find(self, model: str) -> Served:
        """The entry of an id. It may have to be read, checked and tested first.

        Raises:
            UnknownModel: there is none, or it is refused; the message says which.
            TrackingError: MLflow does not respond, and it is not on disk.
            EngineBusy, EngineStopped: it cannot be tested now.
        """
        if model == self.base_id:
            return self._bare
        plain = self._tuned.plain(model)
        name = plain.partition(":")[0]
        if self._is_unread(name) or (plain != model and self._entry(plain) is None):  # a job has just published it
            self._read(name)
        entry = self._entry(plain)
        if entry is None:
            raise self._unknown(model)
        try:
            served = self._brought.bring(entry)
        except UnknownModel:
            previous = self._entry(plain)
            if previous in (None, entry):
                raise
            entry = previous  # the name keeps its previous champion
            served = self._brought.bring(entry)
        if plain == name:
            self._settle(name, entry)
        return served

    async def bring(self, model: str) -> Served:
        """`find` without making others wait."""
        if model == self.base_id:
            return self._bare
        entry = self._entry(model)
        known = entry in self._brought if entry else not is_tuned_name(model)
        if known and not self._is_unread(model.partition(":")[0]):
            return self.find(model)
        return await asyncio.get_running_loop().run_in_executor(self._bringing, self.find, model)

    def held(self, served: Served) -> AbstractAsyncContextManager[None]:
        """Keep the soft prompt of an entry in memory, so that it can be asked."""
        return self.residency.held(served.prompt)

    def listed(self) -> Iterator[tuple[str, Entry, Served | None]]:
        """Every id but the base's, with what is known of it without bringing it; not what is just being checked."""
        for name, versions in list(self._known.items()):
            found = [(name, entry) for entry in [self._entry(name)] if entry and name != self.base_id]
            for model, entry in [*found, *((str(entry), entry) for entry in versions.values())]:
                if str(entry) not in self.refused and entry not in self._queue:
                    yield model, entry, self._brought.get(entry)

    def _ids(self) -> Iterator[str]:
        yield self.base_id
        for model, _, _ in self.listed():
            yield model

    def sync(self) -> bool:
        """Update the served set from the registry; True if anything changed.

        Raises:
            TrackingError: MLflow does not respond; nothing was changed.
            EngineBusy: a new version could not be tested; the next call tries again.
        """
        with self._syncing:
            if not self.registry.is_there and (self._known or self._snapshot.exists):
                # not the same as an empty registry
                raise TrackingError(f"{redact(self.registry.uri)} no longer exists; restore it", OFFLINE)
            first = not self.looked
            try:
                changed = self._listing.look()
            except TrackingError:
                self._reached = False
                raise
            self._reached, self.looked = True, time.time()
            if first and not self._listing.whole:  # what was served last is known at once
                self._remember()
            return self._apply(changed)

    def survey(self) -> bool:
        """Compare some more of a registry that is too large for one look; True if anything changed. Raises as `sync`."""
        with self._syncing:
            first = not self._listing.whole
            return self._apply(self._listing.survey(), check=not first)

    def restore(self) -> bool:
        """Serve the last good set from disk; True if there was one."""
        with self._syncing:
            there = self._remember()
            if there:
                self._apply(())
            return there

    def save(self, now: bool = False) -> None:
        """Write the set for a start without the registry; a large one not at every change, unless `now`. A set that was only
        read from there is not written."""
        if not self.looked or not (now or self._snapshot.is_due(self._count)):
            return
        with self._lock:
            entries = [
                entry for versions in self._known.values() for entry in versions.values() if str(entry) not in self.refused
            ]
            champions = dict(self._champions)
        self._snapshot.write(champions, entries, self._listing.names)

    def _remember(self) -> bool:
        found = self._snapshot.read()
        if found is None:
            return False
        names = {name: listed for name, listed in found.names.items() if not self._only or name in self._only}
        self._listing.restore(names)
        with self._lock:
            self._champions = {name: entry for name, entry in found.champions.items() if name in names} | self._champions
        self._update(names)
        return True

    def _apply(self, changed: Collection[str], check: bool = True) -> bool:
        """Check new versions, champions first, and note the new set. `check` False: they are checked when they are asked."""
        before = (self._revision, self._brought.revision)
        self._update(changed, check)
        names = dict.fromkeys(changed)
        for entry in dict.fromkeys([*self._queue, *self._brought.due()[:AT_ONCE]]):
            with suppress(UnknownModel):  # it is noted, and logged
                self._brought.bring(entry)
            with self._lock:
                self._queue.pop(entry, None)
            names[entry.name] = None
        for name in names:
            wanted = self._wanted(name)
            if wanted is not None and wanted in self._brought:
                self._settle(name, wanted)
        if (self._revision, self._brought.revision) == before:
            return False
        self.save()
        return True

    def _update(self, names: Iterable[str], check: bool = True) -> None:
        """Note the versions of names as they are listed now, and which of them to check at once."""
        first: list[Entry] = []
        rest: list[Entry] = []
        with self._lock:
            for name in sorted(names):
                listed, champion, before = self._listing.names.get(name), self._champions.get(name), self._known.get(name, {})
                there = listed.versions if listed else {}
                taken = name in self._only or champion is not None
                found = {number: entry for number, entry in there.items() if entry.fits or taken}
                if found:
                    self._known[name] = found
                else:
                    self._known.pop(name, None)
                    champion = self._champions.pop(name, None)
                self._count += len(found) - len(before)
                kept = {*found.values(), *([champion] if found and champion else [])}
                for entry in [*before.values(), *([champion] if champion else [])]:
                    if entry not in kept:
                        self._forget(entry)
                wanted = self._wanted(name)
                fresh = [entry for entry in found.values() if before.get(entry.version) != entry]
                first += [wanted] if wanted and wanted != champion else []
                rest += fresh
                self._revision += bool(fresh) or len(found) != len(before)
            for entry in [*first, *rest][: max(0, AT_ONCE - len(self._queue)) if check else 0]:
                if entry not in self._brought and str(entry) not in self.refused:
                    self._queue[entry] = None

    def _wanted(self, name: str) -> Entry | None:
        """The version that the registry wants to answer under a name."""
        listed = self._listing.names.get(name)
        number = listed.current if listed else None
        return self._known.get(name, {}).get(number) if number else None

    def _entry(self, model: str) -> Entry | None:
        """The version that answers under an id, as far as it is known."""
        name, colon, number = model.partition(":")
        settled = self._champions.get(name)
        if colon:
            found = self._known.get(name, {}).get(int(number)) if number.isdecimal() and len(number) < 10 else None
            return next((entry for entry in (found, settled) if entry and str(entry) == model), None)
        wanted = self._wanted(name)
        if wanted is None or (settled and wanted in self._queue) or str(wanted) in self.refused:
            return settled
        return wanted

    def _settle(self, name: str, entry: Entry) -> None:
        with self._lock:
            before = self._champions.get(name)
            if before == entry or name not in self._known:
                return
            self._champions[name] = entry
            self._revision += 1
            if before and before not in self._known[name].values():
                self._forget(before)

    def _forget(self, entry: Entry) -> None:
        self._brought.forget(entry)
        self._queue.pop(entry, None)

    def _is_served(self, entry: Entry) -> bool:
        return entry == self._champions.get(entry.name) or entry == self._known.get(entry.name, {}).get(entry.version)

    def _is_unread(self, name: str) -> bool:
        """Whether the registry may know more of a name than this replica."""
        if not self._reached or name == self.base_id:
            return False
        listed = self._listing.names.get(name)
        return not listed.read if listed else not self._listing.whole and self._absent.get(name, 0) < time.monotonic()

    def _read(self, name: str) -> None:
        try:
            changed = self._listing.read(name)
        except TrackingError as error:
            if name not in self._known:
                raise
            log.warning("the registry does not respond, %s is as it was: %s", name, error)
            return
        if changed:
            self._update([name], check=False)  # it is checked now
        elif name not in self._listing.names:
            if len(self._absent) >= ABSENT:
                self._absent.clear()
            self._absent[name] = time.monotonic() + ABSENT_S

    def _unknown(self, model: str) -> UnknownModel:
        """The error for an id that nothing answers to. Of many names, none is suggested: to compare them all takes long."""
        if reason := self.refused.get(model):
            return UnknownModel(reason)
        if len(self._known) > MANY:
            return unknown([self.base_id], len(self._known) + 1, LIST)
        known = sorted({self.base_id, *filter(self._entry, self._known)})
        return unknown(known, len(known), suggest(model, self.names, LIST))
