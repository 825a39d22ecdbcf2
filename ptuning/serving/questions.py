"""Requests -> what the engine is asked: token ids, limits, sampling, and the form of the answer."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ptuning.data.conversations import Message
from ptuning.data.encoder import Encoder
from ptuning.inference.engine import Engine
from ptuning.inference.grammar import Grammar, GrammarCompiler, GrammarError
from ptuning.inference.inputs import too_long
from ptuning.inference.sampling import Sampling
from ptuning.inference.types import RequestError
from ptuning.serving.completion import GenerationRequest
from ptuning.serving.input_processor import chat_ids, text_ids
from ptuning.serving.loading import Served
from ptuning.serving.protocol import Body, ChatRequest, CompletionRequest
from ptuning.serving.structured import Form, form_of
from ptuning.settings.running import ServeConfig

COMPLETION_TOKENS, CHAT_TOKENS = 16, 256
"""Maximum new tokens if neither the request nor the soft prompt's card gives a number."""

NO_EFFECT: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "min_tokens": (0,),
    "stop_token_ids": ([],),
    "ignore_eos": (False,),
}
"""Parameters of generated tokens, with the values that change nothing."""
ONLY_GENERATED = tuple(NO_EFFECT)
"""Without meaning for an answer that is chosen as a whole."""
NOT_RESTRICTED = ("min_tokens", "stop_token_ids", "ignore_eos")
"""Without meaning for an answer whose end a schema determines."""


class Questions:
    """For one engine and its limits."""

    def __init__(self, engine: Engine, limits: ServeConfig) -> None:
        self._engine = engine
        self._limits = limits
        self._grammars: GrammarCompiler | None = None

    async def completion(self, body: CompletionRequest, served: Served) -> list[GenerationRequest]:
        """One for every prompt.

        Raises:
            UserError: it cannot be answered.
        """
        form = form_of(body, served, None)
        new = self._new_tokens(served, body.max_tokens, COMPLETION_TOKENS)
        prompts: list[Any] = [body.prompt] if is_one(body.prompt) else list(body.prompt)
        self._check_number(body.n or 1, len(prompts))
        room = self._room(served, (served.conversation and served.encoder) or served.raw, body.max_tokens, form)
        ids = [await self._ids(served, prompt, room) for prompt in prompts]
        grammar = await asyncio.to_thread(self._grammar, form, served)
        found = [self._question(body, served, each, new, form, body.logprobs, strip=False) for each in ids]
        return [
            replace(each, grammar=grammar, echo=_echoed(served, prompt, each.ids) if body.echo else None)
            for each, prompt in zip(found, prompts, strict=True)
        ]

    async def chat(self, body: ChatRequest, served: Served) -> list[GenerationRequest]:
        """One.

        Raises:
            UserError: it cannot be answered.
        """
        messages: list[Message] = [dict(message.spoken) for message in body.messages]
        # In a thread, because tokenising a megabyte of text takes a while.
        form = await asyncio.to_thread(form_of, body, served, messages)
        asked = body.max_completion_tokens or body.max_tokens
        new = self._new_tokens(served, asked, CHAT_TOKENS)
        if body.continue_final_message and form != Form():
            raise RequestError("continue_final_message: a label or JSON has no begin; send constrain = false, or leave it out")
        self._check_number(body.n or 1, 1)
        room = self._room(served, served.encoder or served.raw, asked, form)
        ids = await asyncio.to_thread(chat_ids, served, body, messages, room, self._limits.chat)
        told = (body.top_logprobs or 0) if body.logprobs else None
        grammar = await asyncio.to_thread(self._grammar, form, served)
        return [replace(self._question(body, served, ids, new, form, told, strip=True), grammar=grammar)]

    def _grammar(self, form: Form, served: Served) -> Grammar | None:
        if form.schema is None:
            return None
        if self._grammars is None:
            self._grammars = GrammarCompiler(served.raw.tokenizer, self._engine.vocabulary)
        try:
            return self._grammars.compile(form.schema, (*self._engine.ends, *served.ends))
        except GrammarError as error:
            raise RequestError(f"{form.param}: {error}") from None

    def _check_number(self, n: int, prompts: int) -> None:
        if n > self._limits.max_answers:
            raise RequestError(f"n: {n} answers, at most {self._limits.max_answers} to a prompt; lower it")
        most = self._limits.running + self._limits.waiting
        if n * prompts > most:
            raise RequestError(f"prompt: {n * prompts} answers to {prompts} prompts, at most {most} per request; send fewer")

    async def _ids(self, served: Served, prompt: str | list[int], room: int) -> list[int]:
        if isinstance(prompt, str):
            return await asyncio.to_thread(text_ids, served, prompt, room)
        if len(prompt) > room:
            raise too_long(len(prompt), room)
        return prompt

    def _new_tokens(self, served: Served, asked: int | None, default: int) -> int:
        if asked is not None and asked > self._limits.max_new_tokens:
            raise RequestError(
                f"max_tokens: {asked} is more than the {self._limits.max_new_tokens} allowed by this server; lower it"
            )
        if asked is not None:
            return asked
        return min((served.card and served.card.max_new_tokens) or default, self._limits.max_new_tokens)

    def _room(self, served: Served, encoder: Encoder, asked: int | None, form: Form) -> int:
        """Maximum tokens of the text, from the limit of training and from the context. If max_tokens is not given, a long text
        may reduce the number of new tokens, down to the longest target that the soft prompt was trained on."""
        if form.choice and served.labels and served.encoder and form.choice.trie == served.encoder.label_trie:
            return served.encoder.input_room
        if form.choice:
            longest = max(map(len, form.choice.labels))
            return max(0, min(encoder.limit - longest, self._engine.longest - served.length - longest))
        usual = (served.card and served.card.max_new_tokens) or 1
        return max(0, min(encoder.limit - usual, self._engine.longest - served.length - (asked or usual)))

    def _question(
        self, body: Body, served: Served, ids: list[int], new: int, form: Form, told: int | None, strip: bool
    ) -> GenerationRequest:
        _check_form(body, form)
        if not form.choice:
            new = min(new, self._engine.longest - served.length - len(ids))
        ends = served.ends if (strip or served.encoder) and not body.ignore_eos else ()
        return GenerationRequest(
            served,
            ids,
            new,
            sampling_of(body, served, told, self._engine.vocabulary),
            tuple(body.stop or ()),
            form,
            strip,
            (*ends, *(body.stop_token_ids or ())),
            bool(body.ignore_eos),
        )


