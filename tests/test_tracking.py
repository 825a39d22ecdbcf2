"""Tracking against a real MLflow: sqlite, and a real server that is up, down, silent or slow. No mocks."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow.utils.file_utils import local_file_uri_to_path
from sqlalchemy import make_url

from ptuning.errors import UserError
from ptuning.tracking.client import _create_database, database, default_artifact_root, default_uri
from ptuning.tracking.provenance import provenance
from ptuning.tracking.tracker import Tracker
from ptuning.tracking.uploader import ship_leftovers

ROOT = Path(__file__).parent.parent
# MLflow 3.17 uses SQLAlchemy's noload, deprecated in 2.1 (store/tracking/sqlalchemy_store.py).
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@functools.cache
def own_folder() -> tempfile.TemporaryDirectory[str]:
    """Gone when this process ends."""
    return tempfile.TemporaryDirectory(prefix="ptuning-mlflow-")


@functools.cache
def migrated() -> Path:
    """A database that MLflow has migrated once: it takes seconds."""
    path = Path(own_folder().name) / "mlflow.db"
    _create_database(path)
    return path


def new_database(folder: Path) -> None:
    """An empty tracking store in a storage folder, as if it had been made there."""
    shutil.copy(migrated(), folder / "mlflow.db")
    with contextlib.closing(sqlite3.connect(folder / "mlflow.db")) as database, database:
        place = f"{default_artifact_root(folder)}/0"
        changed = database.execute("UPDATE experiments SET artifact_location = ? WHERE experiment_id = 0", (place,))
        assert changed.rowcount == 1


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    new_database(tmp_path)
    return tmp_path


def track(storage: Path, name: str = "run", uri: str | None = None, **options: Any) -> Tracker:
    spool = storage / name / "tracking"
    return Tracker(uri or default_uri(storage), "tests", default_artifact_root(storage), spool, name, **options)


def client(uri: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def runs(uri: str) -> list[Any]:
    from mlflow.entities import ViewType

    mlflow = client(uri)
    experiment = mlflow.get_experiment_by_name("tests")
    return [] if experiment is None else list(mlflow.search_runs([experiment.experiment_id], run_view_type=ViewType.ALL))


def history(uri: str, run_id: str | None, key: str) -> list[tuple[int, float]]:
    return sorted((point.step, point.value) for point in client(uri).get_metric_history(run_id, key))


def read(uri: str, run_id: str | None, name: str, folder: Path) -> bytes:
    path = client(uri).download_artifacts(run_id, name, str(folder))
    return Path(path).read_bytes()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def server(folder: Path, port: int) -> Iterator[str]:
    """A real `mlflow server`, ended with everything it started."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/server.db", "--artifacts-destination", f"{folder}/served"]
    with (folder / "server.log").open("ab") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, start_new_session=True)
    uri = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: answers(uri), 90, f"the server did not start, see {folder}/server.log")
        yield uri
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # its own session: uvicorn's workers and nothing else
        process.wait()


def answers(uri: str) -> bool:
    import requests

    try:
        return requests.get(f"{uri}/health", timeout=1).ok
    except requests.RequestException:
        return False


def wait_until(condition: Any, seconds: float, otherwise: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.1)


