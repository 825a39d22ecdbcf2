"""One GPU, ten minutes, nothing installed but torch and transformers: is it right, where does it wait, how fast is it?

Each part runs in a process of its own with a time limit, and prints one line of JSON when it is done, the parts that matter
most first. So a machine that is lent for a short time leaves results even if a part fails or hangs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.gpu_results import right_part, run_requests
from benchmarks.measuring import gemm_rate, machine, settle
from benchmarks.steps import SIZES, Size, Step, difference, flops, our_step, random_llama, random_rows, random_vectors
from ptuning.inference.sampling import Sampling
from ptuning.inference.transformers_engine import TransformersEngine
from ptuning.inference.types import EngineConfig, Request
from ptuning.model import varlen_attention
from ptuning.model.label_trie import LabelTrie
from ptuning.model.prompted_model import PromptedModel
from ptuning.planning.meta_model import MetaModel
from ptuning.planning.workload import Workload

TINY = Size(2, 64, 128, 4, 2, 1_000)
"""The base of `--small`."""


def machine_part(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the machine is, and what it can do at most."""
    device = arguments.device
    found: dict[str, Any] = machine(torch.get_num_threads(), device)
    shapes = [(2052, 4096, 14_336), (8208, 4096, 14_336)] if device != "cpu" and not arguments.small else [(64, 64, 64)]
    dtype = torch.bfloat16
    products = {}
    for rows, inner, columns in shapes:
        left, right = torch.randn(rows, inner, device=device).to(dtype), torch.randn(inner, columns, device=device).to(dtype)
        seconds = median(partial(torch.matmul, left, right), 10)
        products[f"{rows} x {inner} x {columns}"] = 2 * rows * inner * columns / seconds / 1e12
    block = torch.empty(1 << (30 if device != "cpu" else 24), dtype=torch.uint8, device=device)
    copied = 2 * block.numel() / median(block.clone, 5)
    kinds = ("flash_sdp", "mem_efficient_sdp", "math_sdp", "cudnn_sdp")
    return found | {
        "cudnn": torch.backends.cudnn.version(),
        "attention": {kind: getattr(torch.backends.cuda, f"{kind}_enabled")() for kind in kinds},
        "gemm_tflops": gemm_rate(dtype, device) / 1e12 if not arguments.small else None,
        "products_tflops": products,
        "copy_gb_per_s": copied / 1e9,
    }


def median(action: Callable[[], object], times: int) -> float:
    """Median seconds, after two calls that do not count."""
    seconds = []
    for number in range(times + 2):
        began = time.perf_counter()
        action()
        settle()
        if number > 1:
            seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def waits_part(arguments: argparse.Namespace) -> dict[str, Any]:
    """How often the host waits for the GPU in a step of training (K = 1 and 4)."""
    found = {}
    model = PromptedModel(random_llama(torch.bfloat16, TINY, arguments.device))
    rows, vectors = random_rows([8, 5, 11]), random_vectors(4, TINY.width)
    for slots in (1, 4):
        step = our_step(model, vectors, clipped(rows), slots)
        step()
        if arguments.device != "cpu":
            torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            step()
        if arguments.device != "cpu":
            torch.cuda.set_sync_debug_mode("default")
        found[f"K = {slots}"] = sum("synchronizing" in str(each.message) for each in seen)
    return found


def clipped(rows: list[tuple[list[int], list[int]]]) -> list[tuple[list[int], list[int]]]:
    """Rows whose tokens are in the small vocabulary."""
    return [([token % 900 + 5 for token in source], target) for source, target in rows]


