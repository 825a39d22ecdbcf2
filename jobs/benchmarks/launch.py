"""What the way from the command to the soft prompt costs: the whole command against two bare processes."""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed
import torch.multiprocessing

from ptuning import zero
from ptuning.base import find_base
from ptuning.config import read_experiment
from ptuning.orders import Assignment
from ptuning.prepare import absolute, load_task
from ptuning.train import Pack
from ptuning.train import train as train_slots
from ptuning.workers import Workers


def bare_worker(rank: int, port: int, path: str, overrides: list[str], folder: str) -> None:
    """One of two plain processes that train an experiment without Ray and MLflow."""
    local = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ |= {"MASTER_ADDR": "127.0.0.1"} | {name: str(value) for name, value in local.items()}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    experiment = absolute(read_experiment(path, overrides))
    base = find_base(experiment.model)
    model = zero.load(base, experiment.zero, base.dtype(experiment.model.dtype))
    pack = Pack(model, base, Workers.current(), lambda experiment: load_task(experiment, base))
    assignments = iter([[Assignment(experiment, f"{folder}/bare")]])
    train_slots(pack, lambda free: next(assignments, None), lambda event: None)
    torch.distributed.destroy_process_group()


def launch(arguments: argparse.Namespace) -> None:
    """Seconds of the whole command with 2 workers, against two bare processes that run the same loop."""
    overrides = ["compute.workers=2", "compute.cpus_per_worker=1", *arguments.overrides]
    seconds: dict[str, list[float]] = {"command": [], "bare": []}
    for _ in range(arguments.pairs):
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            command = [sys.executable, "-m", "ptuning", "train", arguments.experiment, *overrides, f"compute.storage={folder}"]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            seconds["command"].append(time.perf_counter() - began)
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            began = time.perf_counter()
            torch.multiprocessing.spawn(  # type: ignore[attr-defined]  # a re-export that torch does not declare
                bare_worker, (port, arguments.experiment, overrides, folder), nprocs=2
            )
            seconds["bare"].append(time.perf_counter() - began)
    for name, values in seconds.items():
        print(f"{name:8} {statistics.median(values):.1f} s {[round(value, 1) for value in values]}")
    print(f"Ray, MLflow and the checks add {statistics.median(seconds['command']) - statistics.median(seconds['bare']):.1f} s")
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(seconds))


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The command `launch`."""
    command = commands.add_parser("launch", help=launch.__doc__)
    command.add_argument("experiment")
    command.add_argument("overrides", nargs="*")
    command.add_argument("--pairs", type=int, default=3)
    command.add_argument("--out", help="file for the raw numbers (JSON)")
    command.set_defaults(run=launch)