def test_a_run_holds_everything(storage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = default_uri(storage)
    tracker = track(storage)
    tracker.params({"name": "sms", "train": {"learning_rate": 0.02, "clip": None}, "labels": ["ham", "spam"]})
    tracker.tags({"mood": "good"})
    for step in range(1, 1501):
        tracker.metrics({"loss": 1 / step, "system/rank0_rss_mb": 100.0}, step, timestamp_ms=1_700_000_000_000 + step)
    tracker.metrics({"f1 of 'ham & eggs'": 0.5}, 1)
    tracker.dataset("sms", "builtin:sms/train", "sha256:" + "ab" * 32, "training", 4000)
    tracker.dataset("snips", "hub:org/snips:test", "cd" * 32, "test", 7)
    tracker.artifact_bytes("soft_prompt/card.json", b"{}")
    tracker.artifact_bytes("soft_prompt/inner/more.txt", b"more")
    tracker.artifact_bytes("figures/loss.png", b"\x89PNG")
    tracker.json("experiment.json", {"name": "sms"})
    tracker.table("predictions", ["input", "score"], [["hello", 0.5], ["bye", math.nan]])
    tracker.finish("FINISHED")
    assert tracker.close(60) == 0

    run = client(uri).get_run(tracker.run_id)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "run")
    assert run.data.params == {
        "name": "sms",
        "train.learning_rate": "0.02",
        "train.clip": "null",
        "labels": '["ham", "spam"]',
    }
    assert run.data.tags["mood"] == "good"
    assert run.data.tags["ptuning.run_key"] == tracker.run_key
    assert history(uri, tracker.run_id, "loss") == [(step, 1 / step) for step in range(1, 1501)]
    assert run.data.metrics["f1 of _ham _ eggs_"] == 0.5
    datasets = {entry.dataset.name: entry for entry in run.inputs.dataset_inputs}
    assert datasets["sms"].dataset.digest == "ab" * 18
    assert json.loads(datasets["sms"].dataset.profile) == {"num_rows": 4000, "fingerprint": "sha256:" + "ab" * 32}
    assert [tag.value for tag in datasets["snips"].tags] == ["test"]
    assert json.loads(datasets["snips"].dataset.source)["path"] == "org/snips"
    assert read(uri, tracker.run_id, "soft_prompt/inner/more.txt", tmp_path) == b"more"
    assert read(uri, tracker.run_id, "figures/loss.png", tmp_path) == b"\x89PNG"
    assert json.loads(read(uri, tracker.run_id, "experiment.json", tmp_path)) == {"name": "sms"}
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)  # load_table asks the default store, whatever its client's (3.17)
    table = client(uri).load_table(run.info.experiment_id, "predictions.json", [tracker.run_id])
    assert table["input"].tolist() == ["hello", "bye"]
    assert Path(run.info.artifact_uri.removeprefix("file://")).is_relative_to(storage / "mlartifacts")
    assert not (storage / "run" / "tracking" / "refused.jsonl").exists()


def test_resume_continues_the_run_and_repeats_no_point(storage: Path) -> None:
    uri = default_uri(storage)
    first = track(storage)
    first.params({"lr": 0.1, "steps": 10})
    for step in range(1, 8):
        first.metrics({"loss": float(step)}, step)
    first.finish("FAILED")
    assert first.close(60) == 0

    again = track(storage, parent=None)
    again.params({"lr": 0.1, "steps": 20})
    for step in range(5, 11):  # from the checkpoint at step 4
        again.metrics({"loss": float(step)}, step)
    again.finish("FINISHED")
    assert again.close(60) == 0

    assert (again.run_key, again.run_id) == (first.run_key, first.run_id)
    assert len(runs(uri)) == 1
    run = runs(uri)[0]
    assert run.info.status == "FINISHED"
    assert run.data.params == {"lr": "0.1", "steps": "10"}
    assert run.data.tags["ptuning.changed.steps"] == "20"
    assert history(uri, again.run_id, "loss") == [(step, float(step)) for step in range(1, 11)]


def test_shipping_everything_twice_changes_nothing(storage: Path, tmp_path: Path) -> None:
    uri = default_uri(storage)
    tracker = track(storage)
    tracker.params({"lr": 0.1})
    for step in range(1, 30):
        tracker.metrics({"loss": float(step), "bad": math.nan, "worse": math.inf}, step)
    tracker.dataset("sms", "train.jsonl", "ab" * 32, "training", 3)
    tracker.table("predictions", ["a"], [[1], [2]])
    tracker.finish("FINISHED")
    assert tracker.close(60) == 0
    (storage / "run" / "tracking" / "sent.json").unlink()  # the machine died before it was written

    assert ship_leftovers(storage, uri) == 0
    assert [run.info.run_id for run in runs(uri)] == [tracker.run_id]
    assert len(history(uri, tracker.run_id, "loss")) == 29
    bad = client(uri).get_metric_history(tracker.run_id, "bad")
    assert len(bad) == 29 and all(math.isnan(point.value) for point in bad)
    # MLflow keeps infinity as the largest double (SqlAlchemyStore.sanitize_metric_value).
    assert {value for _, value in history(uri, tracker.run_id, "worse")} == {sys.float_info.max}
    assert len(runs(uri)[0].inputs.dataset_inputs) == 1
    assert json.loads(read(uri, tracker.run_id, "predictions.json", tmp_path))["data"] == [[1], [2]]


