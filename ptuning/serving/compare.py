"""Compares the answers to a text: of the base, of the base with a text prompt, and of every version of a soft prompt."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from ptuning.data.chat_encoder import make_encoder
from ptuning.data.encoder import Encoder, Teacher
from ptuning.errors import UserError
from ptuning.inference.engine import Engine
from ptuning.inference.inputs import fields_of, row_ids
from ptuning.inference.label_scorer import probabilities
from ptuning.inference.predictor import NEW_TOKENS
from ptuning.inference.sampling import Token
from ptuning.inference.transformers_engine import TransformersEngine
from ptuning.inference.types import End, EngineConfig, Request, ResidentPrompt
from ptuning.model.compatibility import base_of, check_base
from ptuning.model.soft_prompt import SoftPrompt
from ptuning.registry.publish import retrieve
from ptuning.registry.registry import Registry, RegistryError

SHOWN = 60
"""Characters of a text that a name shows."""


@dataclass(frozen=True)
class Opinion:
    """One answer of the comparison."""

    who: str
    answer: str
    probability: float | None = None
    """Probability among the labels; None for free text."""
    tokens: int = 0
    """Tokens that the base has read for it, virtual ones included; 0: it was not asked."""
    seconds: float = 0.0
    """Until the answer was complete. Nothing of the prompt was in the engine's cache."""


def compare(registry: Registry, name: str, text: str, base_path: str | None = None) -> list[Opinion]:
    """The answers of the base, of the text that the first version was initialised from (if any), and of every version, oldest
    first.

    All use the newest version's template and greedy decoding.

    Raises:
        UserError: no such name, no template, text that does not fit, or a base that the newest version was not made for.
    """
    versions = sorted(registry.versions(name), key=lambda version: version.version)
    if not versions:
        registry.find(name)  # raises the error
    loaded = {str(version): retrieve(registry, version)[0] for version in versions}
    newest = list(loaded.values())[-1]
    card = newest.card
    if card.template is None:
        raise RegistryError(f"{versions[-1]}: has no template; import it again with --input and --target")
    base = base_of(card, str(versions[-1]), base_path)
    check_base(newest, str(versions[-1]), base)
    engine = TransformersEngine(base.load(torch.float32), base.ends, EngineConfig(context=base.context, name=base.name))
    try:
        longest = max(soft_prompt.card.length for soft_prompt in loaded.values())
        encoder = make_encoder(card.template, base.tokenizer, engine.longest - longest)
        new = card.max_new_tokens or NEW_TOKENS
        room = encoder.input_room if encoder.label_ids else encoder.limit - new
        fields = fields_of(encoder, text)
        ids = row_ids(encoder, fields, room, truncate=False)
        _ask(engine, encoder, "", [encoder.end], None, 1)  # the first question of an engine takes longer
        opinions = [_ask(engine, encoder, "the base alone", ids, None, new)]
        for written in _setting(loaded, "prompt", "init_text"):
            front: list[int] = base.tokenizer(written, add_special_tokens=False)["input_ids"]
            opinions.append(_ask(engine, encoder, _named(written), [*front, *ids], None, new))
        for written in _setting(loaded, "data", "teacher"):
            taught = make_encoder(card.template, base.tokenizer, engine.longest, Teacher(written, engine.longest, new))
            opinions.append(_ask(engine, encoder, _named(written), taught.teacher_ids(fields), None, new))
        for who, soft_prompt in loaded.items():
            try:
                check_base(soft_prompt, who, base)
                handle = engine.add(soft_prompt.vectors, soft_prompt.card.content_hash)
            except UserError as error:
                opinions.append(Opinion(who, f"({error})"))
                continue
            opinions.append(_ask(engine, encoder, who, ids, handle, new))
        return opinions
    finally:
        engine.close()


def _setting(loaded: dict[str, SoftPrompt], table: str, key: str) -> list[str]:
    """The texts that were set for soft prompts, the oldest first, each once."""
    tables = ((soft_prompt.card.experiment or {}).get(table) or {} for soft_prompt in loaded.values())
    return list(dict.fromkeys(each[key] for each in tables if each.get(key)))


def _named(written: str) -> str:
    return f"the text {written if len(written) <= SHOWN else written[:SHOWN] + '...'!r}"


def _ask(engine: Engine, encoder: Encoder, who: str, ids: list[int], handle: ResidentPrompt | None, new: int) -> Opinion:
    labels = encoder.template.labels
    began, tokens = time.perf_counter(), len(ids) + (len(handle.ids) if handle else 0)
    if labels:
        (scores,) = engine.choose(handle, [ids], encoder.label_trie).result()
        shares = probabilities(scores, labels)
        label = max(shares, key=lambda each: shares[each])
        return Opinion(who, label, shares[label], tokens, time.perf_counter() - began)
    events = list(engine.generate(Request(ids, handle, new, ends=(encoder.end,))))
    end = events[-1]
    if isinstance(end, End) and end.reason == "failed":
        return Opinion(who, f"({end.message})")
    made = [event.id for event in events if isinstance(event, Token) and event.id != encoder.end]
    return Opinion(who, encoder.texts_of([made])[0], None, tokens, time.perf_counter() - began)
