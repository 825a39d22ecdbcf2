"""`ptuning plan` against measured memory: peak per rank of training steps, and of loading a base under ZeRO-3."""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import tempfile
import threading
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed
import torch.multiprocessing
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.bare import spawn
from ptuning.config import parse_experiment
from ptuning.data.task import load_task
from ptuning.model.base import find_base
from ptuning.model.base_folder import BUILTIN
from ptuning.planning.capacity import Training, TrainingPlan
from ptuning.planning.meta_model import MetaModel, read_config
from ptuning.planning.workload import Machine, RunShape
from ptuning.training import base_loader
from ptuning.training.distributed import Workers
from ptuning.training.loop import Pack, step
from ptuning.training.messages import StartRun

MIB = 1 << 20
SHAPES: dict[str, dict[str, Any]] = {
    "20 M, grouped, tied": dict(
        hidden_size=384, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=6, num_key_value_heads=2,
        vocab_size=16_000, tie_word_embeddings=True,
    ),
    "58 M, wide vocabulary": dict(
        hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4,
        vocab_size=32_000,
    ),
    "120 M, deep": dict(
        hidden_size=768, intermediate_size=2048, num_hidden_layers=14, num_attention_heads=12, num_key_value_heads=12,
        vocab_size=12_000,
    ),
}  # fmt: skip
"""Random Llamas: what differs is where the memory goes."""
WORK = {
    "20 M, grouped, tied": dict(slots=4, length=50, rows=16, tokens=64),
    "58 M, wide vocabulary": dict(slots=1, length=20, rows=16, tokens=128),
    "120 M, deep": dict(slots=2, length=20, rows=8, tokens=96),
}


def make_base(folder: Path, dtype: torch.dtype, **shape: Any) -> Path:
    """A random Llama with the built-in base's tokenizer, as `save_pretrained` writes it."""
    config = LlamaConfig(max_position_embeddings=1024, eos_token_id=0, bos_token_id=0, pad_token_id=1, **shape)
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUILTIN / name, folder)
    return folder


class Peak:
    """The most memory of this process in a stretch of time, in bytes: resident (the kernel's own mark) and anonymous (sampled
    every 2 ms), both over what it had at the beginning of `baseline`."""

    def __init__(self) -> None:
        self.baseline = self._status()
        self._stop = threading.Event()
        self.anonymous = 0

    @staticmethod
    def _status() -> dict[str, int]:
        lines = Path("/proc/self/status").read_text().splitlines()
        return {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines if line.startswith(("Rss", "Vm"))}

    def __enter__(self) -> Peak:
        Path("/proc/self/clear_refs").write_text("5")  # the mark falls to what is resident now
        self.anonymous = 0
        self._stop.clear()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        status = self._status()
        self.resident = status["VmHWM"] - self.baseline["VmRSS"]
        self.anonymous -= self.baseline["RssAnon"]
        self.after = status["VmRSS"] - self.baseline["VmRSS"]

    def _sample(self) -> None:
        while not self._stop.wait(0.002):
            self.anonymous = max(self.anonymous, self._status()["RssAnon"])

    def found(self) -> dict[str, int]:
        return {"resident": self.resident, "anonymous": self.anonymous, "after": self.after}


def measure(job: dict[str, Any], folder: str) -> None:
    """One rank: load the base, then train a few steps; its peaks go to a file."""
    workers = Workers.current()
    experiment = parse_experiment(job["experiment"])
    base = find_base(experiment.model)
    task = load_task(experiment, base)
    warm = torch.ones(64, 64, requires_grad=True)
    (warm @ warm).sum().backward()  # kernels, autograd's thread
    torch.distributed.all_reduce(torch.ones(1))
    gc.collect()
    peak = Peak()
    with peak:
        model = base_loader.load(base, experiment.zero, base.dtype(experiment.model.dtype))
    held = base_loader.sharding(model.base)
    found: dict[str, Any] = {"load": peak.found(), "held": held.held, "whole": held.whole}
    if job["slots"]:
        pack = Pack(model, base, workers, lambda experiment: task, job["slots"])
        for number in range(job["slots"]):
            pack.attach(StartRun(experiment.model_copy(update={"name": f"t{number}"}), f"{folder}/{number}"))
        with peak:
            for _ in range(4):
                step(pack, lambda event: None)
        found |= {"train": peak.found(), "tokens": int(task.train.lengths.max())}
        found["targets"] = int(task.train.target_lengths.max())
    Path(folder, f"rank{workers.rank}.json").write_text(json.dumps(found))
    torch.distributed.barrier()


def run_ranks(workers: int, job: dict[str, Any], folder: str, returning: bool) -> list[dict[str, Any]]:
    """What the ranks of a group measured. `returning`: freed memory goes back to the system at once, so that what is resident
    is what is allocated; else the C library keeps it in its heap, with holes."""
    if returning:
        os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # read by the C library when a process starts
    else:
        os.environ.pop("MALLOC_MMAP_THRESHOLD_", None)
    spawn(measure, workers, job, folder)
    return [json.loads(Path(folder, f"rank{rank}.json").read_text()) for rank in range(workers)]