def test_what_mlflow_refuses_is_put_aside_and_stops_nothing(storage: Path, caplog: pytest.LogCaptureFixture) -> None:
    uri = default_uri(storage)
    tracker = track(storage)
    tracker.metrics({"loss": 1.0}, 1)
    tracker.metrics({"../loss": 1.0}, 1)  # MLflow takes no such path
    tracker.metrics({"loss": 2.0}, 2)
    tracker._record({"kind": "artifact", "path": "files/never-written.txt", "folder": ""})
    tracker.finish("FINISHED")
    assert tracker.close(60) == 0
    assert history(uri, tracker.run_id, "loss") == [(1, 1.0), (2, 2.0)]
    refused = (storage / "run" / "tracking" / "refused.jsonl").read_text().splitlines()
    assert [json.loads(line)["record"]["kind"] for line in refused] == ["metrics", "artifact"]
    assert "refuses a record" in caplog.text and "never-written.txt no longer exists" in caplog.text


def test_long_values_are_cut_visibly_and_kept_whole(storage: Path, tmp_path: Path) -> None:
    tracker = track(storage)
    tracker.params({"data/input": "é" * 7000, "short": "x"})
    tracker.tags({"story": "t" * 9000})
    tracker.params({f"many.{number}": number for number in range(250)})
    assert tracker.close(60) == 0
    run = client(default_uri(storage)).get_run(tracker.run_id)
    assert len(run.data.params["data/input"]) <= 6000 and len(run.data.params) == 252
    assert run.data.params["data/input"].endswith("[... 7000 characters, whole in long_values]")
    assert run.data.tags["story"].endswith("[... 9000 characters, whole in long_values]")
    kept = read(default_uri(storage), tracker.run_id, "long_values/data_input.json", tmp_path)
    assert json.loads(kept) == {"data/input": "é" * 7000}


def test_children_find_their_parent(storage: Path) -> None:
    parent = track(storage, "search")
    child = track(storage, "trial", parent=parent.run_key)
    assert child.close(60) == 0 and parent.close(60) == 0
    run = client(default_uri(storage)).get_run(child.run_id)
    assert run.data.tags["mlflow.parentRunId"] == parent.run_id


def test_a_run_deleted_in_mlflow_is_sent_again_whole(storage: Path) -> None:
    uri = default_uri(storage)
    tracker = track(storage)
    tracker.metrics({"loss": 1.0}, 1)
    tracker.flush(60)
    gone = tracker.run_id
    client(uri).delete_run(gone)
    tracker.metrics({"loss": 2.0}, 2)
    assert tracker.close(60) == 0
    assert tracker.run_id not in (None, gone)
    assert history(uri, tracker.run_id, "loss") == [(1, 1.0), (2, 2.0)]


