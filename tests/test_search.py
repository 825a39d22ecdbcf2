"""A search on a real Ray cluster: two workers, ZeRO-3, Tune trials in slots, MLflow, crashes."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import worker_killed
from typer.testing import CliRunner

from ptuning.cli.app import app
from ptuning.config import parse_experiment
from ptuning.errors import RunFailed
from ptuning.model import soft_prompt
from ptuning.searching.run import run_search
from ptuning.searching.trial_store import TrialRecord

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("local_ray")]

KILLS = int(os.environ.get("PTUNING_KILLS", "1"))
"""How often the driver is killed, in `make test-all` three times; PTUNING_KILLS=5 kills a search of 16 trials five times
(5 minutes on two cores)."""


@pytest.fixture
def tables(toy_task: SimpleNamespace) -> dict[str, Any]:
    toy_task.experiment["compute"]["workers"] = 2
    toy_task.experiment["zero"] = {"stage": 3}
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


def search(tables: dict[str, Any], resume: bool = False) -> tuple[dict[str, Any], list[TrialRecord], list[str]]:
    shown: list[list[TrialRecord]] = []
    lines: list[str] = []
    summary = run_search(parse_experiment(tables), resume=resume, show=shown.append, say=lines.append).as_json()
    return summary, shown[-1], lines


def children(tables: dict[str, Any]) -> list[Any]:
    """The runs of the trials in MLflow."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tables['compute']['storage']}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("ptuning").experiment_id])
    [parent] = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    others = [run for run in runs if run is not parent]
    assert all(run.data.tags["mlflow.parentRunId"] == parent.info.run_id for run in others)
    return others


@pytest.mark.nightly
@pytest.mark.timeout(480)
def test_pbt_lets_a_trial_go_on_from_a_better_one(tables: dict[str, Any]) -> None:
    tables["search"] |= {"trials": 3, "scheduler": "pbt", "learning_rate": [0.0001, 0.3], "length": [10]}
    tables["train"] |= {"steps": 80}
    _, entries, _ = search(tables)
    assert len(entries) == 3 and {entry.status for entry in entries} == {"finished"}
    exploited = [entry for entry in entries if Path(entry.folder).parent.name == entry.run]
    assert exploited and all(entry.step == 80 for entry in entries)


@pytest.mark.nightly
@pytest.mark.timeout(480)
def test_a_trial_that_diverges_is_marked_and_the_others_go_on(tables: dict[str, Any]) -> None:
    source = torch.zeros(10, 32)
    source[0, 0] = 3e38  # finite in the file, not in the first layer
    card = soft_prompt.Card(name="x", base="x", length=10, width=32, content_hash=soft_prompt.content_hash(source))
    poison = str(Path(tables["compute"]["storage"]) / "poison")
    soft_prompt.SoftPrompt(source, card).save(poison)
    tables["prompt"] |= {"init": "soft-prompt", "init_from": poison}
    tables["search"] |= {"trials": 2, "learning_rate": [0.05, 0.05], "algorithm": "grid", "length": [10]}
    tables["search"] |= {"init": ["vocabulary", "soft-prompt"], "finalists": 1, "seeds": 1, "scheduler": "fifo"}
    summary, entries, _ = search(tables)
    good, failed = sorted(entries, key=lambda entry: entry.values["prompt.init"], reverse=True)
    assert failed.status == "failed" and "lower train.learning_rate" in str(failed.message)
    assert good.status == "finished" and summary["trials"] == {"failed": 1, "finished": 1}
    assert {run.data.tags["ptuning.trial"]: run.info.status for run in children(tables)}[failed.run] == "FAILED"

    tables |= {"name": "hopeless"}
    tables["search"] |= {"length": [9, 10], "init": ["soft-prompt"]}
    with pytest.raises(RunFailed, match="all 2 trials failed, the first with: t00"):
        search(tables)


@pytest.mark.nightly
@pytest.mark.timeout(480)
def test_a_killed_worker_costs_the_search_no_trial(tables: dict[str, Any]) -> None:
    tables["search"] |= {"scheduler": "fifo", "trials": 4, "finalists": 1, "seeds": 1}
    ledger = Path(tables["compute"]["storage"]) / "toy" / "ledger.json"
    with worker_killed(lambda: any(entry["results"] for entry in _entries(ledger))):
        summary, entries, _ = search(tables)
    assert summary["trials"] == {"finished": 4}
    for entry in entries:
        assert [result["step"] for result in entry.results] == [10, 20, 30, 40]
    assert len(children(tables)) == 4


