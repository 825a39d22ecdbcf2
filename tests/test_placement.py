"""Where a run puts its base: decided once in the driver, the same when it is resumed. What is decided: `test_plan`; what two
workers do then: `test_zero`."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import ray
from support.training import experiment

from ptuning.cluster import node_memory
from ptuning.cluster.node_memory import WorkerMemory, worker_memory
from ptuning.data.task import load_task
from ptuning.model.base import find_base
from ptuning.settings.model import ModelConfig
from ptuning.settings.training import ZeroConfig
from ptuning.training import base_placement
from ptuning.training.base_placement import place_base, record

pytestmark = pytest.mark.fast

GB = 10**9


def scaling(workers: Any, gpus: bool = False) -> Any:
    return SimpleNamespace(num_workers=workers, use_gpu=gpus, resources_per_worker={"GPU": 1} if gpus else {"CPU": 1})


@pytest.fixture
def place(toy_task: SimpleNamespace, tiny_base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    base = find_base(ModelConfig(path=str(tiny_base_folder)))
    task = load_task(experiment(toy_task), base)

    def place(workers: Any, memory: float | None, before: Any = None, **settings: Any) -> tuple[ZeroConfig, str]:
        known = None if memory is None else WorkerMemory(int(memory * GB), 8)
        monkeypatch.setattr(base_placement, "worker_memory", lambda *_: known)
        return place_base(experiment(toy_task, **settings), base, task, scaling(workers), before=before)

    return place


def test_a_run_puts_its_base_where_it_fits(place: Any) -> None:
    whole, line = place(2, 4)
    assert whole.stage == 0 and line == "base: whole on each of 2 workers, nothing is gathered"
    assert place(1, None)[0].stage == 0  # nothing is planned for one worker
    tight, line = place(2, 0.5)
    assert tight.stage == 3 and line.startswith("base: partitioned over 2 workers")
    assert place((1, 2), 4)[0].stage == 0 and place((2, 4), 0.5)[0].stage == 3
    unknown, line = place(2, None)
    assert unknown.stage == 3 and line.endswith("because a node does not tell its memory")
    asked, line = place(2, 4, zero={"stage": 3})
    assert asked == ZeroConfig(stage=3) and line == ""


def test_a_resumed_run_keeps_its_base_where_it_was_or_says_so(place: Any) -> None:
    before = record(*place(2, 4), scaling(2))
    kept, line = place(2, 0.5, before)  # less memory is free now, but the base was there
    assert kept.stage == 0 and line == before["line"]
    other, line = place(4, 0.5, before)
    assert other.stage == 3 and line.endswith("it was whole on every worker with 2 workers")
    asked, _ = place(2, 4, before, zero={"stage": 3})
    assert asked.stage == 3


def test_the_memory_of_workers_is_that_of_the_smallest(monkeypatch: pytest.MonkeyPatch) -> None:
    node = {"Alive": True, "NodeID": "one", "Resources": {"CPU": 4.0, "GPU": 2.0}}
    monkeypatch.setattr(ray, "nodes", lambda: [node])
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=12 * GB))
    assert worker_memory(2, {"CPU": 1.0}) == WorkerMemory(6 * GB, 2)
    assert worker_memory(2, {"CPU": 1.0}, groups=2) == WorkerMemory(3 * GB, 2)
    monkeypatch.setattr(node_memory, "own_memory", lambda gpus: [80 * GB, 40 * GB] if gpus else [12 * GB])
    assert worker_memory(2, {"CPU": 1.0, "GPU": 1}) == WorkerMemory(40 * GB, 2)
    monkeypatch.setattr(node_memory, "own_memory", lambda gpus: [])
    assert worker_memory(2, {"CPU": 1.0, "GPU": 1}) is None
