"""Soft prompts over their base in this process: texts in, labels or text out. No server and no Ray."""

from __future__ import annotations

import queue
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ptuning.data.chat_encoder import make_encoder
from ptuning.data.encoder import Encoder
from ptuning.errors import DataError, UserError, suggest
from ptuning.inference.inputs import RAW, Text, fields_of, row_ids
from ptuning.inference.label_scorer import probabilities
from ptuning.inference.open_engine import Kind, open_engine
from ptuning.inference.sampling import Sampling, Token
from ptuning.inference.types import AnswerFailed, End, EngineConfig, Request, RequestError, ResidentPrompt
from ptuning.model.compatibility import base_of_all
from ptuning.model.soft_prompt import SoftPrompt

NEW_TOKENS = 64
"""Most new tokens where the card does not say."""
MANY = 1 << 20
"""Requests that may wait: a caller's list is its own limit."""


@dataclass(frozen=True)
class RowAnswer:
    """The answer to one row of many; `error` instead, if there is none."""

    prediction: str | None = None
    """The likeliest label; without labels, the greedy text."""
    probabilities: tuple[float, ...] | None = None
    """p(label | text) in the order of the labels; None without labels."""
    finish_reason: str | None = None
    """Of a text: "stop", or "length" if it was cut off."""
    error: str | None = None


@dataclass(frozen=True)
class _Resident:
    handle: ResidentPrompt
    encoder: Encoder
    new_tokens: int


