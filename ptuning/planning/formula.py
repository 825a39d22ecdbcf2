"""Activations of a pass by formula: upper bounds from the shapes of weights, for bases whose pass cannot be replayed.

Every module keeps what it is given and its result, and twice as much for what follows it (activation functions, gating,
residual sums). Attention keeps its scores where the architecture has no fused kernel, and a state space its states.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ptuning.model.attention_sizes import attention_sizes, unused
from ptuning.model.eight_bits import units
from ptuning.planning.workload import BaseShape, Workload
from ptuning.planning.zero3_simulator import Moment, Timeline

RESULTS = 3
"""Tensors of the size of a module's input and result that are kept: these, and those of what follows it."""
CHOSEN = ("num_experts_per_tok", "moe_topk", "moe_top_k", "top_k", "num_selected_experts", "num_experts_per_token")
CHUNKS = ("mamba_chunk_size", "chunk_size")
STATES = ("ssm_state_size", "state_size", "mamba_d_state", "d_state")


@dataclass(frozen=True)
class _Use:
    """A module with parameters of its own, and the bytes that its part of a pass keeps."""

    tensors: tuple[int, ...]
    kept: int


def timeline_by_formula(
    base: nn.Module, shape: BaseShape, work: Workload, *, backward: bool, shared: bool, recompute: bool
) -> Timeline:
    """A pass of `base`. `shared`: soft prompts are computed once per pass (`PromptedModel.shared_prefix`); `recompute`: layers
    keep only what they are given."""
    rows = work.slots * work.rows
    tokens = work.positions if shared else rows * (work.length + work.fed_per_row)
    parameters = list(base.parameters())
    number = {id(parameter): place for place, parameter in enumerate(parameters)}
    scores = 0 if getattr(base, "_supports_sdpa", False) else rows * (work.length + work.fed_per_row) ** 2
    per_layer = max(1, len(attention_sizes(base)) or shape.layers)
    uses: list[_Use] = []
    for name, module in base.named_modules():
        own = {number[id(parameter)]: parameter for parameter in module.parameters(recurse=False)}
        if own and not unused(name):
            kept = sum(_kept(module, parameter, base, shape, work, tokens) for parameter in own.values())
            uses.append(_Use(tuple(own), kept))
    heads = max(1, _number(base, ("num_attention_heads", "n_head", "num_heads"), 1))
    largest = max((use.kept for use in uses), default=0)
    # Every layer's scores, before and after the softmax, in fp32.
    apart = scores * heads * 8
    whole = sum(use.kept for use in uses) + apart * per_layer
    layer = whole // max(1, shape.layers) + largest
    hidden = tokens * shape.width * shape.itemsize
    if not backward:
        return _moments(base, uses, [layer + 2 * hidden] * len(uses), None, shape.itemsize)
    if recompute:
        steady = hidden * shape.layers + layer + largest
        return _moments(base, uses, [steady] * len(uses), [steady] * len(uses), shape.itemsize)
    growing, total = [], 0
    for use in uses:
        total += use.kept + apart * per_layer // len(uses)
        growing.append(total + largest)
    return _moments(base, uses, growing, [size + largest for size in growing], shape.itemsize)


def _moments(base: nn.Module, uses: list[_Use], forward: list[int], backward: list[int] | None, itemsize: int) -> Timeline:
    moments = []
    for use, peak in zip(uses, forward, strict=True):
        moments += [Moment("fetch", use.tensors, peak), Moment("release", use.tensors, peak)]
    if backward:
        for use, peak in zip(reversed(uses), reversed(backward), strict=True):
            moments += [Moment("fetch", use.tensors, peak, False), Moment("release", use.tensors, peak, False)]
    return Timeline(tuple(units(parameter, itemsize) for parameter in base.parameters()), tuple(moments))


def _kept(module: nn.Module, parameter: Tensor, base: nn.Module, shape: BaseShape, work: Workload, tokens: int) -> int:
    """Bytes that a pass keeps because of one parameter."""
    size = shape.itemsize
    if isinstance(module, nn.Embedding):
        return tokens * parameter.shape[-1] * size
    if parameter.dim() == 1 and parameter.numel() == shape.vocabulary:  # the output head's bias
        return 0
    if parameter.dim() == 2 and shape.vocabulary in parameter.shape:  # the output head: logits, their fp32 copy, its gradient
        return work.predictions * ((work.compared or shape.vocabulary) * (size + 12) + parameter.shape[-1] * size)
    if getattr(module, "A_log", None) is parameter:
        return _states(parameter, base, work, tokens)
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        return RESULTS * tokens * parameter.shape[0] * size
    if parameter.dim() == 2:
        return RESULTS * tokens * size * sum(parameter.shape)
    if parameter.dim() == 3:  # experts
        chosen = min(parameter.shape[0], _number(base, CHOSEN, parameter.shape[0]))
        return chosen * tokens * size * RESULTS * (parameter.shape[1] + parameter.shape[2])
    return tokens * parameter.numel() * (size + 8)  # norms, biases: computed in fp32


def _states(decay: Tensor, base: nn.Module, work: Workload, tokens: int) -> int:
    """A state space: with one decay per channel and state (Mamba) all states, otherwise products within chunks."""
    states = _number(base, STATES, 128)
    if decay.dim() > 1:
        return 16 * tokens * decay.numel()
    chunk = _number(base, CHUNKS, 64)
    padded = work.slots * work.rows * -(-(work.length + work.tokens) // chunk) * chunk
    return 16 * padded * (chunk + states) * decay.numel()


def _number(base: Any, names: tuple[str, ...], otherwise: int) -> int:
    config = base.config.get_text_config()
    for name in names:
        try:
            value = getattr(config, name, None)
        except Exception:  # an attribute that differs between layers raises an error of its own
            continue
        if isinstance(value, int) and value > 0:
            return value
    return otherwise
