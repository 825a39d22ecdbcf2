"""A search on a real Ray cluster: two workers, ZeRO-3, Tune trials in slots, MLflow, crashes."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from ptuning import soft_prompt
from ptuning.config import parse_experiment
from ptuning.ledger import Entry
from ptuning.search import run_search

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def tables(toy_task: SimpleNamespace) -> dict[str, Any]:
    toy_task.experiment["compute"]["workers"] = 2
    toy_task.experiment["train"] |= {"steps": 40, "evaluate_every": 10, "checkpoint_every": 10}
    toy_task.experiment["search"] = {
        "trials": 6,
        "slots": 3,
        "length": [2, 5, 10],
        "learning_rate": [0.001, 0.3],
        "finalists": 2,
        "seeds": 2,
    }
    return toy_task.experiment


def search(tables: dict[str, Any], resume: bool = False) -> tuple[dict[str, Any], list[Entry], list[str]]:
    shown: list[list[Entry]] = []
    lines: list[str] = []
    summary = run_search(parse_experiment(tables), resume=resume, show=shown.append, say=lines.append)
    return summary, shown[-1], lines


@pytest.mark.timeout(240)
def test_a_search_under_asha_finds_tests_and_tracks_its_winner(tables: dict[str, Any]) -> None:
    summary, entries, _ = search(tables)
    trials = [entry for entry in entries if not entry.finalist]
    assert len(trials) == 6 and {entry.status for entry in trials} <= {"finished", "stopped"}
    assert sum(summary["trials"].values()) == 6
    loaded = soft_prompt.load(summary["soft_prompt"])
    assert loaded.card.name == "toy" and loaded.card.metrics == summary["metrics"]
    assert summary["metrics"]["test_accuracy"] > 0.9

    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tables['compute']['storage']}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("ptuning").experiment_id])
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == summary["run_id"]]
    assert sorted(run.data.tags["ptuning.trial"] for run in children) == sorted(entry.run for entry in entries)
    assert len(runs) == len(children) + 1 and all(run.info.status == "FINISHED" for run in runs)