def cudnn_part(arguments: argparse.Namespace) -> dict[str, Any]:
    """Two layers of the base, ragged rows, with and without cuDNN's attention."""
    size = TINY if arguments.small else SIZES[arguments.sizes[-1]]._replace(layers=2)
    model = PromptedModel(random_llama(torch.bfloat16, size, arguments.device))
    assert not torch.backends.cuda.cudnn_sdp_enabled(), "cuDNN's attention must be off by default"
    found: dict[str, Any] = {}
    draw = torch.Generator().manual_seed(0)
    for name, enabled in (("off", False), ("on", True)):
        torch.backends.cuda.enable_cudnn_sdp(enabled)
        seconds = []
        for _ in range(4 if arguments.small else 20):
            lengths = torch.randint(8, 32 if arguments.small else 128, (16,), generator=draw).tolist()
            step = our_step(model, random_vectors(20, size.width), clipped(random_rows(lengths)))
            began = time.perf_counter()
            step()
            settle()
            seconds.append(time.perf_counter() - began)
        found[name] = {"median_s": statistics.median(seconds), "longest_s": max(seconds[2:])}
    torch.backends.cuda.enable_cudnn_sdp(False)
    return found


@contextmanager
def attention_by(levels: bool) -> Iterator[None]:
    """Passes of a base in 16 bits compute attention by the levels of the tree, or by its groups."""
    with (
        patch.object(PromptedModel, "cascades", property(lambda model: levels)),
        patch.object(varlen_attention, "suits", lambda *tensors: levels),
    ):
        yield


