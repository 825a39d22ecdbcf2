"""What each idea of the training pass is worth: one switched off at a time, the product itself untouched."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from benchmarks.measuring import heading, in_turns, line, times_as_long
from benchmarks.steps import Step, difference, limit, our_step, random_llama, random_rows, random_vectors
from ptuning.data.batch_sampler import BatchSampler
from ptuning.model import cpu_attention, packing
from ptuning.model.packed_batch import PackedBatch
from ptuning.model.packing import Row, pack_targets
from ptuning.model.prompted_model import PromptedModel

BATCH = 16


def mixed_rows(batches: int) -> list[Row]:
    """Rows as tasks have them: most of some 30 tokens, a few of 128 (log-normal)."""
    lengths = np.random.default_rng(3).lognormal(np.log(32), 0.7, batches * BATCH).clip(8, 128)
    return random_rows(lengths.astype(int).tolist())


def batched(rows: list[Row]) -> list[list[Row]]:
    """An epoch of batches as training orders them."""
    order = BatchSampler(np.array([len(source) + len(target) for source, target in rows]), BATCH, seed=0)
    return [[rows[index] for index in order.batch(step)] for step in range(len(rows) // BATCH)]


def as_they_come(rows: list[Row]) -> list[list[Row]]:
    """The same rows in batches without order (theirs is random)."""
    return [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)]


def shared(vectors: Tensor, rows: list[Row]) -> tuple[list[Tensor], PackedBatch]:
    """The product's plan: the soft prompt once."""
    return [vectors], pack_targets([len(vectors)], [rows])


def repeated(vectors: Tensor, rows: list[Row]) -> tuple[list[Tensor], PackedBatch]:
    """The soft prompt in front of every row, as if each were a slot of its own; still no padding."""
    return [vectors] * len(rows), pack_targets([len(vectors)] * len(rows), [[row] for row in rows])


def all_logits(vectors: Tensor, rows: list[Row]) -> tuple[list[Tensor], PackedBatch]:
    """Logits at every place; those that predict no target count nothing. The last layer goes on as before."""
    prompts, plan = shared(vectors, rows)
    targets = torch.full((plan.positions,), -100)
    targets[plan.at] = plan.targets
    every = torch.arange(plan.positions)
    return prompts, dataclasses.replace(plan, at=every, targets=targets, per_slot=[plan.positions], read=plan.kept)


def whole_last_layer(vectors: Tensor, rows: list[Row]) -> tuple[list[Tensor], PackedBatch]:
    """The last layer computed at every place."""
    prompts, plan = shared(vectors, rows)
    return prompts, dataclasses.replace(plan, read=torch.arange(plan.positions))


def epoch(
    model: PromptedModel,
    vectors: Tensor,
    batches: Sequence[list[Row]],
    arrange: Callable[[Tensor, list[Row]], tuple[list[Tensor], PackedBatch]] = shared,
    shared_prefix: bool = True,
) -> Step:
    """Steps over some batches; their gradients summed, each a mean over its targets."""
    soft_prompt = vectors.to(model.base.device, copy=True).requires_grad_()

    def run() -> Tensor:
        soft_prompt.grad = None
        model.shared_prefix = shared_prefix
        if not shared_prefix:
            model.packed_layers.active = False
        try:
            for rows in batches:
                targets = sum(len(target) for _, target in rows)
                (model(*arrange(soft_prompt, rows)).sum() / targets).backward()
        finally:
            model.shared_prefix = True
        assert soft_prompt.grad is not None
        return soft_prompt.grad

    return run


def instead(name: str, value: object, step: Step) -> Step:
    """The same step with something else in the place of a name of `cpu_attention`."""

    def run() -> Tensor:
        with patch.object(cpu_attention, name, value):
            return step()

    return run


def torch_attention(step: Step) -> Step:
    """The same step with torch's own attention."""
    return instead("attention", cpu_attention.whole, step)


def differences(every: dict[str, Step], dtype: torch.dtype) -> dict[str, float]:
    """By how much the gradient of each side differs from that of the first, which must be little."""
    expected = next(iter(every.values()))().clone()
    apart = {side: difference(run(), expected) for side, run in every.items()}
    assert max(apart.values()) < limit(dtype), f"the gradients differ: {apart}"
    return apart


