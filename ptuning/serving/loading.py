"""Bringing a published version into a replica: its files from disk or from its run, every check, and one test generation."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

from ptuning import storage
from ptuning.data.chat_encoder import ChatEncoder, chat_template_of, make_encoder
from ptuning.data.chat_text import ChatText
from ptuning.data.encoder import Encoder
from ptuning.errors import DataError, UserError
from ptuning.inference.engine import Engine
from ptuning.inference.inputs import RAW
from ptuning.inference.sampling import Token
from ptuning.inference.types import End, EngineBusy, Request, ResidentPrompt
from ptuning.model import soft_prompt
from ptuning.model.base import Base
from ptuning.model.compatibility import check_base
from ptuning.model.soft_prompt import Card, SoftPrompt, SoftPromptError
from ptuning.redaction import last_name, logger, placeless
from ptuning.registry.publish import retrieve
from ptuning.registry.registry import Registry, Version
from ptuning.serving.residency import Residency, Resident
from ptuning.settings.data import Template

log = logger(__name__)

_HASH = re.compile(r"[0-9a-f]{64}")


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


@dataclass(frozen=True, slots=True)
class Entry:
    """A version in the registry or in the snapshot: what a replica knows of it before it is asked."""

    name: str
    version: int
    created_ms: int
    content_hash: str
    card_hash: str
    run_id: str | None = field(default=None, compare=False)
    """None: it is from the snapshot."""
    length: int = field(default=0, compare=False)
    metric: tuple[str, float] | None = field(default=None, compare=False)
    fits: bool = field(default=True, compare=False)
    """False: according to its tags it was made for another base."""

    def __str__(self) -> str:
        return f"{self.name}:{self.version}"

    @classmethod
    def of(cls, version: Version, base: Base) -> Entry:
        """Of a version in the registry. Its tags can be written by everyone with access to MLflow."""
        ours, theirs = base.fingerprint.parts(), version.fingerprint
        length, metric, value = (version.tag(key) or "" for key in ("length", "metric", "value"))
        return cls(
            version.name,
            version.version,
            version.created_ms,
            version.tag("content_hash") or "",
            version.tag("card_hash") or "",
            version.run_id,
            int(length) if length.isdecimal() and len(length) < 7 else 0,
            _metric(metric, value),
            theirs is None or all(ours.get(part) == theirs.get(part) for part in {**theirs, "quantization": ""}),
        )

    def published(self) -> Version | None:
        """As `retrieve` needs it; None: only the registry knows its run."""
        if self.run_id is None:
            return None
        tags = {"ptuning.content_hash": self.content_hash, "ptuning.card_hash": self.card_hash}
        return Version(self.name, self.version, self.run_id, self.created_ms, (), tags)


def _metric(name: str, value: str) -> tuple[str, float] | None:
    try:
        return (name, float(value)) if name and value else None
    except ValueError:
        return None


class Loader:
    """Brings versions into one replica. Thread-safe."""

    def __init__(self, base: Base, engine: Engine, registry: Registry, residency: Residency, folder: str) -> None:
        """`folder`: where the files of versions are kept, so that a start needs no registry."""
        self._base = base
        self._engine = engine
        self._registry = registry
        self._residency = residency
        self.folder = folder
        self.base_id = soft_prompt.public_base(base.name)
        self.patience = 20.0
        """Seconds that a new version waits for a free request."""

    def load(self, entry: Entry) -> Served:
        """A version from disk or from its run, fully checked and tested once.

        Raises:
            UserError: it cannot be served; the message gives the reason.
            TrackingError: MLflow does not respond.
            EngineBusy: no request became free in time.
        """
        # The hashes are tags that everyone with access to MLflow can write, and they name a folder.
        if not _HASH.fullmatch(entry.content_hash) or not _HASH.fullmatch(entry.card_hash):
            raise SoftPromptError(f"{entry}: its tags contain no SHA-256 of vectors and card; publish it again")
        if entry.name == self.base_id:  # its champion would answer in place of the base, or the base in its place
            raise SoftPromptError(f"{entry}: has the name of the base on this server; publish it under another name")
        loaded = self._bytes(entry)
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
        prompt = self._residency.admit(card.content_hash, loaded.vectors, lambda: self._bytes(entry).vectors)
        try:
            assert prompt.handle
            self._smoke_test(entry, prompt.handle)
        except BaseException:
            self._residency.leave(prompt)
            raise
        finally:
            self._residency.release(prompt)
        raw = Encoder(RAW, base.tokenizer, room)
        return Served(str(entry), entry.created_ms // 1000, raw, prompt, card, encoder)

    def reason(self, entry: Entry, error: Exception) -> str:
        """Why a version is refused, for clients: without details of this machine."""
        if not isinstance(error, UserError):
            return f"{entry}: could not be loaded; see the server's log"
        reason = str(error)
        for place in (self.folder, self._base.name):  # as a whole: a path with spaces looks like several paths
            reason = reason.replace(place, last_name(place))
        return placeless(reason)

    def _bytes(self, entry: Entry) -> SoftPrompt:
        folder = storage.join(self.folder, f"{entry.content_hash}-{entry.card_hash[:16]}")
        if storage.exists(folder, storage.MANIFEST):
            try:
                kept = soft_prompt.load(folder)
                if kept.card.content_hash == entry.content_hash:
                    return kept
                raise SoftPromptError(f"{folder} contains other vectors")
            except UserError as error:
                log.warning("%s: %s; it is downloaded again", entry, error)  # and kept until the new copy replaces it
        version = entry.published()
        if version is None:
            raise SoftPromptError(f"{entry}: is not cached in {self.folder}; start the registry")
        loaded, files = retrieve(self._registry, version)
        try:
            storage.write_folder(folder, files)
        except OSError as error:
            log.error("%s could not be kept on disk, a start without the registry would not serve it: %s", entry, error)
        return loaded

    def _smoke_test(self, entry: Entry, handle: ResidentPrompt) -> None:
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