def cascade_part(arguments: argparse.Namespace) -> dict[str, Any]:
    """Two layers of the base: attention by levels of the tree against one call per group, in time and in what the gradients
    differ from those in float32."""
    size = TINY if arguments.small else SIZES[arguments.sizes[-1]]._replace(layers=2)
    draw = torch.Generator().manual_seed(0)
    found: dict[str, Any] = {}
    for text, length, slots in ((12, 4, 2),) if arguments.small else ((128, 20, 1), (128, 20, 8), (32, 20, 16), (128, 100, 8)):
        lengths = torch.randint(max(8, text // 2), text + 1, (16,), generator=draw).tolist()
        rows, vectors = clipped(random_rows(lengths)), random_vectors(length, size.width)
        exact = our_step(PromptedModel(random_llama(torch.float32, size, arguments.device)), vectors, rows, slots)().clone()
        step = our_step(PromptedModel(random_llama(torch.bfloat16, size, arguments.device)), vectors, rows, slots)
        measured = {}
        for name, levels in (("levels", True), ("groups", False)):
            with attention_by(levels):
                measured[name] = {"step_s": median(step, 1 if arguments.small else 10), "difference": difference(step(), exact)}
        found[f"T={text} P={length} K={slots}"] = measured
        print(json.dumps({"part": "cascade", f"T={text} P={length} K={slots}": measured}), flush=True)
    return found


def train_part(arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds and memory of steps, against the arithmetic of the device and of `ptuning plan`."""
    found: dict[str, Any] = {}
    rate = gemm_rate(torch.bfloat16, arguments.device, 3) if not arguments.small else 1e12
    for name in ["tiny"] if arguments.small else arguments.sizes:
        size = TINY if name == "tiny" else SIZES[name]
        base = random_llama(torch.bfloat16, size, arguments.device)
        meta_model = MetaModel(base.config, torch.bfloat16)
        model = PromptedModel(base)
        for text, length in ((12, 4),) if arguments.small else ((128, 20), (32, 20), (128, 100)):
            for slots in (1, 2) if arguments.small else (1, 4, 8, 13):
                rows = clipped(random_rows([text] * 16)) if arguments.small else random_rows([text] * 16)
                step = our_step(model, random_vectors(length, size.width), rows, slots)
                work = Workload(slots, length, 16, text, 2)
                key = f"{name} T={text} P={length} K={slots}"
                needed = slots * flops(16, text, length, size)
                found[key] = measured(step, needed / rate, meta_model.training(work).peak, arguments)
                print(json.dumps({"part": "train", key: found[key]}), flush=True)  # at once: the limit may end this part
    return found


def measured(step: Step, least: float, planned: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """A step's median seconds, its share of the device's matrix product, and its peak memory. `planned`: bytes."""
    there = arguments.device != "cpu"
    try:
        step()
        if there:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        step()
        peak = torch.cuda.max_memory_allocated() - before if there else None
        seconds = median(step, 5)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return {"out_of_memory": True, "planned_gb": planned / 1e9}
    share = {"peak_gb": peak / 1e9, "peak_over_plan": peak / planned} if peak is not None else {}
    return {"step_s": seconds, "of_gemm": least / seconds, "planned_gb": planned / 1e9} | share


def serve_part(arguments: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second of greedy and sampled requests, and a request for many labels."""
    size = TINY if arguments.small else SIZES[arguments.sizes[-1]]
    base = random_llama(torch.bfloat16, size, arguments.device)
    many = (1, 4) if arguments.small else (1, 32, 128)
    cache = (1 << 22) if arguments.small else (4 << 30)
    engine = TransformersEngine(base, 2, EngineConfig(running=max(many), waiting=256, cache_bytes=cache, context=1024))
    new = 4 if arguments.small else 64
    found: dict[str, Any] = {}
    try:
        handles = [engine.add(random_vectors(20, size.width) + 0.001 * number, str(number)) for number in range(max(many))]
        kinds = {"greedy": Sampling(), "temperature 1": Sampling(1.0, seed=0), "top_p 0.9": Sampling(1.0, 0.9, seed=0)}
        for requests in many:
            for name, sampling in kinds.items():
                texts = [[5 + row % 90, 6, 7, 8] for row in range(requests)]
                asked = [Request(text, handle, new, sampling, True) for text, handle in zip(texts, handles, strict=False)]
                run_requests(engine, asked[:1])
                _, seconds = run_requests(engine, asked)
                found[f"R={requests} {name}"] = {"tokens_per_s": requests * new / seconds}
        labels = LabelTrie(tuple((5 + number // 9, 20 + number % 9, 2) for number in range(9 if arguments.small else 77)))
        texts = [[5 + row] * 30 for row in range(4 if arguments.small else 64)]
        began = time.perf_counter()
        engine.choose(handles[0], texts, labels).result(300)
        found["labels"] = {"texts": len(texts), "labels": len(labels.labels), "seconds": time.perf_counter() - began}
    finally:
        engine.close()
    return found


Part = Callable[[argparse.Namespace], dict[str, Any]]
PARTS: dict[str, tuple[Part, int]] = {
    "machine": (machine_part, 60),
    "right": (right_part, 90),
    "waits": (waits_part, 45),
    "cudnn": (cudnn_part, 60),
    "cascade": (cascade_part, 60),
    "train": (train_part, 175),
    "serve": (serve_part, 110),
}
"""Functions and their limits in seconds: 600 in all."""


def run_part(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """A part, in this process."""
    began = time.perf_counter()
    found = PARTS[name][0](arguments)
    return {"part": name, "seconds": round(time.perf_counter() - began, 1), "found": found}


def gpu(arguments: argparse.Namespace) -> None:
    """One GPU, with torch and transformers alone, within ten minutes: results, waits, cuDNN, training, serving."""
    if arguments.part:
        print(json.dumps(run_part(arguments.part, arguments)), flush=True)
        return
    script = str(Path(__file__).parents[1] / "benchmark.py")
    options = ["--device", arguments.device, "--sizes", *arguments.sizes, *(["--small"] if arguments.small else [])]
    for name, (_, limit) in PARTS.items():
        command = [sys.executable, script, "gpu", *options, "--part", name]
        try:
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=limit)
            lines, state = done.stdout, "failed" if done.returncode else ""
        except subprocess.TimeoutExpired as error:
            lines, state = (error.stdout or b"").decode(), f"stopped after {limit} s"
        sys.stdout.write(lines)
        if state:
            print(json.dumps({"part": name, "error": state}))
        sys.stdout.flush()


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The command `gpu`."""
    command = commands.add_parser("gpu", help=(gpu.__doc__ or "").partition("\n")[0], description=gpu.__doc__)
    command.add_argument("--device", default="cuda", help="cuda, or cpu to try the script")
    command.add_argument("--small", action="store_true", help="a tiny base: seconds instead of minutes")
    command.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["1b", "8b"], help="random bases")
    command.add_argument("--part", choices=list(PARTS), help="only this one, in this process and without a limit")
    command.set_defaults(run=gpu)