class Predictor:
    """Several soft prompts of one base, ready to answer. Close it, or use it in a `with` statement, to free the base.

    Texts of all soft prompts run in the same batches. Methods may be called from any thread.

    Args:
        soft_prompts: one soft prompt, or several by name.
        base: the location of their base, if it differs from the card: a folder or a Hugging Face id.
        dtype: "float32", "bfloat16" or "float16"; "auto": float32 if all were trained in it, else what training would use on
            this device.
        cache_mb: memory for keys and values, in MiB.
        engine: what computes; "auto" is vLLM where `serve.engine` would take it.

    Raises:
        UserError: the base does not exist, or a soft prompt was made for another one.
    """

    def __init__(
        self,
        soft_prompts: SoftPrompt | Mapping[str, SoftPrompt],
        *,
        base: str | None = None,
        dtype: str = "auto",
        cache_mb: int = 256,
        engine: Kind = "transformers",
    ) -> None:
        given = {soft_prompts.card.name: soft_prompts} if isinstance(soft_prompts, SoftPrompt) else dict(soft_prompts)
        if not given:
            raise UserError("Predictor: there is no soft prompt; pass one, or a mapping from names to soft prompts")
        found = base_of_all(given, base)
        if dtype == "auto" and all(each.card.dtype == "float32" for each in given.values()):
            dtype = "float32"
        config = EngineConfig(waiting=MANY, cache_bytes=cache_mb << 20, context=found.context, name=found.name)
        self._engine = open_engine(found, found.dtype(dtype), config, engine)
        self._tokenizer = found.tokenizer
        try:
            self._residents = {
                name: _Resident(
                    self._engine.add(each.vectors, each.card.content_hash),
                    make_encoder(each.card.template or RAW, found.tokenizer, self._engine.longest - each.card.length),
                    each.card.max_new_tokens or NEW_TOKENS,
                )
                for name, each in given.items()
            }
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Predictor:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the engine."""
        self._engine.close()

    @property
    def names(self) -> list[str]:
        """The soft prompts."""
        return list(self._residents)

    def predict(self, texts: Sequence[Text], name: str | None = None, *, truncate: bool = False) -> list[str]:
        """The likeliest label of each text; without labels, the greedy answer.

        Args:
            name: which soft prompt answers; not needed if there is only one.
            truncate: cut texts that are too long as training did, instead of refusing them.

        Raises:
            UserError: no such soft prompt, or a text that does not fit.
        """
        if not self._find(name).encoder.template.labels:
            return self.generate(texts, name, truncate=truncate)
        return [max(each, key=lambda label: each[label]) for each in self.probabilities(texts, name, truncate=truncate)]

    def probabilities(
        self, texts: Sequence[Text], name: str | None = None, *, truncate: bool = False
    ) -> list[dict[str, float]]:
        """p(label | text) of every label, for each text; each sums to 1.

        Raises:
            UserError: as `predict`, or the soft prompt has no labels.
        """
        resident = self._find(name)
        labels = resident.encoder.template.labels
        if not labels:
            raise RequestError(f"{name or self.names[0]}: has no labels to choose among; use generate")
        rows = self._rows(resident, texts, resident.encoder.input_room, truncate)
        if not rows:
            return []
        scores = self._engine.choose(resident.handle, rows, resident.encoder.label_trie).result()
        return [probabilities(each, labels) for each in scores]

    def generate(
        self,
        texts: Sequence[Text],
        name: str | None = None,
        *,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        truncate: bool = False,
    ) -> list[str]:
        """The text that the base generates after each text.

        Args:
            max_new_tokens: at most; default: as long as the longest training target.
            temperature: 0 takes the likeliest token each time.
            seed: the same seed gives the same answer.

        Raises:
            UserError: as `predict`.
            AnswerFailed: the logits were not finite.
        """
        resident = self._find(name)
        new = resident.new_tokens if max_new_tokens is None else max_new_tokens
        rows = self._rows(resident, texts, resident.encoder.limit - new, truncate)
        how = Sampling(temperature, top_p, seed=seed)
        requests = [Request(ids, resident.handle, new, how, ends=(resident.encoder.end,)) for ids in rows]
        for request in requests:
            self._engine.check(request)
        answers: list[queue.SimpleQueue[Token | End]] = [queue.SimpleQueue() for _ in requests]
        for request, answer in zip(requests, answers, strict=True):
            self._engine.submit(request, answer.put)
        return [self._collect(answer, resident.encoder.end)[0] for answer in answers]

    def answer_rows(self, rows: Sequence[tuple[str, Mapping[str, Any]]]) -> list[RowAnswer]:
        """Answer the rows of a table, of all soft prompts in the same batches. Texts that are too long are cut as in training;
        what is wrong with a row stays with it.

        Args:
            rows: the soft prompt of each row, and the fields of its template as texts.
        """
        answers: list[RowAnswer | None] = [None] * len(rows)
        waiting: list[Callable[[], None]] = []
        owners: dict[str, list[int]] = {}
        for at, (name, _) in enumerate(rows):
            owners.setdefault(name, []).append(at)
        for name, places in owners.items():
            resident = self._find(name)
            labels = resident.encoder.template.labels
            new = max(map(len, resident.encoder.label_ids)) if labels else resident.new_tokens
            ids: dict[int, list[int]] = {}
            fitted = resident.encoder.fitted([rows[at][1] for at in places], resident.encoder.limit - new)
            for at, found in zip(places, fitted, strict=True):
                try:
                    if isinstance(found, DataError):
                        raise found
                    self._engine.check(Request(found, resident.handle, new))
                    ids[at] = found
                except UserError as error:
                    answers[at] = RowAnswer(error=str(error))
            waiting += [self._choose(resident, ids, answers) if labels else self._write(resident, ids, answers)] if ids else []
        for wait in waiting:
            wait()
        return [answer for answer in answers if answer is not None]

    def _choose(self, resident: _Resident, ids: dict[int, list[int]], answers: list[RowAnswer | None]) -> Callable[[], None]:
        """Begin to choose labels; what is returned waits for the answers."""
        labels = resident.encoder.template.labels or ()
        scores = self._engine.choose(resident.handle, list(ids.values()), resident.encoder.label_trie)

        def wait() -> None:
            for at, found in zip(ids, scores.result(), strict=True):
                try:
                    shares = probabilities(found, labels)
                except AnswerFailed as error:
                    answers[at] = RowAnswer(error=str(error))
                else:
                    answers[at] = RowAnswer(max(shares, key=shares.__getitem__), tuple(shares.values()))

        return wait

    def _write(self, resident: _Resident, ids: dict[int, list[int]], answers: list[RowAnswer | None]) -> Callable[[], None]:
        """Begin to generate texts; what is returned waits for the answers."""
        events: dict[int, queue.SimpleQueue[Token | End]] = {at: queue.SimpleQueue() for at in ids}
        for at, row in ids.items():
            request = Request(row, resident.handle, resident.new_tokens, ends=(resident.encoder.end,))
            self._engine.submit(request, events[at].put)

        def wait() -> None:
            for at, answer in events.items():
                try:
                    text, reason = self._collect(answer, resident.encoder.end)
                except AnswerFailed as error:
                    answers[at] = RowAnswer(error=str(error))
                else:
                    answers[at] = RowAnswer(text, finish_reason=reason)

        return wait

    def _find(self, name: str | None) -> _Resident:
        if name is None:
            if len(self._residents) > 1:
                raise RequestError(f"there are several soft prompts; name one of {', '.join(self._residents)}")
            return next(iter(self._residents.values()))
        if name not in self._residents:
            fix = suggest(name, self.names, f"use one of {', '.join(self.names)}")
            raise RequestError(f"{name}: no such soft prompt; {fix}")
        return self._residents[name]

    def _rows(self, resident: _Resident, texts: Sequence[Text], room: int, truncate: bool) -> list[list[int]]:
        encoder = resident.encoder
        if isinstance(texts, (str, Mapping)) or (encoder.template.is_chat and _is_conversation(texts)):
            raise RequestError("texts: is a single text; pass a list of texts")
        return [row_ids(encoder, fields_of(encoder, text), room, truncate) for text in texts]

    def _collect(self, answer: queue.SimpleQueue[Token | End], end: int) -> tuple[str, str]:
        """The text of an answer, and why it ended."""
        tokens: list[int] = []
        while isinstance(event := answer.get(), Token):
            tokens.append(event.id)
        if event.reason == "failed":
            raise AnswerFailed(event.message)
        tokens = tokens[:-1] if tokens[-1:] == [end] else tokens
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True)).strip(), event.reason


def _is_conversation(texts: Sequence[Text]) -> bool:
    return any(isinstance(each, Mapping) and "role" in each for each in texts)