def sampling_of(body: Body, served: Served, told: int | None, vocabulary: int) -> Sampling:
    """How tokens are chosen. `told`: how many likely tokens are reported; None: no log-probabilities."""
    biases = {int(token): bias for token, bias in (body.logit_bias or {}).items()}
    for name, ids in (("logit_bias", biases), ("stop_token_ids", body.stop_token_ids or ())):
        strange = next((token for token in ids if token >= vocabulary), None)
        if strange is not None:
            raise RequestError(f"{name}: token {strange} is not in the vocabulary of {vocabulary} tokens; leave it out")
    return Sampling(
        temperature=body.temperature if body.temperature is not None else (0.0 if served.labels else 1.0),
        top_p=body.top_p or 1.0,
        top_k=max(0, body.top_k or 0),
        min_p=body.min_p or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
        repetition_penalty=body.repetition_penalty or 1.0,
        logit_bias=tuple(biases.items()),
        min_tokens=body.min_tokens or 0,
        seed=body.seed,
        top=told,
    )


def _check_form(body: Body, form: Form) -> None:
    """Refuse what has no meaning for an answer of this form."""
    names = ONLY_GENERATED if form.choice else NOT_RESTRICTED if form.schema is not None else ()
    kind = "a label" if form.choice else "JSON of a schema"
    for name in names:
        if getattr(body, name) not in (None, *NO_EFFECT[name]):
            raise RequestError(f"{name}: has no effect on an answer that is {kind}; send constrain = false, or leave it out")


def _echoed(served: Served, prompt: str | list[int], ids: list[int]) -> str:
    """The text of a prompt. Of one that a template was applied to: of all its tokens."""
    if isinstance(prompt, str) and not (served.conversation and served.encoder):
        return prompt
    return str(served.raw.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def is_one(prompt: str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]) -> bool:
    """Whether it is a single prompt."""
    return isinstance(prompt, str) or isinstance(prompt[0], int)
