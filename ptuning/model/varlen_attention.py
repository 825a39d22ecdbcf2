"""Attention of many sequences of any lengths in one call: torch's flash attention on a GPU, plain torch on a CPU.

Both return the logarithm of the sum of each query's scores, so that the results of several calls with other keys for the same
queries can be merged (`cascade_attention`). The plain one is the reference: it is slow and computes what the GPU's does.

Shapes: N queries and S keys of all sequences, n sequences, h heads, d head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sequences:
    """Which queries attend to which keys: sequence i of the queries to sequence i of the keys."""

    queries: Tensor
    """`[n + 1]` int32, the first query of each sequence, and N."""
    keys: Tensor
    """`[n + 1]` int32, the first key of each sequence, and S. Every sequence has at least one."""
    longest_queries: int
    longest_keys: int
    causal: bool = False
    """The last query sees all keys, the one before it one fewer."""
    window: int | None = None
    """A causal query sees this many keys at most."""

    @property
    def sizes(self) -> dict[str, int]:
        """The keys that a query sees to the left and right of its own place, as flash attention names them; -1: all."""
        left = -1 if self.window is None else self.window - 1
        return {"window_size_left": left, "window_size_right": 0 if self.causal else -1}


def suits(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether flash attention computes these `[..., h, ..., d]` tensors: on a GPU, in 16 bits, not too wide."""
    device, width = q.device, q.shape[-1]
    if device.type in ("cpu", "meta") or q.dtype not in (torch.bfloat16, torch.float16) or k.shape != v.shape:
        return False
    if width % 8 or not (width <= 192 or width == 256):  # others fail in the backward pass of some GPUs (sdp_utils.cpp)
        return False
    return not q.is_cuda or (torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0))


def forward(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, scale: float | None) -> tuple[Tensor, Tensor]:
    """Queries `[N, h, d]`, keys and values `[S, key heads, d]` -> output `[N, h, d]` and logarithms of sums `[h, N]`."""
    if q.device.type == "cpu":
        return plain_forward(q, k, v, sequences, scale)
    found = torch.ops.aten._flash_attention_forward(
        q,
        k,
        v,
        sequences.queries,
        sequences.keys,
        sequences.longest_queries,
        sequences.longest_keys,
        0.0,
        sequences.causal,
        False,
        scale=scale,
        **sequences.sizes,
    )
    return found[0], found[1]


def backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, sequences: Sequences, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values from that of the output.

    `out` and `sums` may be those of more keys than these: the gradient of a softmax over all keys needs nothing else of the
    others (FlashAttention-2, arXiv 2307.08691, algorithm 2).
    """
    if q.device.type == "cpu":
        return plain_backward(gradient, q, k, v, out, sums, sequences, scale)
    unused = torch.empty(0, device=q.device)
    of_q, of_k, of_v = torch.ops.aten._flash_attention_backward(
        gradient,
        q,
        k,
        v,
        out,
        sums,
        sequences.queries,
        sequences.keys,
        sequences.longest_queries,
        sequences.longest_keys,
        0.0,
        sequences.causal,
        torch.empty(2, dtype=torch.uint64, device=q.device),  # the state of dropout, which there is none of
        unused,
        scale=scale,
        **sequences.sizes,
    )
    return of_q, of_k, of_v


def plain_forward(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, scale: float | None) -> tuple[Tensor, Tensor]:
    """`forward` in plain torch."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    sums = q.new_empty(q.shape[1], len(q), dtype=_exact(q))
    for mine, seen, mask in _each(sequences):
        scores = _scores(q[mine], k[seen], mask, scale)
        sums[:, mine] = scores.logsumexp(-1)
        shares = (scores - sums[:, mine, None]).exp()
        out[mine] = (shares @ _heads(v[seen], q.shape[1])).transpose(0, 1).to(out.dtype)
    return out, sums


def plain_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, sequences: Sequences, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`backward` in plain torch."""
    factor = scale if scale is not None else q.shape[-1] ** -0.5
    of_q, of_k, of_v = (torch.empty_like(each, memory_format=torch.contiguous_format) for each in (q, k, v))
    for mine, seen, mask in _each(sequences):
        shares = (_scores(q[mine], k[seen], mask, scale) - sums[:, mine, None]).exp()  # [h, t, s]
        mine_heads, came = (_heads(each[mine], q.shape[1]) for each in (q, gradient))
        keys, values = (_heads(each[seen], q.shape[1]) for each in (k, v))
        delta = (came * _heads(out[mine], q.shape[1])).sum(-1, keepdim=True)
        of_scores = shares * (came @ values.transpose(1, 2) - delta) * factor
        of_q[mine] = (of_scores @ keys).transpose(0, 1).to(q.dtype)
        for whole, part in ((of_k, of_scores.transpose(1, 2) @ mine_heads), (of_v, shares.transpose(1, 2) @ came)):
            shared = part.unflatten(0, (k.shape[1], -1)).sum(1)  # the query heads of one key head
            whole[seen] = shared.transpose(0, 1).to(whole.dtype)
    return of_q, of_k, of_v


def _exact(values: Tensor) -> torch.dtype:
    return torch.float64 if values.dtype == torch.float64 else torch.float32


def _heads(part: Tensor, heads: int) -> Tensor:
    """`[t, h or key heads, d]` -> `[h, t, d]`."""
    return part.to(_exact(part)).transpose(0, 1).repeat_interleave(heads // part.shape[1], 0)


def _scores(q: Tensor, k: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    scores = _heads(q, q.shape[1]) @ _heads(k, q.shape[1]).transpose(1, 2)
    scores = scores * (scale if scale is not None else q.shape[-1] ** -0.5)
    return scores if mask is None else scores.masked_fill(~mask, -torch.inf)


def _each(sequences: Sequences) -> Iterator[tuple[slice, slice, Tensor | None]]:
    """Queries, keys and mask of each sequence."""
    queries, keys = sequences.queries.tolist(), sequences.keys.tolist()
    for at in range(len(queries) - 1):
        mine, seen = slice(queries[at], queries[at + 1]), slice(keys[at], keys[at + 1])
        length, wide = mine.stop - mine.start, seen.stop - seen.start
        if not length:
            continue
        mask = None
        if sequences.causal:
            distance = torch.arange(wide - length, wide)[:, None] - torch.arange(wide)[None]
            mask = distance >= 0 if sequences.window is None else (distance >= 0) & (distance < sequences.window)
        yield mine, seen, mask
