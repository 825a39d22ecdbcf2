"""A storage folder that is moved, renamed or copied to another machine: everything in it is found where it is then."""

from __future__ import annotations

import json
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_tracking import client, history, new_database, runs

from ptuning import storage
from ptuning.config import PLACES, Experiment, parse_experiment
from ptuning.data.task import load_task
from ptuning.errors import UserError
from ptuning.model.base import find_base
from ptuning.searching.space import key_of
from ptuning.searching.trial_store import TrialRecord, TrialStore
from ptuning.tracking.client import artifact_place, default_artifact_root, default_uri
from ptuning.tracking.outbox import Outbox
from ptuning.tracking.tracker import Tracker
from ptuning.tracking.uploader import ship_leftovers
from ptuning.training.result import TrainResult
from ptuning.training.run_setup import check_run_name, run_contents, write_run

pytestmark = [pytest.mark.fast, pytest.mark.filterwarnings("ignore::DeprecationWarning")]


def at(experiment: Experiment, folder: Path) -> Experiment:
    """The experiment with its rows and its storage below another folder."""
    plain = experiment.model_dump()
    for split in ("train", "validation", "test"):
        plain["data"][split] = str(folder / "toy" / Path(plain["data"][split]).name)
    plain["compute"]["storage"] = str(folder / "runs")
    return parse_experiment(plain)


@pytest.fixture
def finished(toy_task: SimpleNamespace) -> tuple[Experiment, Path]:
    """A finished run as `execute_run` records it, and the folder that holds its storage and its rows."""
    experiment = parse_experiment(toy_task.experiment)
    folder = storage.join(experiment.compute.storage, experiment.name)
    base = find_base(experiment.model)
    contents = run_contents(experiment, base, load_task(experiment, base))
    result = TrainResult(
        experiment=experiment, run_id="r", folder=f"{folder}/soft_prompt", steps=20, best_step=20, metrics={"test_loss": 1.0}
    )
    storage.write_folder(f"{folder}/soft_prompt", {"a": b""})
    write_run(folder, experiment, "finished", result.as_json(), contents=contents)
    return experiment, toy_task.folder.parent


def contents_of(experiment: Experiment) -> dict[str, str]:
    base = find_base(experiment.model)
    return run_contents(experiment, base, load_task(experiment, base))


def test_a_finished_run_is_found_where_it_is_now(finished: tuple[Experiment, Path], tmp_path: Path) -> None:
    before, above = finished
    now = at(before, tmp_path / "else where")
    for name in ("toy", "runs"):
        shutil.copytree(above / name, tmp_path / "else where" / name)
        shutil.rmtree(above / name)
    folder = str(tmp_path / "else where" / "runs" / "toy")
    assert str(above / "runs") not in json.dumps(json.loads(storage.read_file(folder, "run.json"))["summary"])
    assert check_run_name(now, folder, resume=True) is None  # other places: what is there has to be read first
    summary = check_run_name(now, folder, resume=True, contents=contents_of(now))
    assert summary is not None
    assert TrainResult.read(summary, now).folder == f"{folder}/soft_prompt"


def test_other_rows_are_refused_at_any_place(finished: tuple[Experiment, Path], tmp_path: Path) -> None:
    experiment, above = finished
    folder = str(above / "runs" / "toy")
    rows = (above / "toy" / "train.jsonl").read_text().splitlines(keepends=True)
    shutil.copytree(above / "toy", tmp_path / "b" / "toy")
    (tmp_path / "b" / "toy" / "train.jsonl").write_text("".join(rows[1:]))
    for where in (experiment, at(experiment, tmp_path / "b")):
        (above / "toy" / "train.jsonl").write_text("".join(rows[1:]))
        with pytest.raises(UserError, match=r"cannot be resumed with another data\.train .*; undo the change, or start"):
            check_run_name(where, folder, resume=True, contents=contents_of(where))


def test_what_has_changed_is_shown_with_the_way_to_go_on(finished: tuple[Experiment, Path]) -> None:
    experiment, above = finished
    folder = above / "runs" / "toy"
    more = experiment.model_copy(update={"train": experiment.train.model_copy(update={"steps": 40})})
    with pytest.raises(UserError) as refused:
        check_run_name(more, str(folder), resume=True)
    assert str(refused.value) == (
        f"{folder}: cannot be resumed with another train.steps (20 before, 40 now); undo the change, or start another run with "
        f'name=toy-2 (from its soft prompt with prompt.init="soft-prompt" prompt.init_from={folder}/soft_prompt)'
    )


