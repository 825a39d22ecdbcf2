"""Key-value prefixes: soft prompts that are trained as keys and values of every layer (prefix tuning, Li and Liang 2021;
P-tuning v2, Liu et al. 2022).

Like embeddings, a prefix stands at positions 0 to P-1 in front of the text. But its tokens are never computed: attention takes
their keys and values, after rotation, from the parameters. PEFT stores the same numbers in the same order (`PREFIX_TUNING`
without a projection).

Shapes: P virtual tokens, T tokens, H width; a prefix is `[P, layers, 2, heads, d]`: keys and values of each layer's key heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import DynamicCache

from ptuning.errors import BaseError
from ptuning.model.packing import pack_targets
from ptuning.model.prompted_model import PromptedModel
from ptuning.model.self_check import FAILURES, ROUGH, TOLERANCE, raise_others, random_prompts

LENGTH, ROWS = 3, [([5, 6, 7, 9], [8, 4]), ([11, 6], [3])]
"""Virtual tokens and rows of the check."""


class KVShape(NamedTuple):
    """What a prefix holds of every virtual token."""

    layers: int
    heads: int
    """Key heads of a layer."""
    width: int
    """d of a key head."""


def cache_of(prefixes: Sequence[Tensor], dtype: torch.dtype) -> DynamicCache:
    """Prefixes of one length as the cache of transformers' own passes, each for a row."""
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(torch.stack([*prefixes]).to(dtype).permute(2, 3, 0, 4, 1, 5)):
        cache.update(keys, values, layer)
    return cache


@torch.no_grad()
def computed(model: PromptedModel, embeddings: Tensor) -> Tensor:
    """The prefix that embeddings `[P, H]` have as soft prompt, fp32. With a partitioned base, every rank has to call it.

    Raises:
        BaseError: the base's cache is not one of keys and values of the same size in every layer.
    """
    cache: Any = DynamicCache()  # of its own: those of sliding layers would forget the first tokens
    with model.plain() as base:
        ids = torch.zeros(1, len(embeddings), dtype=torch.long, device=base.device)
        rows = embeddings.to(base.device, base.dtype)[None]
        try:
            base(**model.inputs(rows, ids), past_key_values=cache, use_cache=True)
            layers = [torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers]  # [2, heads, P, d]
            whole = torch.stack(layers)
        except FAILURES as error:
            raise_others(error)
            raise _refused(model) from error
    expected = int(getattr(base.config.get_text_config(), "num_hidden_layers", 0))
    if len(whole) != expected or whole.shape[3] != len(embeddings):
        raise _refused(model)
    return whole.permute(3, 0, 1, 2, 4).float().contiguous()


def kv_shape(model: PromptedModel) -> KVShape:
    """The shape of a base's prefixes, after a check that its pass takes them: the prefix of a random soft prompt gives the
    predictions of the soft prompt. Checked once per model; with a partitioned base, every rank has to call it.

    Raises:
        BaseError: the base cannot take a prefix.
    """
    if model.kv_shape is None:
        model.kv_shape = _checked(model)
    return KVShape(*model.kv_shape)


@torch.no_grad()
def _checked(model: PromptedModel) -> KVShape:
    if not model.shared_prefix:
        raise _refused(model)
    [vectors] = random_prompts(model, [LENGTH], torch.Generator().manual_seed(6))
    prefix = computed(model, vectors)
    try:
        expected = model([vectors], pack_targets([LENGTH], [ROWS])).float()
        ways = [model([prefix], pack_targets([LENGTH], [ROWS], kv=[0])).float(), _by_cache(model, prefix)]
    except FAILURES as error:
        raise_others(error)
        raise _refused(model) from error
    for found in ways:
        apart: Any = (found - expected).abs().max() / max(float(expected.std()), 1.0)
        if not apart <= TOLERANCE.get(model.base.dtype, ROUGH):
            raise _refused(model)
    return KVShape(prefix.shape[1], prefix.shape[3], prefix.shape[4])


def _by_cache(model: PromptedModel, prefix: Tensor) -> Tensor:
    """The predictions of the check's rows by the base's own cache, with which evaluation generates text."""
    found = []
    with model.plain() as base:
        for source, target in ROWS:
            ids = torch.tensor([source + target], device=base.device)
            cache = cache_of([prefix.to(base.device)], base.dtype)
            seen = torch.ones(1, LENGTH + ids.shape[1], dtype=torch.long, device=base.device)
            logits = base(input_ids=ids, attention_mask=seen, past_key_values=cache, use_cache=True).logits[0]
            found.append(cross_entropy(logits[len(source) - 1 : -1].float(), ids[0, len(source) :], reduction="none"))
    return torch.cat(found)


def _refused(model: PromptedModel) -> BaseError:
    return BaseError(
        f"prompt.kind: {type(model.base).__name__} has no cache of equal keys and values in every layer, which a key-value "
        'prefix needs; set prompt.kind = "embedding"'
    )
