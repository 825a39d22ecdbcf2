"""Checks whether a soft prompt fits a base."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ptuning.errors import BaseError
from ptuning.model.base import Base, find_base
from ptuning.model.input_embedding import InputEmbedding
from ptuning.model.soft_prompt import Card, SoftPrompt, SoftPromptError
from ptuning.settings.model import ModelConfig

if TYPE_CHECKING:  # importing it imports scipy, torch's compiler and more, which a driver does not need
    from transformers import PreTrainedModel


def check_base(soft_prompt: SoftPrompt, label: str, base: Base) -> None:
    """Refuse a soft prompt that was made for another base. The error calls the soft prompt `label`.

    Raises:
        SoftPromptError: names both bases and the difference.
    """
    check_made_for(soft_prompt, label, base.width, base.name, base.fingerprint.parts())


def check_made_for(soft_prompt: SoftPrompt, folder: str, width: int, base: str, fingerprint: dict[str, str] | None) -> None:
    """Refuse a soft prompt that was made for another base.

    Raises:
        SoftPromptError: names both bases and the difference.
    """
    card = soft_prompt.card
    if card.kind == "embedding" and card.width != width:
        raise SoftPromptError(
            f"{folder}: was made for width {card.width} ({card.base}), but {base} has width {width}; use its base"
        )
    if card.base_fingerprint is None or fingerprint is None:
        return
    parts = {**fingerprint, "quantization": ""}
    differ = [part for part in parts if card.base_fingerprint.get(part) != fingerprint.get(part)]
    if differ == ["quantization"]:
        theirs, ours = (each.get("quantization", "plain") for each in (card.base_fingerprint, fingerprint))
        fix = f'set model.quantization = "{theirs}"' if theirs != "plain" else "leave out model.quantization"
        raise SoftPromptError(f"{folder}: was trained on {card.base} stored in {theirs}, but {base} is {ours}; {fix}")
    if differ:
        ours = ", ".join(f"{part} {card.base_fingerprint.get(part, '?')[:12]}" for part in differ)
        theirs = ", ".join(f"{part} {fingerprint.get(part, '?')[:12]}" for part in differ)
        raise SoftPromptError(
            f"{folder}: was made for {card.base} ({ours}), but {base} has {theirs}; use the base it was made for"
        )


def base_of(card: Card, name: str, path: str | None = None) -> Base:
    """The base of a card, or the one at `path`.

    Raises:
        BaseError: the base is not found, or the card does not name it.
    """
    if path is None and card.base == "unknown":
        raise BaseError(f"{name}: its base is unknown; name it with --base")
    revision = card.revision if path is None else None
    try:
        return find_base(ModelConfig(path=path or card.base, revision=revision, quantization=card.quantization))
    except BaseError as error:
        reason = str(error).removeprefix("model.path: ")
        raise BaseError(f"{name}: {reason}, or name it with --base") from None


def base_of_all(soft_prompts: Mapping[str, SoftPrompt], path: str | None = None) -> Base:
    """The one base of several soft prompts, at `path` or where the card of the first one says.

    Raises:
        UserError: the base is not found, or a soft prompt was made for another one.
    """
    name, first = next(iter(soft_prompts.items()))
    base = base_of(first.card, name, path)
    for name, each in soft_prompts.items():
        check_base(each, name, base)
    return base


@torch.no_grad()
def next_logits(model: PreTrainedModel, vectors: Tensor | None, ids: Tensor, feeding: InputEmbedding | None = None) -> Tensor:
    """Logits `[V]` of the token after `ids` [1, T], with a soft prompt in front or without one. `feeding`: how the model is
    given embeddings (`self_check.find_input`)."""
    if vectors is not None and vectors.ndim > 2:
        from ptuning.model.kv_prefix import cache_of  # the code of models: a driver only checks fingerprints

        cache = cache_of([vectors.to(model.device)], model.dtype)
        seen = ids.new_ones(1, len(vectors) + ids.shape[1])
        return model(input_ids=ids, attention_mask=seen, past_key_values=cache, use_cache=True).logits[0, -1]
    rows = model.get_input_embeddings()(ids)
    if vectors is not None:
        rows = torch.cat([vectors.to(rows)[None], rows], dim=1)
        ids = torch.cat([ids.new_zeros(1, len(vectors)), ids], dim=1)
    inputs = feeding.inputs(rows, ids) if feeding else {"inputs_embeds": rows}
    return model(**inputs, use_cache=False).logits[0, -1]
