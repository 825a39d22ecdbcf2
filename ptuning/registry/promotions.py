"""The champion of a name: promotions are serialised, from all processes and machines.

MLflow's `set_registered_model_alias` overwrites blindly: it has no compare-and-set. But MLflow offers, on every SQL store and
through its server, an append-only log with a total order: its database numbers the versions of a registered model under a
primary key, and never uses a number twice. So each name has a log, the registered model `NAME~promotions` (not a valid name of
a soft prompt), and a promotion is an entry in it:

    request: "version 5, and the last move I saw was number 7"

An entry counts if its `seen` is the number of the last move that counted before it; otherwise it is ignored. Every reader of
the log derives the same list of moves, so of two promotions that saw the same state exactly one wins. There is no lock, hence
no lease to expire: a process that dies before it writes its entry has changed nothing, and one that dies afterwards has won.

The alias `champion` is then set from the log, again and again until the log does not change in between, so the last writer sets
the result of the last move. If a process dies within these milliseconds, the alias is outdated until the next promotion,
rollback or deletion of this name, or until the promotion is repeated. The same events reset an alias that was changed by hand
in MLflow: change it with `ptuning prompts promote`.
"""

from __future__ import annotations

import getpass
import random
import socket
import time
import uuid
from dataclasses import dataclass, replace
from typing import Any, Literal

from ptuning.errors import TrackingError
from ptuning.registry.registry import CHAMPION, Reference, Registry, RegistryError, Version, check_name
from ptuning.tracking.client import asking

Kind = Literal["promote", "rollback", "delete"]
PATIENCE = 30.0
"""Seconds. MLflow gives up numbering a version after three collisions (CREATE_MODEL_VERSION_RETRIES); then we retry."""
DESCRIPTION = "Promotions of {name}, one per version, in order. Written by ptuning only: the alias champion follows from it."


class MovedMeanwhile(RegistryError):
    """Another promotion came first."""


@dataclass(frozen=True)
class Move:
    """One entry of a log."""

    number: int
    kind: Kind
    version: int
    seen: int
    request: str
    by: str
    time_ms: int
    forced: str | None


@dataclass(frozen=True)
class State:
    """The state after some move of a log."""

    name: str
    champion: int | None = None
    earlier: tuple[int, ...] = ()
    """Earlier champions, the latest last; a rollback returns to the last one."""
    deleted: frozenset[int] = frozenset()
    moves: tuple[Move, ...] = ()
    """The moves that counted, deletions included."""
    last: int = 0
    """Number of the last promotion or rollback that counted."""

    def after(self, move: Move) -> State:
        """The state after an entry; unchanged if the entry does not count."""
        if any(move.request == other.request for other in self.moves):
            return self  # an append that was repeated because its response was lost
        if move.kind == "delete":
            if move.version == self.champion:
                return self
            return replace(self, deleted=self.deleted | {move.version}, moves=(*self.moves, move))
        if move.seen != self.last or move.version in self.deleted or move.version == self.champion:
            return self
        earlier = self.earlier if self.champion is None else (*self.earlier, self.champion)
        if move.kind == "rollback":
            if move.version not in self.earlier:
                return self
            earlier = self.earlier[: _last_index(self.earlier, move.version)]
        return replace(self, champion=move.version, earlier=earlier, moves=(*self.moves, move), last=move.number)

    def has(self, request: str) -> bool:
        return any(move.request == request for move in self.moves)


