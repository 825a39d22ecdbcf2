"""Plain processes that train together: DeepSpeed and the product's loop, no Ray, no MLflow."""

from __future__ import annotations

import json
import os
import socket
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed
import torch.multiprocessing

from benchmarks.measuring import typical
from ptuning.cluster.local_paths import absolute
from ptuning.config import Experiment
from ptuning.data.task import load_task
from ptuning.model.base import find_base
from ptuning.training import base_loader, loop
from ptuning.training.distributed import Workers
from ptuning.training.loop import Pack
from ptuning.training.messages import Event, StartRun
from ptuning.training.slot import Slot


@dataclass(frozen=True)
class Steps:
    """What a run's steps took."""

    ends_ms: list[int]
    """When each step was reported, in milliseconds of the clock, as events carry it."""
    gathered: list[int]
    """Bytes that all-gathers had brought to the first process by then."""
    saving_s: list[float]
    """Seconds of each checkpoint."""

    @property
    def step_s(self) -> float:
        return typical(self.ends_ms)

    @property
    def bytes_per_step(self) -> int:
        return int(statistics.median(after - before for before, after in zip(self.gathered, self.gathered[1:], strict=False)))


def spawn(worker: Callable[..., None], workers: int, *arguments: Any, niceness: int = 0) -> None:
    """Run `worker(*arguments)` in so many processes of one group, one thread each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(  # type: ignore[attr-defined]  # a re-export that torch does not declare
        _join, (workers, port, niceness, worker, arguments), nprocs=workers
    )


def _join(rank: int, workers: int, port: int, niceness: int, worker: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    # torch 2.13 renamed collectives that deepspeed 0.19 calls by their old names
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    os.nice(niceness)
    local = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": workers, "LOCAL_WORLD_SIZE": workers, "MASTER_PORT": port}
    os.environ |= {"MASTER_ADDR": "127.0.0.1"} | {name: str(value) for name, value in local.items()}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=workers)
    worker(*arguments)
    torch.distributed.destroy_process_group()


def count_gathered() -> list[int]:
    """A counter of the bytes that all-gathers bring to this process, in a list of one."""
    counter = [0]

    def counting(collective: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            output = arguments[0] if arguments else options["output_tensor"]
            tensors = output if isinstance(output, list) else [output]
            counter[0] += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            return collective(*arguments, **options)

        return call

    for name in ("all_gather_into_tensor", "all_gather"):
        setattr(torch.distributed, name, counting(getattr(torch.distributed, name)))
    return counter


def train_bare(experiment: Experiment, workers: int, niceness: int = 0) -> Steps:
    """Train one soft prompt from its first step to its last in plain processes."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(_train, workers, absolute(experiment).model_dump_json(), folder, niceness=niceness)
        return Steps(**json.loads(Path(folder, "steps.json").read_text()))


def _train(experiment: str, folder: str) -> None:
    counter = count_gathered()
    ends: list[int] = []
    gathered: list[int] = []
    saving: list[float] = []
    save = loop.save_checkpoint

    def timed_save(pack: Pack, slot: Slot) -> None:
        began = time.perf_counter()
        save(pack, slot)
        saving.append(time.perf_counter() - began)

    def report(event: Event) -> None:
        if event.kind == "step":
            ends.append(event.time_ms)
            gathered.append(counter[0])

    loop.save_checkpoint = timed_save  # `train.train` looks it up at each call
    settings = Experiment.model_validate_json(experiment)
    base = find_base(settings.model)
    model = base_loader.load(base, settings.zero, base.dtype(settings.model.dtype))
    workers = Workers.current()
    pack = Pack(model, base, workers, lambda experiment: load_task(experiment, base))
    assignments = iter([[StartRun(settings, f"{folder}/run")]])
    loop.train(pack, lambda free: next(assignments, None), report)
    if workers.is_main:
        Path(folder, "steps.json").write_text(json.dumps({"ends_ms": ends, "gathered": gathered, "saving_s": saving}))
