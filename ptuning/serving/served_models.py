"""The served versions by name: checked, resident in the engine, and cached on disk.

A replica polls the registry instead of being notified through Serve's `user_config`: a promotion only changes MLflow, from any
machine, by people who need not know which clusters serve. So there is no second step that could be forgotten. The price is that
replicas may differ for `serve.refresh_s`; every answer names the version that gave it.

Each request uses one immutable entry from start to end. A version that fails a check is refused with a logged reason, and the
name keeps its previous version. The last good set is on disk, so a server can start without its registry.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ptuning import storage
from ptuning.data.chat_encoder import ChatEncoder, chat_template_of, make_encoder
from ptuning.data.chat_text import ChatText
from ptuning.data.encoder import Encoder
from ptuning.errors import DataError, TrackingError, UserError, suggest
from ptuning.inference.engine import Engine
from ptuning.inference.inputs import RAW
from ptuning.inference.sampling import Token
from ptuning.inference.types import End, EngineBusy, EngineStopped, Request, ResidentPrompt
from ptuning.model import soft_prompt
from ptuning.model.base import Base
from ptuning.model.compatibility import check_base
from ptuning.model.soft_prompt import Card, SoftPrompt, SoftPromptError
from ptuning.redaction import last_name, logger, placeless, redact
from ptuning.registry.names import TunedNames
from ptuning.registry.publish import retrieve
from ptuning.registry.registry import CHAMPION, Registry, Version
from ptuning.serving.residency import Residency, Resident
from ptuning.settings.data import Template
from ptuning.tracking.client import OFFLINE

log = logger(__name__)

SNAPSHOT = "served.json"
AGAIN = 60.0
"""Seconds until a refused version is checked again: its run may have been repaired."""
LISTED = 160
"""Maximum characters of the list of names in the error for an unknown model."""
_HASH = re.compile(r"[0-9a-f]{64}")


class UnknownModel(UserError):
    """No such name."""


@dataclass(frozen=True)
class Served:
    """The entry that answers under a name. `prompt` None: the bare base."""

    id: str
    created: int
    """Unix seconds."""
    raw: Encoder
    """For text without a template."""
    prompt: Resident | None = None
    card: Card | None = None
    encoder: Encoder | None = None
    """For rows of the template; None without one."""

    @cached_property
    def conversation(self) -> ChatText | None:
        """How a conversation becomes text: by the card's chat template or, without any template, by that of the base; None: by
        neither."""
        if self.encoder is not None:
            return self.encoder.chat if isinstance(self.encoder, ChatEncoder) else None
        jinja = chat_template_of(self.raw.tokenizer)
        return ChatText(self.raw.tokenizer, Template(chat_template=jinja)) if jinja else None

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """Tokens that end an answer, besides those of the base: the end of a turn."""
        try:
            return (self.conversation.end,) if self.conversation else ()
        except DataError:  # no soft prompt can be trained with this template, but a base answers with it
            return ()

    @property
    def handle(self) -> ResidentPrompt | None:
        """Its soft prompt in the engine. Only while it is held (`ServedModels.held`); None: the bare base."""
        if self.prompt is None:
            return None
        assert self.prompt.handle, f"{self.id} is not in memory"
        return self.prompt.handle

    @property
    def length(self) -> int:
        return self.prompt.length if self.prompt else 0

    @property
    def labels(self) -> tuple[str, ...]:
        return (self.encoder.template.labels or ()) if self.encoder else ()

    @property
    def content_hash(self) -> str | None:
        return self.prompt.content_hash if self.prompt else None


@dataclass(frozen=True)
class _Entry:
    """A version in the registry or in the snapshot."""

    name: str
    version: int
    created_ms: int
    content_hash: str
    card_hash: str
    fits: bool = field(default=True, compare=False)
    """False: according to its tags it was made for another base."""

    def __str__(self) -> str:
        return f"{self.name}:{self.version}"


class ServedModels:
    """The served names of one replica. `find` may be called from any thread, `sync` from one at a time."""

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
        self._base = base
        self._engine = engine
        self.residency = Residency(engine, resident_bytes)
        self._registry = registry
        self._tuned = TunedNames(registry)
        self._only = frozenset(only)
        self._folder = storage.join(folder, "-".join([base.fingerprint.weights[:16], *filter(None, [base.stored_in])]))
        self._lock = threading.Lock()
        self._loaded: dict[_Entry, Served] = {}
        self._retry: dict[_Entry, float] = {}
        self.base_id = soft_prompt.public_base(base.name)
        bare = Served(self.base_id, int(time.time()), Encoder(RAW, base.tokenizer, engine.longest))
        self._names: Mapping[str, Served] = {self.base_id: bare}
        self._champions: dict[str, _Entry] = {}
        self.refused: Mapping[str, str] = {}
        """Versions that failed a check, with the reason for clients; the log has the full reason."""
        self.patience = 20.0
        """Seconds that a new version waits for a free request before the next poll tries again."""
        self.looked = 0.0
        """When the registry was last read, in Unix seconds."""

    @property
    def names(self) -> Mapping[str, Served]:
        """All served ids: the base, each name (its champion), each version."""
        return self._names

    def find(self, model: str) -> Served:
        """The entry of an id.

        Raises:
            UnknownModel: there is none; the message lists the known names.
        """
        plain = self._tuned.plain(model)
        if plain != model and plain not in self._names:  # a job has just published it
            self.sync()
        served = self._names.get(plain)
        if served is None:
            known = sorted(name for name in self._names if ":" not in name)
            listed = [name for place, name in enumerate(known, 1) if len(", ".join(known[:place])) <= LISTED]
            more = f", ... ({len(known)} in all)" if len(known) > len(listed) else ""
            hint = suggest(model, self._names, "/v1/models lists them all")
            raise UnknownModel(
                f"there is no such model; the names are {', '.join(listed)}{more}, and versions are written name:3; {hint}"
            )
        return served

    def held(self, served: Served) -> AbstractAsyncContextManager[None]:
        """Keep the soft prompt of an entry in memory, so that it can be asked."""
        return self.residency.held(served.prompt)

    @property
    def versions(self) -> int:
        """Number of versions that are served."""
        return len(self._loaded)

    def sync(self) -> bool:
        """Update the served set from the registry; True if anything changed.

        Raises:
            TrackingError: MLflow does not respond; nothing was changed.
        """
        with self._lock:
            if not self._registry.is_there and (self._loaded or storage.exists(self._folder, SNAPSHOT)):
                raise TrackingError(
                    f"{redact(self._registry.uri)} no longer exists; restore it", OFFLINE
                )  # not the same as an empty registry
            versions = [version for version in self._registry.versions() if not self._only or version.name in self._only]
            self.looked = time.time()
            champions: dict[str, _Entry] = {}
            entries: dict[_Entry, Version] = {}
            for version in versions:  # the newest of each name first
                entry = self._entry(version)
                entries[entry] = version
                if version.name not in champions or CHAMPION in version.aliases:
                    champions[version.name] = entry
            return self._apply(champions, entries)

    def restore(self) -> bool:
        """Serve the last good set from disk; True if there was one."""
        with self._lock:
            if not storage.exists(self._folder, SNAPSHOT):
                return False
            try:
                snapshot: dict[str, Any] = json.loads(storage.read_file(self._folder, SNAPSHOT))
                entries = [_Entry(**entry) for entry in snapshot["versions"]]
                snapshot["champions"].items()
            except (UserError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                log.error("%s/%s is damaged, nothing in it is served: %s", self._folder, SNAPSHOT, error)
                return False
            wanted = [entry for entry in entries if not self._only or entry.name in self._only]
            by_id = {str(entry): entry for entry in wanted}
            champions = {name: by_id[version] for name, version in snapshot["champions"].items() if version in by_id}
            return self._apply(champions, dict.fromkeys(wanted))

    def _entry(self, version: Version) -> _Entry:
        ours, theirs = self._base.fingerprint.parts(), version.fingerprint
        return _Entry(
            version.name,
            version.version,
            version.created_ms,
            version.tag("content_hash") or "",
            version.tag("card_hash") or "",
            theirs is None or all(ours.get(part) == theirs.get(part) for part in {**theirs, "quantization": ""}),
        )

    def _apply(self, champions: Mapping[str, _Entry], entries: Mapping[_Entry, Version | None]) -> bool:
        """Load new versions, champions first; publish the new set; release the versions that are no longer served."""
        before = (dict(self._loaded), dict(self._champions), dict(self.refused))
        refused = {str(entry): self.refused[str(entry)] for entry in entries if str(entry) in self.refused}
        for entry in dict.fromkeys([*champions.values(), *entries]):
            if entry in self._loaded or time.monotonic() < self._retry.get(entry, 0):
                continue
            if not entry.fits and entry.name not in self._only and entry.name not in self._champions:
                continue  # for another base
            try:
                self._loaded[entry] = self._load(entry, entries[entry])
                refused.pop(str(entry), None)
            except TrackingError:
                raise
            except (EngineBusy, EngineStopped):
                raise
            except Exception as error:  # any error must not affect the other versions
                if not isinstance(error, UserError):
                    log.exception("%s could not be loaded", entry)
                self._retry[entry] = time.monotonic() + AGAIN
                refused[str(entry)] = self._public(entry, error)
                stays = self._champions.get(entry.name)
                log.error("%s is refused, %s stays: %s", entry, stays or "nothing", error)
        # A name whose champion was refused keeps its previous one.
        self._champions = {
            name: entry if entry in self._loaded else self._champions[name]
            for name, entry in champions.items()
            if entry in self._loaded or name in self._champions
        }
        kept = {*entries, *self._champions.values()}
        left = [entry for entry in self._loaded if entry not in kept]
        gone = [self._loaded.pop(entry) for entry in left]
        self.refused = refused
        if (self._loaded, self._champions, refused) == before:
            return False
        self._publish()
        for served in gone:
            assert served.prompt is not None
            self.residency.leave(served.prompt)
        return True

    def _public(self, entry: _Entry, error: Exception) -> str:
        """The reason why a version is refused, for clients: without details of this machine."""
        if not isinstance(error, UserError):
            return f"{entry}: could not be loaded; see the server's log"
        reason = str(error)
        for place in (self._folder, self._base.name):  # as a whole: a path with spaces looks like several paths
            reason = reason.replace(place, last_name(place))
        return placeless(reason)

    def _publish(self) -> None:
        bare = self._names[self.base_id]
        names = {str(entry): served for entry, served in sorted(self._loaded.items(), key=lambda pair: str(pair[0]))}
        self._names = {**{name: self._loaded[entry] for name, entry in self._champions.items()}, **names, self.base_id: bare}
        keys = ("name", "version", "created_ms", "content_hash", "card_hash")
        snapshot = {
            "champions": {name: str(entry) for name, entry in self._champions.items()},
            "versions": [{key: getattr(entry, key) for key in keys} for entry in self._loaded],
        }
        try:
            storage.write_file(self._folder, SNAPSHOT, json.dumps(snapshot, indent=1).encode())
        except OSError as error:  # serve even if the disk is full
            log.error("%s could not be written, a start without the registry would serve an older set: %s", SNAPSHOT, error)

    def _load(self, entry: _Entry, version: Version | None) -> Served:
        """A version from disk or from its run, fully checked and tested once.

        Raises:
            UserError: it cannot be served; the message gives the reason.
            TrackingError: MLflow does not respond.
        """
        # The hashes are tags that everyone with access to MLflow can write, and they name a folder.
        if not _HASH.fullmatch(entry.content_hash) or not _HASH.fullmatch(entry.card_hash):
            raise SoftPromptError(f"{entry}: its tags contain no SHA-256 of vectors and card; publish it again")
        if entry.name == self.base_id:  # its champion would answer in place of the base, or the base in its place
            raise SoftPromptError(f"{entry}: has the name of the base on this server; publish it under another name")
        loaded = self._bytes(entry, version)
        base, card = self._base, loaded.card
        check_base(loaded, str(entry), base)
        room = self._engine.longest - card.length
        if room < 3:
            raise SoftPromptError(
                f"{entry}: {card.length} virtual tokens leave no space in {self._engine.longest} positions; shorten it"
            )
        encoder = make_encoder(card.template, base.tokenizer, room) if card.template else None
        if encoder is not None and card.template is not None and card.template.labels:
            self._engine.check_room(card.length, 1, max(map(len, encoder.label_ids)))
        prompt = self.residency.admit(card.content_hash, loaded.vectors, lambda: self._bytes(entry, version).vectors)
        try:
            assert prompt.handle
            self._smoke_test(entry, prompt.handle)
        except BaseException:
            self.residency.leave(prompt)
            raise
        finally:
            self.residency.release(prompt)
        raw = Encoder(RAW, base.tokenizer, room)
        return Served(str(entry), entry.created_ms // 1000, raw, prompt, card, encoder)

    def _bytes(self, entry: _Entry, version: Version | None) -> SoftPrompt:
        folder = storage.join(self._folder, f"{entry.content_hash}-{entry.card_hash[:16]}")
        if storage.exists(folder, storage.MANIFEST):
            try:
                kept = soft_prompt.load(folder)
                if kept.card.content_hash == entry.content_hash:
                    return kept
                raise SoftPromptError(f"{folder} contains other vectors")
            except UserError as error:
                log.warning("%s: %s; it is downloaded again", entry, error)  # and kept until the new copy replaces it
        if version is None:
            raise SoftPromptError(f"{entry}: is not cached in {self._folder}; start the registry")
        loaded, files = retrieve(self._registry, version)
        try:
            storage.write_folder(folder, files)
        except OSError as error:
            log.error("%s could not be kept on disk, a start without the registry would not serve it: %s", entry, error)
        return loaded

    def _smoke_test(self, entry: _Entry, handle: ResidentPrompt) -> None:
        """Generate two tokens. This also caches the soft prompt's keys and values. One token would not suffice: transformers
        5.23 caches nothing of a request that ends with its prefill (PagedAttentionCache.mark_complete_blocks)."""
        for event in self._generate(Request([0], handle, 2, ignore_end=True)):
            if isinstance(event, End) and event.reason == "failed":
                raise SoftPromptError(f"{entry}: {event.message}; train it again with a lower learning rate")

    def _generate(self, request: Request) -> Iterator[Token | End]:
        """A request that is queued like any other; if the engine is full, it is retried."""
        until = time.monotonic() + self.patience
        while True:
            try:
                yield from self._engine.generate(request)
                return
            except EngineBusy:
                if time.monotonic() > until:
                    raise
                time.sleep(0.02)