def test_a_record_of_an_earlier_version_keeps_what_new_settings_did_then(finished: tuple[Experiment, Path]) -> None:
    experiment, above = finished
    folder = above / "runs" / "toy"
    record = json.loads((folder / "run.json").read_text())
    del record["experiment"]["data"]["special_tokens"], record["experiment"]["train"]["starts"], record["contents"]
    record["summary"]["soft_prompt"] = "/old/place/runs/toy/soft_prompt"
    (folder / "run.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r'another data\.special_tokens \("tokens" before, "text" now\)'):
        check_run_name(experiment, str(folder), resume=True)
    same = experiment.model_copy(update={"data": experiment.data.model_copy(update={"special_tokens": "tokens"})})
    summary = check_run_name(same, str(folder), resume=True)
    assert summary is not None and TrainResult.read(summary, same).folder == f"{folder}/soft_prompt"


def test_trials_are_found_below_the_folder_of_their_search(tmp_path: Path) -> None:
    before, now = tmp_path / "runs" / "find", tmp_path / "moved" / "find"
    store = TrialStore(str(before))
    store.add(TrialRecord("t000", "k", {}, f"{before}/trials/t000", soft_prompt=f"{before}/trials/t000/soft_prompt"))
    store.add(TrialRecord("t001", "l", {}, f"{before}/trials/t001/1"))
    now.parent.mkdir()
    before.rename(now)
    assert str(tmp_path) not in (now / "ledger.json").read_text()
    for _ in range(2):
        entries = TrialStore(str(now)).entries
        assert (
            entries["t000"].folder == f"{now}/trials/t000" and entries["t000"].soft_prompt == f"{now}/trials/t000/soft_prompt"
        )
        assert entries["t001"].folder == f"{now}/trials/t001/1" and entries["t001"].soft_prompt is None
        record = json.loads((now / "ledger.json").read_text())  # an earlier version wrote the whole path
        for trial in record["trials"]:
            trial |= {key: f"/old/runs/find/{trial[key]}" for key in ("folder", "soft_prompt") if trial[key]}
        (now / "ledger.json").write_text(json.dumps(record))


def test_places_are_settings_and_do_not_tell_trials_apart(toy_task: SimpleNamespace) -> None:
    tables = parse_experiment(toy_task.experiment).model_dump(mode="json")
    for key in PLACES:
        table, _, name = key.partition(".")
        assert name in tables[table]
        changed = {**tables, table: {**tables[table], name: "elsewhere"}}
        assert key_of(changed) == key_of(tables)
    assert key_of({**tables, "train": {**tables["train"], "steps": 1}}) != key_of(tables)


def test_records_that_wait_are_sent_from_the_new_place(tmp_path: Path) -> None:
    """The database was created in the old one, and some records were sent there."""
    before, now = tmp_path / "runs", tmp_path / "b" / "moved"
    before.mkdir()
    new_database(before)
    uri = default_uri(before)
    tracker = Tracker(uri, "tests", default_artifact_root(before), before / "toy" / "tracking", "toy")
    tracker.metrics({"loss": 1.0}, 1)
    assert tracker.flush(60) == 0
    with closing(sqlite3.connect(before / "mlflow.db")) as other:  # what comes now has to wait
        other.execute("BEGIN EXCLUSIVE")
        tracker.metrics({"loss": 2.0}, 2)
        tracker.artifact_bytes("soft_prompt/card.json", b"{}")
        tracker.finish("FINISHED")
        assert tracker.close(0)
        other.rollback()
    tracker._thread.join(60)
    now.parent.mkdir()
    before.rename(now)
    there = default_uri(now)
    outbox = Outbox(now / "toy" / "tracking")
    assert outbox.about["uri"] == "sqlite:../../mlflow.db" and outbox.belongs_to(there)
    assert 0 < outbox.sent(there).offset < outbox.size()
    assert ship_leftovers(now, there) == 0
    (run,) = runs(there)
    assert run.info.status == "FINISHED" and history(there, run.info.run_id, "loss") == [(1, 1.0), (2, 2.0)]
    place = Path(artifact_place(client(there), run.info.run_id).removeprefix("file://"))
    assert place.is_relative_to(now) and (place / "soft_prompt" / "card.json").read_bytes() == b"{}"
    assert not outbox.belongs_to("sqlite:////elsewhere/mlflow.db") and not before.exists()