def test_a_search_under_asha_tests_and_tracks_its_winner(
    in_cluster: None, tables: dict[str, Any], write_toml: Callable[..., Path]
) -> None:
    tables["compute"]["workers"] = 1
    del tables["zero"]
    space = ['search.space.train.optimizer=["adamw", "adafactor"]', "search.space.train.clip=[0.5, 2.0]"]
    done = CliRunner().invoke(app, ["search", str(write_toml(tables)), *space, "--json"])
    assert done.exit_code == 0, (done.stderr, done.exception)
    check(tables, json.loads(done.stdout.splitlines()[-1]))
    values = [entry["values"] for entry in _entries(Path(tables["compute"]["storage"]) / "toy" / "ledger.json")]
    assert {each["train.optimizer"] for each in values} == {"adamw", "adafactor"}
    assert all(0.5 <= each["train.clip"] <= 2.0 for each in values)


def check(tables: dict[str, Any], summary: dict[str, Any]) -> None:
    """Every trial counts once, with every evaluation; the winner is tested, registered, tracked and reported."""
    ledger = Path(tables["compute"]["storage"]) / "toy" / "ledger.json"
    entries = _entries(ledger)
    trials = [entry for entry in entries if not entry["finalist"]]
    assert len(trials) == tables["search"]["trials"] == sum(summary["trials"].values())
    assert len({entry["key"] for entry in trials}) == len(trials)
    assert {entry["status"] for entry in trials} <= {"finished", "stopped"}
    for entry in entries:
        steps = [result["step"] for result in entry["results"]]
        assert (
            steps == sorted(set(steps)) and steps[0] == 10 and all(b - a == 10 for a, b in zip(steps, steps[1:], strict=False))
        )

    loaded = soft_prompt.load(summary["soft_prompt"])
    assert loaded.card.name == "toy" and loaded.card.metrics == summary["metrics"] and summary["registered"] == "toy:1"
    assert summary["metrics"]["test_accuracy"] > 0.9
    runs = children(tables)
    assert sorted(run.data.tags["ptuning.trial"] for run in runs) == sorted(entry["run"] for entry in entries)
    assert all(run.info.status == "FINISHED" for run in runs)
    report = ledger.parent / "report"
    assert {path.name for path in report.iterdir()} == {"leaderboard.csv", "budget.csv", "landscape.png", "budget.png"}


@pytest.mark.nightly
@pytest.mark.timeout(300 + 180 * KILLS)
def test_a_search_with_killed_drivers_gives_every_trial_once(
    in_cluster: None, tables: dict[str, Any], write_toml: Callable[..., Path]
) -> None:
    many = 16 if KILLS > 3 else 6
    tables["search"] |= {"trials": many}
    file = write_toml(tables)
    ledger = Path(tables["compute"]["storage"]) / "toy" / "ledger.json"
    command = [sys.executable, "-m", "ptuning", "search", str(file), "--json"]
    draw = random.Random(0)
    done: dict[str, float] = {}
    for life in range(KILLS):
        driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        target = 2 + 5 * life
        while driver.poll() is None and len([each for e in _entries(ledger) for each in e["results"]]) < target:
            time.sleep(0.05)
        time.sleep(draw.uniform(0, 1))
        driver.kill()
        driver.wait()
        for entry in _entries(ledger):
            if entry["status"] == "finished" and entry["soft_prompt"]:
                manifest = ledger.parent / entry["soft_prompt"] / "manifest.json"
                done.setdefault(entry["run"], manifest.stat().st_mtime)
        command = [*command[:-1], "--resume", "--json"] if life == 0 else command
    moved = Path(tables["compute"]["storage"]).rename(file.parent / "moved runs")
    tables["compute"]["storage"], ledger = str(moved), moved / "toy" / "ledger.json"
    write_toml(tables)
    last = CliRunner().invoke(app, ["search", str(file), "--resume", "--json"])
    assert last.exit_code == 0, (last.stderr, last.exception)
    summary = json.loads(last.stdout.splitlines()[-1])
    check(tables, summary)
    entries = _entries(ledger)
    for run, written in done.items():
        found = next(entry for entry in entries if entry["run"] == run)
        if run != summary["winner"]["trial"]:  # the winner is saved again, with its test result
            assert (ledger.parent / found["soft_prompt"] / "manifest.json").stat().st_mtime == written


def _entries(ledger: Path) -> list[dict[str, Any]]:
    return json.loads(ledger.read_text())["trials"] if ledger.exists() else []
