"""`tuning`: the jobs of several clients at once against the same jobs one after the other, over the same standing group."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import ray

import ptuning
from benchmarks.measuring import heading, line, tell_machine, write
from ptuning.cluster.connection import leave_ray, start_ray
from ptuning.cluster.local_paths import absolute
from ptuning.config import parse_experiment
from ptuning.model import soft_prompt
from ptuning.tuning.actor import start_tuning, stop_tuning
from ptuning.tuning.files import FileStore

TEMPLATE = {"input": "{text}\nSentiment of the customer:", "target": " {label}"}


def add(commands: Any) -> None:
    command = commands.add_parser("tuning", help=__doc__)
    command.add_argument("--jobs", type=int, default=8)
    command.add_argument("--rows", type=int, default=200, help="of each job, all different")
    command.add_argument("--steps", type=int, default=100)
    command.add_argument("--batch", type=int, default=16)
    command.add_argument("--out", help="JSON file for the raw numbers")
    command.set_defaults(run=run)


class Service:
    """The tuning service of a storage folder, asked without HTTP."""

    def __init__(self, folder: str, arguments: argparse.Namespace) -> None:
        tables = {
            "name": "server",
            "data": {"train": "builtin:sentiment/train", **TEMPLATE},
            "train": {"batch_size": arguments.batch},
            "tuning": {"workers": 1, "slots": arguments.jobs},
            "compute": {"storage": folder},
        }
        self.epochs = max(1, round(arguments.steps * arguments.batch / (0.9 * arguments.rows)))  # a tenth is for validation
        self.experiment = absolute(parse_experiment(tables))
        start_ray(self.experiment)
        self.actor = start_tuning(self.experiment)
        self.files = FileStore(f"{folder}/tuning")

    def ask(self, what: str, owner: str, **more: Any) -> dict[str, Any]:
        while True:
            status, answer = ray.get(self.actor.ask.remote(what, owner, more))
            if status == 200:
                return dict(answer)
            assert status == 503, answer
            time.sleep(0.2)

    def create(self, number: int, rows: list[dict[str, str]]) -> tuple[str, str]:
        owner = f"{number:016x}"
        file = self.files.create(owner, "rows.jsonl", "fine-tune", ["\n".join(map(json.dumps, rows)).encode()])
        hyperparameters = {"learning_rate_multiplier": 1.0, "n_epochs": self.epochs}
        supervised = {"template": TEMPLATE, "hyperparameters": hyperparameters}
        method = {"type": "supervised", "supervised": supervised}
        body = {"model": "builtin", "training_file": file.id, "seed": number, "method": method}
        return owner, str(self.ask("create", owner, admin=False, body=body)["id"])

    def wait(self, jobs: list[tuple[str, str]]) -> None:
        for owner, job in jobs:
            while (found := self.ask("get", owner, job=job))["status"] not in ("succeeded", "failed"):
                time.sleep(0.1)
            assert found["status"] == "succeeded", found

    def vectors(self, job: str) -> Any:
        return soft_prompt.load(f"{self.experiment.compute.storage}/tuning/jobs/{job}/trials/{job}.t0/soft_prompt").vectors


def run(arguments: argparse.Namespace) -> None:
    source = Path(ptuning.__file__ or "").parent / "builtin" / "tasks" / "sentiment" / "train.jsonl"
    known = [json.loads(each) for each in source.read_text(encoding="utf-8").splitlines()]
    parts = [known[arguments.rows * number :][: arguments.rows] for number in range(arguments.jobs)]
    assert all(len(part) == arguments.rows for part in parts), "too few rows for so many jobs"
    results: dict[str, Any] = {"machine": tell_machine(1)}
    with tempfile.TemporaryDirectory() as folder:
        service = Service(folder, arguments)
        try:
            service.wait([service.create(99, parts[0])])  # the group has started
            began = time.perf_counter()
            together = [service.create(number, part) for number, part in enumerate(parts)]
            service.wait(together)
            packed = time.perf_counter() - began
            began = time.perf_counter()
            alone = []
            for number, part in enumerate(parts):
                alone.append(service.create(number, part))
                service.wait(alone[-1:])
            single = time.perf_counter() - began
            pairs = [(service.vectors(one), service.vectors(two)) for (_, one), (_, two) in zip(together, alone, strict=True)]
            difference = max(float((one - two).norm() / two.norm()) for one, two in pairs)
        finally:
            stop_tuning(service.experiment)
            leave_ray()
    heading(f"{arguments.jobs} jobs of {arguments.rows} rows, about {arguments.steps} steps of {arguments.batch} rows", "")
    line("one after the other", f"{single:.1f} s")
    line("at once", f"{packed:.1f} s, {packed / single:.2f} of it")
    line("largest relative difference of two soft prompts", f"{difference:.1e}")
    results |= {"jobs": arguments.jobs, "single_s": single, "packed_s": packed, "difference": difference}
    write(arguments.out, results, {})
