"""`prompts`: a replica whose registry holds many thousand soft prompts: its start, its looks, and the first answer of one that
nobody has asked before. Most versions are written into MLflow's tables directly, and are one soft prompt."""

from __future__ import annotations

import argparse
import asyncio
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.measuring import heading, line, tell_machine, write
from benchmarks.predict import untrained
from ptuning.config import parse_experiment
from ptuning.inference.inputs import fields_of, row_ids
from ptuning.registry.publish import publish
from ptuning.registry.registry import Registry, Version
from ptuning.serving.service import Service
from ptuning.tracking.client import artifact_root, default_uri

NAME = "user-{:06d}"
COLD = 20
"""Versions that are asked for the first time."""


def copy_version(database: Path, version: Version, names: int, first: int = 0) -> None:
    """The same version under many names, each with a champion, straight into the tables of MLflow 3.17."""
    now = version.created_ms
    made = [NAME.format(number) for number in range(first, first + names)]
    with closing(sqlite3.connect(database)) as connection, connection:
        run = "SELECT source, run_id FROM model_versions WHERE name = ? AND version = ?"
        source, run_id = connection.execute(run, (version.name, version.version)).fetchone()
        insert = "INSERT INTO {} ({}) VALUES ({})"

        def fill(table: str, columns: str, rows: Any) -> None:
            connection.executemany(insert.format(table, columns, ", ".join("?" * len(columns.split(", ")))), rows)

        fill("registered_models", "name, creation_time, last_updated_time", ((name, now, now) for name in made))
        columns = "name, version, creation_time, last_updated_time, current_stage, source, run_id, status"
        fill("model_versions", columns, ((name, 1, now, now, "None", source, run_id, "READY") for name in made))
        tags = version.tags.items()
        fill("model_version_tags", "name, version, key, value", ((name, 1, *tag) for name in made for tag in tags))
        fill("registered_model_aliases", "name, alias, version", ((name, "champion", 1) for name in made))


def published(registry: Registry, folder: Path, name: str, seed: int) -> Version:
    """A soft prompt of its own."""
    made = untrained(seed)
    made.save(str(folder / name))
    return publish(registry, name, str(folder / name), None, artifact_root(registry.uri, str(folder)))


def measure(folder: Path, versions: int) -> dict[str, Any]:
    """One registry of a size."""
    registry = Registry(default_uri(folder))
    copy_version(folder / "mlflow.db", published(registry, folder, "first", 0), versions)
    cold = [str(published(registry, folder, f"zz-{number}", number + 1)) for number in range(COLD)]
    tables = {
        "name": "many",
        "data": {"train": "unused.jsonl", "input": "{text}", "target": " {label}"},
        "serve": {"refresh_s": 3600.0, "resident_mb": 64},
        "compute": {"storage": str(folder)},
    }
    began = time.monotonic()
    service = Service(parse_experiment(tables), {}, "one")
    found: dict[str, Any] = {"start_s": time.monotonic() - began, "known_at_start": service.models.versions}
    models = service.models
    try:
        waits = [seconds(partial(asyncio.run, ask(service, name))) for name in cold]
        found |= {"cold_median_s": statistics.median(waits), "cold_largest_s": max(waits)}
        found["look_s"] = statistics.median(seconds(models.sync) for _ in range(20))
        new = str(published(registry, folder, "new", 99))
        found["look_with_a_new_version_s"] = seconds(models.sync)
        assert models.find("new").id == new
        began = time.monotonic()
        while models.survey() or not models.is_whole:
            time.sleep(0.1)
        found |= {"whole_list_s": time.monotonic() - began, "versions": models.versions}
        found["list_s"] = seconds(lambda: sum(1 for _ in models.listed()))
        found["save_s"] = seconds(lambda: models.save(now=True))
        found["memory_mb"] = psutil.Process().memory_info().rss / 2**20
    finally:
        service.close()
    began = time.monotonic()
    again = Service(parse_experiment(tables), {}, "two")
    found |= {"second_start_s": time.monotonic() - began, "known_at_second_start": again.models.versions}
    again.close()
    return found


def seconds(work: Callable[[], object]) -> float:
    began = time.monotonic()
    work()
    return time.monotonic() - began


async def ask(service: Service, name: str) -> None:
    """The label of one text."""
    served = await service.models.bring(name)
    async with service.models.held(served):
        assert served.encoder is not None
        row = row_ids(served.encoder, fields_of(served.encoder, "fine"), served.encoder.input_room, False)
        await asyncio.wrap_future(service.engine.choose(served.handle, [row], served.encoder.label_trie))


def prompts(arguments: argparse.Namespace) -> None:
    """Start, looks, first answers and memory of a replica whose registry holds many thousand soft prompts."""
    torch.set_num_threads(arguments.threads)
    results: dict[str, Any] = {"machine": tell_machine(arguments.threads)}
    for versions in arguments.versions:
        with tempfile.TemporaryDirectory(prefix="ptuning-benchmark-") as folder:
            results[str(versions)] = measure(Path(folder), versions)
        heading(f"{versions:,} versions", "")
        for name, value in results[str(versions)].items():
            line(name, f"{value:,.3f}" if isinstance(value, float) else f"{value:,}")
    write(arguments.out, results, {})


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The command `prompts`."""
    parser = commands.add_parser("prompts", help=prompts.__doc__)
    parser.add_argument("--versions", type=int, nargs="+", default=[10, 100_000])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", help="file for the raw numbers (JSON)")
    parser.set_defaults(run=prompts)
