"""Sizes of a base's attention layers, read from its projections, as configs do not give them the same way everywhere.

Some architectures have other heads in some layers (Gemma 4), values that are narrower than keys (multi-head latent attention),
layers without any attention (hybrids, state spaces), or no such fields at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

SEPARATE = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q_lin", "k_lin", "v_lin"), ("Wq", "Wk", "Wv"))
"""Names of the projections to queries, keys and values."""
FUSED = ("query_key_value", "qkv_proj", "c_attn", "Wqkv", "qkv", "att_proj")
"""Names of a projection to queries, keys and values."""
OUTPUTS = ("o_proj", "out_proj", "c_proj", "dense", "o", "Wo", "out_lin", "attn_out", "attention_out", "output")
"""Names of the projection of the result."""
WITHOUT = ("encoder_attn", "crossattention", "cross_attn", "vision", "visual", "image", "audio")
"""Parts of the names of modules that process something other than the text."""
RECURRENT = ("Delta", "Lightning", "Rwkv", "Indexer")
"""Parts of a class's name: the layer keeps a state of fixed size instead of keys and values."""


@dataclass(frozen=True)
class AttentionSize:
    """Elements per token of one layer."""

    queries: int
    keys: int
    """As the attention function reads them."""
    values: int
    cached: int
    """Keys and values in the base's own cache: multi-head latent attention caches them compressed."""

    @property
    def stored(self) -> int:
        """Keys and values as the attention function reads them."""
        return self.keys + self.values


def attention_sizes(base: nn.Module) -> list[AttentionSize]:
    """The attention layers of a base in their order; layers without keys and values are left out."""
    found: list[AttentionSize] = []
    for name, module in base.named_modules(remove_duplicate=False):
        kind = type(module).__name__
        if any(part in kind for part in RECURRENT) or unused(name):
            continue
        size = None if getattr(module, "is_kv_shared_layer", False) else _size(module)
        if size is not None:
            found.append(size)
    return found


def unused(name: str) -> bool:
    """A module of this name has no part in a pass over text alone."""
    return any(part in name for part in WITHOUT)


def token_numbers(base: nn.Module, *, cached: bool = False) -> int:
    """Elements of the keys and values of one token in all layers. `cached`: in the base's own cache, otherwise as the attention
    function reads them."""
    return sum(size.cached if cached else size.stored for size in attention_sizes(base))


def paged_numbers(base: nn.Module, layers: int) -> int:
    """Elements of one token in a paged cache, of a base with this number of layers. It has the same place for the keys and for
    the values of each layer: where they differ, as large as the largest (`inference.paged_attention.stored_sizes`)."""
    sizes = attention_sizes(base)
    widest = max((max(size.keys, size.values) for size in sizes), default=0)
    alike = all(size.keys == size.values == widest for size in sizes)
    return token_numbers(base) if alike else 2 * layers * widest


def _size(module: nn.Module) -> AttentionSize | None:
    output = next((wide for name in OUTPUTS if (wide := _given(getattr(module, name, None)))), 0)
    if hasattr(module, "kv_b_proj") and hasattr(module, "kv_a_proj_with_mqa"):
        return _latent(module, output)
    for queries, keys, values in SEPARATE:
        of_keys = _made(getattr(module, keys, None))
        if of_keys:
            # Layers whose values equal their keys have no projection of their own (Gemma 4).
            of_values = _made(getattr(module, values, None)) or of_keys
            wide = output or _made(getattr(module, queries, None)) or of_keys
            return AttentionSize(wide, of_keys, of_values, of_keys + of_values)
    both = _made(getattr(module, "kv_proj", None))
    if both:
        return AttentionSize(output or both // 2, both // 2, both // 2, both)
    fused = next((wide for name in FUSED if (wide := _made(getattr(module, name, None)))), 0)
    if not fused or not output:
        return None
    stored = fused - output if fused > output else 2 * output
    return AttentionSize(output, stored // 2, stored // 2, stored)


def _latent(module: Any, output: int) -> AttentionSize:
    """Multi-head latent attention: a latent vector and one rotated key are expanded to keys and values of all heads."""
    compressed = _made(module.kv_a_proj_with_mqa)
    rotated = compressed - _given(module.kv_b_proj)
    heads = int(getattr(module, "num_heads", 0) or module.config.num_attention_heads)
    expanded = _made(module.kv_b_proj) + heads * rotated  # values are as wide as what the output projection is given
    return AttentionSize(output, expanded - output, output, compressed)


def _made(layer: Any) -> int:
    """Width of a projection's result; 0 if it is not one."""
    layer = getattr(layer, "linear", layer)  # Moshi wraps its projections
    if hasattr(layer, "nf"):  # GPT-2's Conv1D, whose weight is transposed
        return int(layer.nf)
    return int(layer.out_features) if hasattr(layer, "out_features") else 0


def _given(layer: Any) -> int:
    """Width that a projection is given; 0 if it is not one."""
    layer = getattr(layer, "linear", layer)
    if hasattr(layer, "nf"):
        return int(layer.nx)
    return int(layer.in_features) if hasattr(layer, "in_features") else 0