def test_a_killed_process_loses_nothing_and_is_closed_as_killed(storage: Path) -> None:
    script = f"""
        import os, signal
        from pathlib import Path
        from ptuning.tracking.client import *
        from ptuning.tracking.tracker import *
        storage = Path({str(storage)!r})
        tracker = Tracker(default_uri(storage), "tests", None, storage / "run" / "tracking", "run")
        for step in range(100):
            tracker.metrics({{"loss": 1.0}}, step)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL
    with (storage / "run" / "tracking" / "events.jsonl").open("a") as events:
        events.write('{"kind": "metrics", "st')  # as a machine without power leaves it
    uri = default_uri(storage)
    assert ship_leftovers(storage, uri) == 0
    (run,) = runs(uri)
    assert run.info.status == "KILLED"
    assert len(history(uri, run.info.run_id, "loss")) == 100

    resumed = track(storage)
    resumed.metrics({"loss": 1.0}, 100)
    assert resumed.flush(60) == 0
    assert client(uri).get_run(run.info.run_id).info.status == "RUNNING"
    with pytest.raises(UserError, match="another process is writing"):
        track(storage)
    assert ship_leftovers(storage, uri) == 0  # leaves it alone: it is alive
    assert client(uri).get_run(run.info.run_id).info.status == "RUNNING"
    resumed.close(10)


@pytest.mark.slow
def test_two_processes_create_one_database_and_one_experiment(tmp_path: Path) -> None:
    script = f"""
        import sys
        from pathlib import Path
        from ptuning.tracking.client import *
        from ptuning.tracking.tracker import *
        storage = Path({str(tmp_path)!r})
        name = sys.argv[1]
        tracker = Tracker(default_uri(storage), "tests", default_artifact_root(storage), storage / name, name)
        tracker.metrics({{"loss": 1.0}}, 1)
        tracker.finish("FINISHED")
        print(tracker.close(90))
    """
    command = [sys.executable, "-W", "error::RuntimeWarning", "-c", textwrap.dedent(script)]
    both = [
        subprocess.Popen([*command, name], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for name in ("a", "b")
    ]
    said = [process.communicate(timeout=120) for process in both]
    assert said == [("0\n", ""), ("0\n", "")], "all sent, and no chatter on stdout or stderr"
    assert sorted(run.info.run_name for run in runs(default_uri(tmp_path))) == ["a", "b"]
    assert not (tmp_path / "mlflow.db.new").exists()


@pytest.mark.slow
def test_server_down_at_start_killed_and_back(tmp_path: Path) -> None:
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    folder = tmp_path / "server"
    folder.mkdir()
    shutil.copy(migrated(), folder / "server.db")
    tracker = track(tmp_path, uri=uri)
    tracker.params({"lr": 0.1})
    steps = iter(range(1, 10_000))
    seconds = []

    def record(points: int) -> None:
        for _ in range(points):
            step = next(steps)
            start = time.perf_counter()
            tracker.metrics({"loss": 1 / step}, step)
            seconds.append(time.perf_counter() - start)
            time.sleep(0.002)

    record(200)
    assert tracker.run_id is None and tracker.flush(1) > 200
    with server(folder, port):
        assert tracker.flush(60) == 0 and tracker.run_id is not None
        record(200)
        assert tracker.flush(60) == 0
        assert len(history(uri, tracker.run_id, "loss")) == 400
        tracker.artifact_bytes("a.bin", bytes(1_000_000))
        record(100)
        time.sleep(0.55)  # killed while it is being told
    record(100)
    assert tracker.flush(1) > 0
    with server(folder, port):
        record(100)
        tracker.finish("FINISHED")
        assert tracker.close(60) == 0
        assert [step for step, _ in history(uri, tracker.run_id, "loss")] == list(range(1, 701))
        (run,) = runs(uri)
        assert run.info.status == "FINISHED" and run.info.artifact_uri.startswith("mlflow-artifacts:")
        assert read(uri, tracker.run_id, "a.bin", tmp_path) == bytes(1_000_000)
    assert sum(seconds) / len(seconds) < 0.005


@pytest.mark.nightly
@pytest.mark.slow
def test_server_that_never_answers_costs_only_the_deadline(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=64) as silent:
        port = silent.getsockname()[1]
        script = f"""
            import time
            from pathlib import Path
            from ptuning.tracking.client import *
            from ptuning.tracking.tracker import *
            uri, spool = "http://me:hunter2@127.0.0.1:{port}", Path({str(tmp_path / "run")!r})
            tracker = Tracker(uri, "tests", None, spool, "run")
            tracker.flush(4)
            start = time.perf_counter()
            for step in range(500):
                tracker.metrics({{"loss": 1.0, "rate": 2.0}}, step)
            each = (time.perf_counter() - start) / 500
            tracker.tags({{"uri": uri}})
            tracker.json("experiment.json", {{"uri": uri}})
            tracker.finish("FINISHED")
            start = time.perf_counter()
            unsent = tracker.close(3)
            print(each, unsent, time.perf_counter() - start)
        """
        start = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script)], cwd=ROOT, capture_output=True, text=True, timeout=110
        )
        whole = time.monotonic() - start
    each, unsent, closing = map(float, done.stdout.split())
    assert each < 0.005 and unsent == 504 and 2.9 < closing < 3.5
    assert whole < 60, "and the process ends although a request is still waiting"
    assert "hunter2" not in done.stdout + done.stderr
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"hunter2" in path.read_bytes()]

    down = f"http://me:hunter2@127.0.0.1:{port}"
    start = time.monotonic()
    assert ship_leftovers(tmp_path, down) == 504, "still down: they go on waiting"
    assert time.monotonic() - start < 15
    with server(tmp_path, port) as uri:
        assert ship_leftovers(tmp_path, uri) == 0 and not runs(uri), "tracked at another address: left alone"
        assert ship_leftovers(tmp_path, down) == 0
        (run,) = runs(uri)
        assert len(history(uri, run.info.run_id, "loss")) == 500
        assert run.info.status == "FINISHED"
        shown = json.loads(read(uri, run.info.run_id, "experiment.json", tmp_path))
        assert shown == {"uri": f"http://***@127.0.0.1:{port}"}


@pytest.mark.fast
def test_recording_is_cheap_while_the_thread_imports_mlflow(tmp_path: Path) -> None:
    tracker = track(tmp_path, uri=f"http://127.0.0.1:{free_port()}")
    start = time.perf_counter()
    for step in range(1000):
        tracker.metrics({"loss": 1.0, "accuracy": 0.5}, step)
    assert (time.perf_counter() - start) / 1000 < 0.005
    assert tracker.close(0) == 1001


@pytest.mark.fast
def test_threads_do_not_tear_lines(tmp_path: Path) -> None:
    tracker = track(tmp_path, uri=f"http://127.0.0.1:{free_port()}")
    threads = [
        threading.Thread(target=lambda key=key: [tracker.metrics({key: 1.0}, step) for step in range(200)]) for key in "abcd"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    tracker.close(0)
    lines = (tmp_path / "run" / "tracking" / "events.jsonl").read_text().splitlines()
    assert len([json.loads(line) for line in lines]) == 801


@pytest.mark.fast
def test_names_stay_inside(tmp_path: Path) -> None:
    tracker = track(tmp_path, uri=f"http://127.0.0.1:{free_port()}")
    for name in ("../x", "/etc/x", "a/../../x"):
        with pytest.raises(ValueError, match="use a relative name"):
            tracker.artifact_bytes(name, b"")
    tracker.close(0)


@pytest.mark.fast
def test_default_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert default_uri("runs") == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert default_artifact_root("runs") == f"file://{tmp_path}/runs/mlartifacts"
    assert default_artifact_root("s3://bucket/x") == "s3://bucket/x/mlartifacts"
    with pytest.raises(UserError) as error:
        default_uri("s3://bucket/x")
    assert str(error.value) == (
        "compute.storage: s3://bucket/x cannot hold the tracking store; set tracking.uri to an MLflow server"
    )


@pytest.mark.fast
def test_provenance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["ptuning", "train", "x.toml", "tracking.uri=http://me:secret@host"])
    monkeypatch.chdir(tmp_path)
    facts = provenance()
    assert facts["command"] == "ptuning train x.toml tracking.uri=http://***@host"
    assert facts["torch"].startswith("2.") and facts["python"].startswith("3.") and "git_commit" not in facts

    for command in ("init -q", "-c user.name=a -c user.email=a@b commit -q --allow-empty -m x"):
        subprocess.run(["git", *command.split()], check=True)
    assert len(provenance()["git_commit"]) == 40 and provenance()["git_dirty"] == "false"
    monkeypatch.setenv("PATH", "")
    assert "git_commit" not in provenance()


@pytest.mark.fast
def test_provenance_runs_no_command_of_the_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    marker = tmp_path.with_name(f"{tmp_path.name}-run")
    (tmp_path / "rows.txt").write_text("one")
    for command in ("init -q", "add rows.txt", "-c user.name=a -c user.email=a@b commit -q -m x"):
        subprocess.run(["git", *command.split()], check=True)
    (tmp_path / ".gitattributes").write_text("* filter=theirs\n")
    (tmp_path / "rows.txt").write_text("two")  # as long as before: git would compare what the filter makes of it
    script = f"touch {marker}; cat"
    settings = {"core.fsmonitor": script, "filter.theirs.clean": script, "filter.theirs.required": "true"}
    for name, value in settings.items():
        subprocess.run(["git", "config", name, value], check=True)
    assert provenance()["git_dirty"] == "true" and not marker.exists()
    subprocess.run(["git", "status"], check=True, capture_output=True)
    assert marker.exists(), "nothing was tested"


@pytest.mark.fast
@given(
    st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=20)
    | st.text(" #%4aF?&=:;@$~'\"", min_size=1)
)
def test_the_default_store_lies_in_its_storage_folder_or_is_refused(name: str) -> None:
    """As those read its addresses who open it."""
    folder = Path("/data") / name
    try:
        uri = default_uri(folder)
    except UserError as error:
        assert re.search("[?]|%[0-9a-fA-F]{2}", name) and str(folder) in str(error)
        return
    assert make_url(uri).database == str(folder / "mlflow.db") and database(uri) == folder / "mlflow.db"
    assert local_file_uri_to_path(default_artifact_root(folder)) == str(folder / "mlartifacts")