class PromotionLog:
    """The promotions of one name."""

    def __init__(self, registry: Registry, name: str) -> None:
        self.registry = registry
        self.name = check_name(name)
        self.model = f"{name}~promotions"

    def state(self) -> State:
        """What holds now."""
        return self._read(self._generation())

    def promote(self, version: int, seen: State, forced: str | None = None) -> State:
        """Make a version champion if the champion did not change since `seen`. Returns the new state.

        Raises:
            MovedMeanwhile: the champion changed; nothing was changed here.
            RegistryError: the version does not exist.
        """
        self.registry.find(Reference(self.name, version))
        return self._move("promote", version, seen, forced)

    def rollback(self) -> State:
        """Make the previous champion champion again.

        Raises:
            MovedMeanwhile: the champion changed at this moment; nothing was changed here.
            RegistryError: there is no previous champion.
        """
        seen = self.state()
        there = {version.version for version in self.registry.versions(self.name)} - seen.deleted
        target = next((version for version in reversed(seen.earlier) if version in there), None)
        if seen.champion is None or target is None:
            raise RegistryError(f"{self.name}: has no earlier champion to go back to; promote a version instead")
        return self._move("rollback", target, seen, None)

    def mark_deleted(self, version: int) -> None:
        """Mark a version as deleted, so that it can no longer be promoted. It can then be removed.

        Raises:
            RegistryError: the version is champion.
        """
        champion = RegistryError(f"{self.name}:{version}: is the champion; promote another version first, then delete this one")
        state = self.state()
        if version == state.champion:
            raise champion
        if version not in state.deleted:
            request = self._append("delete", version, state.last, None)
            if not self.state().has(request):
                raise champion

    def sync_alias(self) -> State:
        """Set the alias from the log until the log does not change in between.

        Raises:
            RegistryError: the champion was removed from MLflow by other means.
        """
        generation = self._generation()
        state = self._read(generation)
        while state.champion is not None:
            try:
                with asking(self.registry.uri):
                    self.registry.client.set_registered_model_alias(self.name, CHAMPION, str(state.champion))
            except TrackingError as error:
                if error.code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                raise RegistryError(
                    f"{self.name}:{state.champion}: is the champion, but was removed from MLflow; promote another version"
                ) from None
            newer = self._read(generation)
            if newer.last == state.last:
                break
            state = newer
        self.registry.changes.append(self.name, "changed")
        return state

    def _move(self, kind: Kind, version: int, seen: State, forced: str | None) -> State:
        request = self._append(kind, version, seen.last, forced)
        state = self.state()
        if not state.has(request):
            if version in state.deleted:
                raise RegistryError(f"{self.name}:{version}: was deleted; choose another version")
            raise MovedMeanwhile(
                f"{self.name}: its champion has just changed from {seen.champion or 'none'} to {state.champion}, so nothing "
                "was done; check it with ptuning prompts list and decide again"
            )
        return self.sync_alias()

    def _append(self, kind: Kind, version: int, seen: int, forced: str | None) -> str:
        """Append an entry, with retries. Returns its request id; an entry that is appended twice counts once."""
        request = uuid.uuid4().hex
        generation = self._generation()
        self._create()
        tags = {"kind": kind, "version": str(version), "seen": str(seen), "request": request, "born": generation, "by": _who()}
        if forced:
            tags["forced"] = forced[:4000]
        deadline, attempt = time.monotonic() + PATIENCE, 0
        while True:
            try:
                with asking(self.registry.uri):
                    self.registry.client.create_model_version(
                        self.model,
                        f"models:/{self.name}/{version}",
                        await_creation_for=0,
                        tags={f"ptuning.{key}": value for key, value in tags.items()},
                    )
                return request
            except TrackingError as error:
                if error.code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE") or time.monotonic() > deadline:
                    raise
            time.sleep(random.uniform(0, 0.02 * 2 ** min(attempt, 6)))
            attempt += 1
            if any(move.request == request for move in self._entries(generation)):
                return request  # the entry was written, only the response was lost

    def _create(self) -> None:
        try:
            with asking(self.registry.uri):
                description = DESCRIPTION.format(name=self.name)
                self.registry.client.create_registered_model(self.model, {"ptuning.ledger": self.name}, description)
        except TrackingError as error:
            if error.code != "RESOURCE_ALREADY_EXISTS":
                raise

    def _generation(self) -> str:
        """The creation time of the name: a name that was deleted in MLflow and created again starts with an empty log."""
        try:
            with asking(self.registry.uri):
                return str(self.registry.client.get_registered_model(self.name).creation_timestamp)
        except TrackingError as error:
            if error.code != "RESOURCE_DOES_NOT_EXIST":
                raise
            raise self.registry.unknown(self.name) from None

    def _read(self, generation: str) -> State:
        state = State(self.name)
        for move in self._entries(generation):
            state = state.after(move)
        return state

    def _entries(self, generation: str) -> list[Move]:
        found = self.registry.pages("search_model_versions", f"name = '{self.model}'", 200_000)
        mine = [entry for entry in found if entry.tags.get("ptuning.born") == generation]
        return sorted(map(_entry, mine), key=lambda move: move.number)


def delete(registry: Registry, reference: Reference) -> Version:
    """Delete a version that is not champion. The run that created it stays.

    Raises:
        RegistryError: the version does not exist or is champion, or no single version was named.
    """
    if reference.version is None:
        raise RegistryError(f"{reference}: is not a single version; write {reference.name}:N to delete version N")
    version = registry.find(reference)
    log = PromotionLog(registry, version.name)
    log.mark_deleted(version.version)
    registry.remove(version)
    log.sync_alias()  # MLflow has removed the aliases that pointed to it
    return version


def _entry(entry: Any) -> Move:
    tags = entry.tags
    return Move(
        number=int(entry.version),
        kind=tags["ptuning.kind"],
        version=int(tags["ptuning.version"]),
        seen=int(tags["ptuning.seen"]),
        request=tags["ptuning.request"],
        by=tags["ptuning.by"],
        time_ms=int(entry.creation_timestamp),
        forced=tags.get("ptuning.forced"),
    )


def _last_index(values: tuple[int, ...], value: int) -> int:
    return len(values) - 1 - values[::-1].index(value)


def _who() -> str:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        user = "unknown"
    return f"{user}@{socket.gethostname()}"