def write_job(base: Path, folder: str, dtype: str, work: dict[str, int], live: int | None) -> dict[str, Any]:
    """An experiment whose rows all have the same number of tokens."""
    rows = Path(folder, "rows.jsonl")
    rows.write_text((json.dumps({"text": " the" * (work["tokens"] - 4), "label": "good"}) + "\n") * 200)
    experiment = {
        "name": "plan",
        "model": {"path": str(base), "dtype": dtype},
        "prompt": {"length": work["length"]},
        "data": {"train": str(rows), "input": "{text}:", "target": " {label}"},
        "train": {"batch_size": work["rows"], "steps": 100},
        "zero": {"stage": 3} | ({"live_parameters": live} if live else {}),
        "compute": {"storage": folder},
    }
    return {"experiment": experiment, "slots": work["slots"]}


def planned(job: dict[str, Any], workers: int, found: dict[str, Any]) -> TrainingPlan:
    """The plan of such a job: the baseline of a measurement has the libraries already, so nothing is reserved."""
    experiment = parse_experiment(job["experiment"])
    base = find_base(experiment.model)
    meta_model = MetaModel(read_config(base.folder), base.dtype(experiment.model.dtype))
    machine = Machine(workers, psutil.virtual_memory().available // workers, workers, 1e9, 1e11, gpus=False)
    settings = RunShape.read(experiment, found["tokens"], found["targets"])
    return Training(meta_model.shape, settings, machine, meta_model.training, meta_model.evaluation).plan(job["slots"])


def plan(arguments: argparse.Namespace) -> None:
    """Peak memory per rank of training steps (its anonymous memory over that after the imports) against `ptuning plan`: random
    bases, 1 and 2 workers, gathered as little as possible and as much as there is."""
    results = []
    for name in [name for name in SHAPES if name.startswith(arguments.shape)]:
        with tempfile.TemporaryDirectory() as folder:
            base = make_base(Path(folder, "base"), getattr(torch, arguments.dtype), **SHAPES[name])
            for workers in arguments.workers:
                for live in (10_000_000, None) if workers > 1 else (None,):
                    job = write_job(base, folder, arguments.dtype, WORK[name], live)
                    ranks = run_ranks(workers, job, folder, returning=True)
                    kept = run_ranks(workers, job, folder, returning=False) if arguments.heap else ranks
                    plan = planned(job, workers, ranks[0])
                    expected = plan.share + plan.step + plan.soft_prompts
                    row = {
                        "shape": name,
                        "workers": workers,
                        "live": live,
                        "tokens": ranks[0]["tokens"],
                        "plan": expected,
                        "measured": [rank["train"]["anonymous"] for rank in ranks],
                        "heap": [rank["train"]["anonymous"] for rank in kept],
                        "plan_with_holes": expected + plan.holes,
                    }
                    results.append(row)
                    print(
                        f"{name}, {workers} workers, {'tight' if live else 'roomy'}: plan {expected / MIB:.0f} MiB, measured "
                        + ", ".join(f"{each / MIB:.0f} ({expected / each - 1:+.0%})" for each in row["measured"])
                        + f"; with holes at most {row['plan_with_holes'] / MIB:.0f}, measured "
                        + ", ".join(f"{each / MIB:.0f}" for each in row["heap"]),
                        flush=True,
                    )
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(results, indent=1))


def load(arguments: argparse.Namespace) -> None:
    """Peak memory of both ranks while a random base of 400 MB is loaded under ZeRO-3: anonymous memory, and resident memory
    with the pages of the file that are mapped."""
    shape = dict(hidden_size=1024, intermediate_size=2816, num_attention_heads=16, num_key_value_heads=16, vocab_size=24_000)
    results: dict[str, Any] = {}
    for dtype in ("bfloat16", "float32"):
        with tempfile.TemporaryDirectory() as folder:
            layers = 12 if dtype == "bfloat16" else 4  # 203 and 100 million numbers
            base = make_base(Path(folder, "base"), getattr(torch, dtype), **shape | {"num_hidden_layers": layers})
            job = write_job(base, folder, dtype, {"slots": 0, "length": 8, "rows": 4, "tokens": 16}, None)
            for way in ("returned", "kept"):
                ranks = run_ranks(2, job, folder, returning=way == "returned")
                results[f"{dtype}, freed memory {way}"] = ranks
                for rank, found in enumerate(ranks):
                    numbers = {name: f"{value / MIB:.0f}" for name, value in found["load"].items()}
                    sizes = f"whole {found['whole'] / MIB:.0f} MiB, share {found['held'] / MIB:.0f}"
                    print(f"{dtype}, {way}, rank {rank}: {sizes}, {numbers}", flush=True)
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(results, indent=1))


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The commands `plan` and `load`."""
    command = commands.add_parser("plan", help=plan.__doc__)
    command.add_argument("--shape", default="", help="only shapes whose name begins so")
    command.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    command.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    command.add_argument("--heap", action="store_true", help="also as it is by default, with the holes of the C library's heap")
    command.set_defaults(run=plan)
    other = commands.add_parser("load", help=load.__doc__)
    other.set_defaults(run=load)
    for each in (command, other):
        each.add_argument("--out", help="file for the raw numbers (JSON)")
