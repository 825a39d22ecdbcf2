"""`ptuning plan` against measured memory: peak per rank of training steps, and of loading a base under ZeRO-3."""

from __future__ import annotations

import gc
import json
import os
import shutil
import socket
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed
import torch.multiprocessing
from transformers import AutoModelForCausalLM, LlamaConfig

from ptuning import zero
from ptuning.base import BUILTIN, find_base
from ptuning.config import parse_experiment
from ptuning.prepare import load_task
from ptuning.train import Assignment, Pack, step
from ptuning.workers import Workers

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


def measure(rank: int, workers: int, port: int, job: dict[str, Any], folder: str) -> None:
    """One rank: load the base, then train a few steps; its peaks go to a file."""
    local = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": workers, "LOCAL_WORLD_SIZE": workers, "MASTER_PORT": port}
    os.environ |= {"MASTER_ADDR": "127.0.0.1"} | {name: str(value) for name, value in local.items()}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=workers)
    experiment = parse_experiment(job["experiment"])
    base = find_base(experiment.model)
    task = load_task(experiment, base) if "data" in job else None
    warm = torch.ones(64, 64, requires_grad=True)
    (warm @ warm).sum().backward()  # kernels, autograd's thread
    torch.distributed.all_reduce(torch.ones(1))
    gc.collect()
    peak = Peak()
    with peak:
        model = zero.load(base, experiment.zero, getattr(torch, job["dtype"]))
    found: dict[str, Any] = {"load": peak.found(), "sharding": asdict(zero.sharding(model.base))}
    if task:
        pack = Pack(model, base, Workers.current(), lambda experiment: task, job["slots"])
        for number in range(job["slots"]):
            pack.attach(Assignment(experiment.model_copy(update={"name": f"t{number}"}), f"{folder}/{number}"))
        with peak:
            for _ in range(4):
                step(pack, lambda event: None)
        found["train"] = peak.found()
        found["tokens"], found["targets"] = int(task.train.lengths.max()), int(task.train.target_lengths.max())
    Path(folder, f"rank{rank}.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def run_ranks(workers: int, job: dict[str, Any], folder: str) -> list[dict[str, Any]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(  # type: ignore[attr-defined]  # a re-export that torch does not declare
        measure, (workers, port, job, folder), nprocs=workers
    )
    return [json.loads(Path(folder, f"rank{rank}.json").read_text()) for rank in range(workers)]
