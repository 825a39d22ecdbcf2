"""`ptuning top`: what it says of finished, running and interrupted runs, searches, jobs, and a server."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_doctor import closed_port
from typer.testing import CliRunner

from ptuning import storage
from ptuning.activity import SILENT, Activity, Watcher
from ptuning.cli.app import app
from ptuning.config import parse_experiment
from ptuning.searching.trial_store import TrialRecord, TrialStore
from ptuning.training import lease
from ptuning.training.checkpoint import save
from ptuning.training.run_setup import write_run
from ptuning.tuning.job_store import JobStore, Progress
from ptuning.tuning.jobs import JobRecord, Trial

pytestmark = pytest.mark.fast


@pytest.fixture
def runs(toy_task: SimpleNamespace) -> SimpleNamespace:
    """A storage folder, and what writes runs there as their drivers do."""
    folder = toy_task.experiment["compute"]["storage"]

    def write(name: str, status: str = "running", summary: dict[str, Any] | None = None, kind: str = "train") -> str:
        place = storage.join(folder, name)
        experiment = parse_experiment(toy_task.experiment | {"name": name, "search": {"trials": 3}})
        write_run(place, experiment, status, summary, kind)
        return place

    return SimpleNamespace(folder=folder, write=write)


def look(folder: str) -> dict[str, Activity]:
    return {each.name: each for each in Watcher(folder).look()}


def test_runs_by_their_state(runs: SimpleNamespace) -> None:
    runs.write("done", "finished", {"steps": 20, "metrics": {"test_accuracy": 0.75}, "soft_prompt": runs.folder})
    runs.write("broken", "failed")
    place = runs.write("going")
    save(storage.join(place, "checkpoints"), 10, {}, {"step": 10, "best": {"accuracy": 0.5, "loss": 0.7}})
    assert look(runs.folder)["going"].state == "interrupted", "nobody holds its lease"
    with lease.held(place, print):
        found = Watcher(runs.folder).look()
    assert [(each.name, each.state, each.progress, each.best) for each in found] == [
        ("broken", "failed", "0 of 20 steps", ""),
        ("going", "running", "10 of 20 steps", "accuracy 0.500"),
        ("done", "finished", "20 of 20 steps", "test accuracy 0.750"),
    ]


def test_a_driver_on_another_machine_is_lost_when_it_renews_nothing(runs: SimpleNamespace) -> None:
    place = runs.write("far")
    record = {"token": "a", "host": "elsewhere", "pid": 1, "born": 0, "place": "elsewhere", "since": "", "beat": 1}
    watcher = Watcher(runs.folder)
    states = []
    for number in range(3 * SILENT + 8):
        beat = min(number, 3)
        storage.write_file(place, lease.FILE, json.dumps(record | {"beat": beat}).encode())
        states += [each.state for each in watcher.look()]
    assert states[:6] == ["running"] * 6 and states[-1] == "interrupted"


def test_searches_and_jobs(runs: SimpleNamespace) -> None:
    place = runs.write("wide", kind="search")
    store = TrialStore(place)
    for number, status in enumerate(("finished", "stopped", "running")):
        result = {"step": 10, "values": {"accuracy": 0.5 + number / 10}, "time_ms": 0}
        store.add(TrialRecord(f"t00{number}", "key", {}, place, status=status, results=[result]))  # type: ignore[arg-type]
    job = JobRecord("ftjob-" + "a" * 24, "local", 1, "base", "base", "file-1", 0, {}, {}, suffix="mine", status="running")
    job.trials.append(Trial("run", {}, 100, 0.1, step=30))
    JobStore(storage.join(runs.folder, "tuning")).write(job, Progress())
    found = look(runs.folder)
    assert (found["wide"].kind, found["wide"].progress, found["wide"].best) == ("search", "2 of 3 trials", "accuracy 0.700")
    mine = found[f"{job.id} mine"]
    assert (mine.kind, mine.state, mine.progress) == ("job", "running", "30 of 100 steps")


def test_on_the_command_line(runs: SimpleNamespace, tmp_path: Path) -> None:
    runs.write("broken", "failed")
    nobody = f"http://127.0.0.1:{closed_port()}/v1"
    done = CliRunner().invoke(app, ["top", "--storage", runs.folder, "--url", nobody])
    assert done.exit_code == 0, done.stderr
    assert "broken" in done.stdout and f"server {nobody}: no answer" in done.stdout
    told = json.loads(CliRunner().invoke(app, ["top", "--storage", runs.folder, "--json"]).stdout)
    assert [each["name"] for each in told["activities"]] == ["broken"]
    empty = CliRunner().invoke(app, ["top", "--storage", str(tmp_path / "none")])
    assert "nothing has run in this storage folder" in empty.stdout
