"""How the benchmarks measure: sides in turns, medians with intervals, and the machine they ran on."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

LIBRARIES = ("torch", "transformers", "peft", "deepspeed", "ray")


def in_turns(sides: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each side, round by round, every other round backwards (A B B A A B ...)."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in list(sides)[:: -1 if number % 2 else 1]:
            began = time.perf_counter()
            sides[name]()
            settle()
            times[name].append(time.perf_counter() - began)
    return times


def settle() -> None:
    """Wait until a GPU has done what it was given; it works behind the program's back."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def interval(ratios: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """Bootstrap 95 % interval of the median."""
    draw = np.random.default_rng(seed)
    medians = np.median(draw.choice(ratios, (2000, len(ratios))), axis=1)
    return float(np.quantile(medians, 0.025)), float(np.quantile(medians, 0.975))


def times_as_long(ours: Sequence[float], others: Sequence[float]) -> tuple[float, float, float]:
    """The others' seconds over ours, pair by pair: median, and its 95 % interval."""
    ratios = [other / own for own, other in zip(ours, others, strict=True)]
    return statistics.median(ratios), *interval(ratios)


def typical(ends_ms: Sequence[int], skip: int = 3) -> float:
    """Seconds of a step: the mean of the middle half of what lies between the ends of steps, the first ones left out.

    A median would jump by whole milliseconds; a plain mean would count evaluations and checkpoints.
    """
    between = sorted(after - before for before, after in zip(ends_ms[skip:], ends_ms[skip + 1 :], strict=False))
    quarter = len(between) // 4
    return statistics.fmean(between[quarter : len(between) - quarter]) / 1000


def gemm_rate(dtype: torch.dtype, device: str = "cpu", repeats: int = 5) -> float:
    """FLOP/s of torch's product of two square matrices with the threads of this process, or on a GPU: what a step is held
    against."""
    size = 2048 if device == "cpu" else 8192
    left, right = torch.randn(2, size, size, device=device).to(dtype)
    torch.mm(left, right)
    settle()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        torch.mm(left, right)
        settle()
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / statistics.median(seconds)


def machine(threads: int, device: str = "cpu") -> dict[str, Any]:
    """What the figures depend on; the load is the mean number of busy processes of the last minute."""
    return {
        "processor": _processor() if device == "cpu" else f"{torch.cuda.get_device_name(device)}, {_processor()}",
        "cores": os.cpu_count(),
        "threads": threads,
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "versions": {name: found for name in LIBRARIES if (found := _version(name))},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def tell_machine(threads: int, device: str = "cpu") -> dict[str, Any]:
    """`machine`, said in a line."""
    found = machine(threads, device)
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    print(f"{found['processor']}, {found['cores']} cores, {threads} threads, load {found['load']}; {versions}", flush=True)
    return found


def tell_part(part: Callable[..., object]) -> None:
    """What the figures that follow are: the first words of a part's docstring."""
    print("", " ".join((part.__doc__ or "").split()), "", sep="\n", flush=True)


def heading(*columns: str) -> None:
    """The first two lines of a Markdown table."""
    line(*columns)
    line(*("---" for _ in columns))


def line(*cells: object) -> None:
    """A line of a Markdown table."""
    print("|", " | ".join(str(cell) for cell in cells), "|", flush=True)


def write(out: str | None, results: Mapping[str, Any], pictures: Mapping[str, bytes]) -> None:
    """The raw numbers as JSON, the pictures as `<out without suffix>-<name>.png`."""
    if out:
        Path(out).write_text(json.dumps(results, indent=1))
        for name, picture in pictures.items():
            Path(out).with_name(f"{Path(out).stem}-{name}.png").write_bytes(picture)