def compiled(dtype: torch.dtype, device: str) -> PromptedModel:
    """A base whose layers are compiled for rows of any length at their first use: minutes, and a C++ compiler."""
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)  # it tells of every place where it lets Python go on
    torch._dynamo.config.recompile_limit = 64
    model = PromptedModel(random_llama(dtype, device=device))
    for layer in model.base.model.layers:
        layer.compile(dynamic=True)
    return model


def sides(dtype: torch.dtype, device: str, length: int, batches: int, compile_too: bool) -> dict[str, Step]:
    """The product's pass, the same without one of its ideas, and with one that it does without."""
    model, vectors, rows = PromptedModel(random_llama(dtype, device=device)), random_vectors(length), mixed_rows(batches)
    inner = batched(rows)
    own = epoch(model, vectors, inner)

    found: dict[str, Step] = {
        "all ideas": own,
        "soft prompt once per row": epoch(model, vectors, inner, repeated),
        "... and rows padded (plain concatenation)": epoch(model, vectors, inner, shared_prefix=False),
        "logits at every place": epoch(model, vectors, inner, all_logits),
        "last layer at every place": epoch(model, vectors, inner, whole_last_layer),
        "rows of all lengths in one group of attention": one_group(own),
    }
    if dtype != torch.float32:
        found["torch's attention"] = torch_attention(own)
        found["float32"] = epoch(PromptedModel(random_llama(torch.float32, device=device)), vectors, inner)
    if compile_too:
        found["with layers compiled (torch.compile)"] = epoch(compiled(dtype, device), vectors, inner)
    return found


def one_group(step: Step) -> Step:
    """The same with the rows of a slot padded to the longest of them in attention, however short the others are."""

    def run() -> Tensor:
        with patch.object(packing, "WORTHWHILE", 0.0):
            return step()

    return run


def long_rows(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """How many times as long a step on long rows takes with other attention (P = 20, on CPU only)."""
    if arguments.device != "cpu":
        return []
    heading("dtype", "B, T", "in blocks of queries, s", "with whole rows", "95 %", "with torch's", "95 %")
    found = []
    for name in arguments.dtypes:
        dtype = getattr(torch, name)
        model = PromptedModel(random_llama(dtype))
        for batch, text in ((1, 256),) if arguments.quick else ((4, 512), (2, 1000)):
            own = our_step(model, random_vectors(20), random_rows([text] * batch))
            every = {"in blocks": own, "whole rows": instead("QUERIES", sys.maxsize, own), "torch's": torch_attention(own)}
            differences(every, dtype)
            times = in_turns(every, arguments.pairs)
            one: dict[str, Any] = {"dtype": name, "B": batch, "T": text, "step_s": statistics.median(times["in blocks"])}
            cells = [f"{one['step_s']:.3f}"]
            for side in ("whole rows", "torch's"):
                one[side], low, high = times_as_long(times["in blocks"], times[side])
                cells += [f"**{one[side]:.2f}**", f"{low:.2f} to {high:.2f}"]
            found.append(one)
            line(name, f"{batch}, {text}", *cells)
    return found


def ideas(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """How many times as long the same rows take with one idea switched off (rows of 8 to 128 tokens, 16 a step)."""
    heading("dtype", "P", "without it", "seconds per step", "times as long", "95 %", "gradients differ")
    found = []
    batches = 2 if arguments.quick else 4
    for name in arguments.dtypes:
        dtype = getattr(torch, name)
        for length in (20,) if arguments.quick else (20, 100):
            every = sides(dtype, arguments.device, length, batches, not arguments.quick and length == 20)
            apart = differences(every, dtype)
            times = in_turns(every, arguments.pairs)
            for side, seconds in times.items():
                step, (ratio, low, high) = statistics.median(seconds) / batches, times_as_long(times["all ideas"], seconds)
                found.append(
                    {"dtype": name, "P": length, "without": side, "step_s": step, "ratio": ratio, "ratio_95": [low, high]}
                )
                line(name, length, side, f"{step:.3f}", f"**{ratio:.2f}**", f"{low:.2f} to {high:.2f}", f"{apart[side]:.0e}")
    return found
