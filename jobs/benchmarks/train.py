"""A step of ours against PEFT's: same base, data, dtype and threads, gradients compared before anything is timed."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PromptTuningConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from ptuning.model import PromptedModel, plan_targets

Step = Callable[[], Tensor]


def random_llama(dtype: torch.dtype) -> PreTrainedModel:
    """A Llama shape of 58 M parameters with a vocabulary of 32,000; the same numbers at every call."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        pad_token_id=0,
    )
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def our_step(base: PreTrainedModel, vectors: Tensor, rows: list[tuple[list[int], list[int]]]) -> Step:
    """Loss and gradient `[P, H]` by this project."""
    model = PromptedModel(base)
    soft_prompt = vectors.clone().requires_grad_()

    def step() -> Tensor:
        soft_prompt.grad = None
        plan = plan_targets([len(soft_prompt)], [rows])
        model([soft_prompt], plan).mean().backward()
        assert soft_prompt.grad is not None
        return soft_prompt.grad

    return step


def peft_step(base: PreTrainedModel, vectors: Tensor, rows: list[tuple[list[int], list[int]]]) -> Step:
    """The same by PEFT's prompt tuning, in a plain loop."""
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=len(vectors))
    model: Any = get_peft_model(base, config)
    weight: Tensor = model.prompt_encoder["default"].embedding.weight
    weight.data.copy_(vectors)
    ids = torch.tensor([source + target for source, target in rows])
    labels = torch.full_like(ids, -100)
    for row, (source, target) in enumerate(rows):
        labels[row, len(source) : len(source) + len(target)] = torch.tensor(target)

    def step() -> Tensor:
        weight.grad = None
        model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss.backward()
        assert weight.grad is not None
        return weight.grad

    return step


def interleave(ours: Step, theirs: Step, pairs: int) -> tuple[list[float], list[float]]:
    """Seconds of each step, in the order A B B A A B ..."""
    times: tuple[list[float], list[float]] = ([], [])
    for pair in range(pairs):
        for side in (0, 1) if pair % 2 == 0 else (1, 0):
            began = time.perf_counter()
            (ours, theirs)[side]()
            times[side].append(time.perf_counter() - began)
    return times


def interval(ratios: list[float], seed: int = 0) -> tuple[float, float]:
    """Bootstrap 95 % interval of the median."""
    draw = np.random.default_rng(seed)
    medians = np.median(draw.choice(ratios, (2000, len(ratios))), axis=1)
    return float(np.quantile(medians, 0.025)), float(np.quantile(medians, 0.975))


def compare(batch: int, text: int, length: int, dtype: torch.dtype, pairs: int) -> dict[str, Any]:
    """One shape: agreement of the gradients, an A/A control, and the ratio of step times PEFT / ours."""
    draw = np.random.default_rng(1)
    rows = [(draw.integers(5, 32_000, text - 2).tolist(), [7, 2]) for _ in range(batch)]
    vectors = torch.randn(length, 512, generator=torch.Generator().manual_seed(2)) * 0.02
    ours, theirs = our_step(random_llama(dtype), vectors, rows), peft_step(random_llama(dtype), vectors, rows)
    expected = theirs().float()
    difference = float((ours() - expected).norm() / expected.norm())
    control = interleave(ours, ours, max(3, pairs // 3))
    mine, other = interleave(ours, theirs, pairs)
    ratios = [b / a for a, b in zip(mine, other, strict=True)]
    return {
        "B": batch,
        "T": text,
        "P": length,
        "dtype": str(dtype).removeprefix("torch."),
        "gradient_difference": difference,
        "ours_s": statistics.median(mine),
        "peft_s": statistics.median(other),
        "ratio": statistics.median(ratios),
        "ratio_95": interval(ratios),
        "control": statistics.median(b / a for a, b in zip(*control, strict=True)),
    }


def train(arguments: argparse.Namespace) -> None:
    """Step time against PEFT, fp32 and bf16."""
    torch.set_num_threads(arguments.threads)
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        for batch, text, length in ((16, 32, 20), (16, 32, 100), (16, 64, 50)):
            found = compare(batch, text, length, dtype, arguments.pairs)
            limit = 1e-4 if dtype == torch.float32 else 0.1
            assert found["gradient_difference"] < limit, f"the gradients differ: {found}"
            results.append(found)
            low, high = found["ratio_95"]
            print(
                f"{found['dtype']:9} B={batch} T={text} P={length:3}: "
                f"ours {found['ours_s']:.3f} s, PEFT {found['peft_s']:.3f} s, "
                f"ratio {found['ratio']:.2f} [{low:.2f}, {high:.2f}], "
                f"gradients differ by {found['gradient_difference']:.0e}, A/A {found['control']:.2f}",
                flush=True,
            )
    for index in range(3):
        half = results[index]["ours_s"] / results[index + 3]["ours_s"]
        print(f"bf16 against fp32, P={results[index]['P']}: {half:.2f} times as fast")
    machine = {
        "processor": platform.processor() or platform.machine(),
        "threads": arguments.threads,
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
    }
    if arguments.out:
        Path(arguments.out).write_text(json.dumps({"machine": machine, "train": results}, indent=1))


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The command `train`."""
    command = commands.add_parser("train", help=train.__doc__)
    command.add_argument("--pairs", type=int, default=10)
    command.add_argument("--threads", type=int, default=2)
    command.add_argument("--out", help="file for the raw numbers (JSON)")
    command.set_defaults(run=train)
