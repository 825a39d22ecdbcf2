"""What breaks, on a real Ray cluster with real signals at exact instants: workers, drivers, nodes, disks, MLflow.

Every test also proves that the machine is clean afterwards. The same promises in other rooms' tests: laws 4 and 5
(`test_train`), damaged checkpoints (`test_storage`), MLflow down, silent and back (`test_tracking`), killed drivers and workers
of a search (`test_search`), bad rows (`test_data`).
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import ray
from conftest import REPOSITORY, shared_memory

from ptuning import storage
from ptuning.config import parse_experiment
from ptuning.errors import RunFailed, UserError
from ptuning.model import soft_prompt
from ptuning.searching import tuning
from ptuning.searching.run import run_search
from ptuning.searching.trial_store import TrialRecord
from ptuning.training.messages import Event
from ptuning.training.run import run_training

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("local_ray")]

KILLS = int(os.environ.get("PTUNING_KILLS", "1"))
"""How often a driver is killed, and whether a worker is once more."""

INSTANTS: Path
"""Where faults are planned, and where processes say that they have reached one."""


@pytest.fixture(scope="module", autouse=True)
def cluster(local_ray: Path) -> Iterator[None]:
    global INSTANTS
    INSTANTS = local_ray
    with pytest.MonkeyPatch.context() as patched:  # for clusters of their own, too
        patched.setenv("PTUNING_INSTANTS", str(INSTANTS))
        patched.setenv("PYTHONPATH", str(REPOSITORY / "tests" / "instants"), prepend=os.pathsep)
        yield
    plan()


@pytest.fixture(autouse=True)
def clean_machine(cluster: None) -> Iterator[None]:
    """After every fault: no process, no listening port, no shared memory and no placement group is left, all CPUs are free."""
    before = traces()
    yield
    deadline = time.monotonic() + 60
    gc.collect()  # an actor lives as long as somebody holds it: here, a test that failed
    began = time.monotonic()
    while left := {kind: found - before[kind] for kind, found in traces().items() if found - before[kind]}:
        assert time.monotonic() < deadline, left
        time.sleep(0.5)
    print(f"clean after {time.monotonic() - began:.1f} s")


def traces() -> dict[str, set[str]]:
    """What a run may leave behind. Ray's own: an actor of Ray Train that stays with the cluster, and idle workers, which wait
    for the next task."""
    processes, ports = set(), {str(each.laddr.port) for each in psutil.Process().net_connections() if each.status == "LISTEN"}
    for process in psutil.Process().children(recursive=True):
        try:
            title = " ".join(process.cmdline()).strip()
        except psutil.Error:
            continue
        if title and not re.match(r"ray::(IDLE|_Autoscaling)|.*multiprocessing.resource_tracker", title):
            processes.add(f"{process.pid} {title[:100]}")
    groups = {key for key, each in ray.util.placement_group_table().items() if each["state"] != "REMOVED"}
    free, whole = ray.available_resources(), ray.cluster_resources()
    taken = {kind for kind in ("CPU", "GPU") if free.get(kind, 0) < whole.get(kind, 0)}
    return {"processes": processes, "ports": ports, "placement groups": groups, "taken": taken, "/dev/shm": shared_memory()}


def plan(*instants: tuple[str, int, int, str]) -> None:
    """Let workers do something at (when, step, rank); forgets what was planned before."""
    for path in INSTANTS.iterdir():
        path.unlink()
    keys = ("when", "step", "rank", "do")
    (INSTANTS / "plan.json").write_text(json.dumps([dict(zip(keys, instant, strict=True)) for instant in instants]))


def happened(number: int) -> dict[str, Any]:
    return json.loads((INSTANTS / f"{number}.json").read_text())


@pytest.fixture
def tables(toy_task: SimpleNamespace) -> dict[str, Any]:
    plan()
    toy_task.experiment["compute"]["workers"] = 2
    toy_task.experiment["zero"] = {"stage": 3}
    for split in ("validation", "test"):
        del toy_task.experiment["data"][split]
    toy_task.experiment["train"] |= {"steps": 60, "learning_rate": 0.3, "checkpoint_every": 5}
    return toy_task.experiment


def start(
    tables: dict[str, Any], events: list[Event], *, resume: bool = False, said: list[str] | None = None, **changes: Any
) -> dict[str, Any]:
    say = print if said is None else said.append
    return run_training(parse_experiment(tables | changes), resume=resume, show=events.append, say=say).as_json()


def recoveries(events: list[Event], many: int) -> list[tuple[int, float]]:
    """For every planned fault: steps that were repeated, and seconds until training went on."""
    begins = [index for index, event in enumerate(events) if event.kind == "start"][1:]
    found = []
    for number, begin in zip(range(many), begins, strict=True):
        reached = max(event.step for event in events[:begin] if event.kind == "step")
        following = next(event for event in events[begin:] if event.kind == "step")
        assert following.step == events[begin].step + 1
        found.append((reached - events[begin].step, (following.time_ms - happened(number)["time_ms"]) / 1000))
    print("steps repeated, seconds to recover:", found)
    return found


def difference(one: Any, two: Any) -> float:
    first, second = (soft_prompt.load(each["soft_prompt"]).vectors for each in (one, two))
    return float((first - second).norm() / first.norm())


def survive(tables: dict[str, Any], undisturbed: dict[str, Any], *faults: tuple[str, int, int, str]) -> str:
    """Train with faults: little is repeated, the result is as without. What was said of the one that hung."""
    plan(*faults)
    events: list[Event] = []
    said: list[str] = []
    disturbed = start(tables, events, said=said, name=f"disturbed-{time.time_ns()}")  # several tests share the folder
    found = recoveries(events, len(faults))
    assert difference(undisturbed, disturbed) < 1e-6
    assert all(repeated <= 5 and seconds < 40 for repeated, seconds in found), found
    for number, (_, _, rank, what) in enumerate(faults):
        who = f"worker {rank} (pid {happened(number)['pid']} on {socket.gethostname()}) was killed or crashed"
        assert what != "kill" or any(line.startswith(f"warning: {who}") for line in said)
    return "".join(hangs(said))


@pytest.mark.timeout(300)
def test_a_killed_worker_costs_at_most_one_checkpoint_interval(finished_run: SimpleNamespace) -> None:
    """In the middle of a checkpoint."""
    assert survive(finished_run.tables, finished_run.summary, ("half-written", 15, 0, "kill")) == ""


@pytest.mark.nightly
@pytest.mark.timeout(600)
def test_killed_and_hung_workers_cost_at_most_one_checkpoint_interval(finished_run: SimpleNamespace) -> None:
    """A process that hangs in the middle of a step, and a kill that the other worker notices first: it waits in the
    all-reduce."""
    finished_run.tables["compute"]["hang_s"] = 4.0
    faults = ("backward", 13, 0, "kill"), ("forward", 28, 1, "sleep"), ("barrier", 43, 1, "kill")
    message = survive(finished_run.tables, finished_run.summary, *faults)
    assert message.count("no progress for") == 1
    assert f"worker 1 (pid {happened(1)['pid']} on {socket.gethostname()}) is stuck in reached (sitecustomize.py:" in message


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_more_instants(finished_run: SimpleNamespace) -> None:
    finished_run.tables["compute"] |= {"hang_s": 4.0, "max_failures": 4}
    faults = ("backward", 13, 1, "kill"), ("renamed", 20, 0, "kill"), ("barrier", 38, 0, "stop"), ("forward", 52, 0, "raise")
    message = survive(finished_run.tables, finished_run.summary, *faults)
    assert message.count("no progress for") == 1
    assert f"worker 0 (pid {happened(2)['pid']} on {socket.gethostname()}) does not respond" in message


@pytest.mark.soak
@pytest.mark.timeout(400)
def test_a_worker_that_hangs_while_loading_is_named_and_started_again(tables: dict[str, Any]) -> None:
    """A disk that is gone, say: no progress is expected then, but work. The other worker waits and is not blamed."""
    tables["compute"] |= {"hang_s": 2.0}
    plan(("loading", 0, 1, "sleep"))
    said: list[str] = []
    summary = start(tables, [], said=said)
    [message] = hangs(said)
    where = f"worker 1 (pid {happened(0)['pid']} on {socket.gethostname()})"
    assert summary["steps"] == 60 and f"{where} is stuck in reached (sitecustomize.py:" in message
    assert "worker 0" not in message


def hangs(said: list[str]) -> list[str]:
    return [line for line in said if line.startswith("warning: no progress for ")]


@pytest.mark.nightly
@pytest.mark.timeout(240)
def test_a_worker_that_was_killed_is_named_and_not_the_one_that_misses_it(tables: dict[str, Any]) -> None:
    tables["compute"]["max_failures"] = 0
    plan(("barrier", 13, 1, "kill"))
    with pytest.raises(RunFailed) as failed:
        start(tables, [])
    where = f"worker 1 (pid {happened(0)['pid']} on {socket.gethostname()})"
    assert str(failed.value).startswith(f"a worker failed: {where} was killed or crashed (")


@pytest.mark.nightly
@pytest.mark.timeout(240)
def test_a_lost_mailbox_ends_the_run_in_a_sentence_and_resume_goes_on(tables: dict[str, Any]) -> None:
    tables["compute"] |= {"workers": 1, "max_failures": 0}
    tables["train"]["steps"] = 1500
    events: list[Event] = []

    def strike(event: Event) -> None:
        events.append(event)
        if event.step == 40:
            [mailbox] = [
                each for each in psutil.Process().children(recursive=True) if "ray::EventQueue" in " ".join(each.cmdline())
            ]
            mailbox.kill()

    experiment = parse_experiment(tables)
    with pytest.raises(
        RunFailed, match=r"a process of the run failed: EventQueue \(pid \d+ on .*\) was killed or crashed; see "
    ):
        run_training(experiment, resume=False, show=strike, say=print)
    assert start(tables, events, resume=True)["steps"] == 1500
    assert [event.step for event in events if event.kind == "start"][1] >= 40


@pytest.mark.soak
@pytest.mark.timeout(400)
def test_a_lost_hub_ends_the_search_in_a_sentence_and_resume_counts_every_trial_once(tables: dict[str, Any]) -> None:
    for split in ("train", "validation"):
        tables["data"][split] = tables["data"]["train"]
    tables["compute"] |= {"workers": 1, "max_failures": 0}
    tables["train"] |= {"steps": 1000, "evaluate_every": 250}
    tables["search"] = {"trials": 4, "slots": 2, "scheduler": "fifo", "finalists": 1, "seeds": 1, "length": [4]}

    def strike(entries: list[TrialRecord]) -> None:
        if any(entry.status == "finished" for entry in entries):
            for process in psutil.Process().children(recursive=True):
                if "ray::DispatcherActor" in " ".join(process.cmdline()):
                    process.kill()

    experiment = parse_experiment(tables)
    with pytest.raises(
        RunFailed, match=r"a process of the run failed: DispatcherActor \(pid \d+ on .*\) was killed or crashed; see "
    ):
        run_search(experiment, resume=False, show=strike, say=print)
    shown: list[list[TrialRecord]] = []
    summary = run_search(experiment, resume=True, show=shown.append, say=print).as_json()
    assert summary["trials"] == {"finished": 4}
    assert len([entry for entry in shown[-1] if not entry.finalist]) == 4


@pytest.mark.nightly
@pytest.mark.timeout(240)
def test_a_node_without_memory_is_a_sentence(tables: dict[str, Any], write_toml: Callable[..., Path]) -> None:
    """Ray's monitor ends every process at once: memory is used up before anything is taken."""
    done = short_of_memory([sys.executable, "-m", "ptuning", "train", str(write_toml(tables))], 0.01)
    assert done.returncode == 1 and "Traceback" not in done.stderr and not done.stdout
    assert re.match(
        r"ptuning: \S+ ran out of memory \([\d.]+ of [\d.]+ GB in use; the largest: .*\); free memory and continue with ",
        done.stderr.splitlines()[-1],
    )


@pytest.mark.soak
@pytest.mark.timeout(400)
def test_a_node_that_runs_out_of_memory_once_costs_one_checkpoint_interval(
    tables: dict[str, Any], write_toml: Callable[..., Path]
) -> None:
    tables["train"]["steps"] = 60
    plan(("forward", 43, 1, "hog"))
    memory = psutil.virtual_memory()
    share = (memory.total - memory.available + 4 * 2**30) / memory.total
    done = short_of_memory([sys.executable, "-m", "ptuning", "train", str(write_toml(tables))], share)
    print(done.stderr)
    assert done.returncode == 0 and "Traceback" not in done.stderr and len(done.stdout.splitlines()) == 1
    assert re.search(r"warning: \S+ ran out of memory .* the largest: ray::RayTrainWorker", done.stderr)
    assert "resumed at step 40" in done.stderr


def short_of_memory(command: list[str], share: float) -> subprocess.CompletedProcess[str]:
    """A command in a cluster of its own whose nodes may use this share of their memory."""
    limits = {"RAY_memory_usage_threshold": f"{share:.4f}", "RAY_memory_monitor_refresh_ms": "100"}
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | limits
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)


@pytest.mark.soak
@pytest.mark.timeout(400)
def test_a_run_that_gives_up_says_why_and_goes_on_later(tables: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """One worker that is stopped as a whole: there is nobody else to notice but Ray Train."""
    monkeypatch.setenv("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", "5")
    tables["compute"] |= {"workers": 1, "max_failures": 0}
    plan(("forward", 13, 0, "stop"))
    began = time.monotonic()
    with pytest.raises(RunFailed, match=r"a worker failed: worker 0 \(pid \d+ on .*\) does not respond") as failed:
        start(tables, [])
    print(failed.value, time.monotonic() - began)
    assert not psutil.pid_exists(happened(0)["pid"])
    events: list[Event] = []
    start(tables, events, resume=True)
    assert [event.step for event in events if event.kind == "start"] == [10]


@pytest.mark.timeout(600)
def test_one_driver_per_run_and_a_killed_one_costs_at_most_one_interval(
    in_cluster: None, tables: dict[str, Any], write_toml: Callable[..., Path], tmp_path: Path
) -> None:
    steps = 300 * (1 + KILLS)
    tables["compute"]["workers"] = 1
    tables["train"] |= {"steps": steps}
    folder = tmp_path / "runs" / "toy"
    command = [sys.executable, "-m", "ptuning", "train", str(write_toml(tables))]
    draw, options = random.Random(0), list[str]()
    for life in range(KILLS):
        driver = subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True)
        try:
            wait_for(lambda life=life: reached_step(folder) >= 200 * (life + 1), driver)
            there = f"another driver is running it (host {socket.gethostname()}, pid {driver.pid}, since "
            with pytest.raises(UserError, match=re.escape(there)):
                start(tables, [], resume=True)
            assert driver.poll() is None
            time.sleep(draw.uniform(0, 1))
        finally:
            driver.kill()
            driver.communicate()
        saved = int(storage.list_folders(str(folder / "checkpoints"))[-1].removeprefix("step-"))
        assert not list(folder.rglob("checkpoint_manager_snapshot.json")), "Ray Train has nothing that could be damaged"
        options = ["--resume"]
    events: list[Event] = []
    summary = start(tables, events, resume=True)
    [begun] = [event.step for event in events if event.kind == "start"]
    assert steps > begun >= saved >= 200
    if KILLS > 1:  # or see law 5 in `test_train`
        undisturbed = start(tables, [], name="undisturbed")
        assert difference(undisturbed, summary) == 0
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    curve = [point.step for point in client.get_metric_history(summary["run_id"], "train/loss")]
    assert sorted(set(curve)) == list(range(1, steps + 1))
    runs = client.search_runs([client.get_experiment_by_name("ptuning").experiment_id])
    assert sorted(run.info.run_name for run in runs) == ["toy", *["undisturbed"][: KILLS - 1]]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk that a test may fill."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill_while_running(command: list[str], disk: Path, ready: Callable[[], bool]) -> subprocess.CompletedProcess[str]:
    """Start a command, fill the disk once it is `ready`, see it end in a sentence, make room, and resume it."""
    environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    driver = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    wait_for(ready, driver)
    began = time.monotonic()
    with contextlib.suppress(OSError), (disk / "filler").open("wb") as filler:
        while True:
            filler.write(bytes(4096))
            filler.flush()
    said = driver.communicate(timeout=120)[1]
    print(f"ended after {time.monotonic() - began:.1f} s:", said)
    assert driver.returncode == 1 and "Traceback" not in said
    assert "the disk is full" in said.splitlines()[-1]
    (disk / "filler").unlink()
    again = subprocess.run([*command, "--resume", "--json"], env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    return again


@pytest.mark.soak
@pytest.mark.timeout(400)
def test_a_full_disk_ends_the_run_in_a_sentence_and_resume_goes_on(
    tables: dict[str, Any], write_toml: Callable[..., Path], disk: Path
) -> None:
    tables["compute"] |= {"workers": 1, "storage": str(disk), "max_failures": 0}
    tables["train"] |= {"steps": 1500}
    command = [sys.executable, "-m", "ptuning", "train", str(write_toml(tables))]
    again = fill_while_running(command, disk, lambda: reached_step(disk / "toy") >= 200)
    [begun] = re.findall(r"resumed at step (\d+)", again.stderr)
    assert int(begun) >= 200 - 5


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_a_full_disk_ends_a_search_and_resume_counts_every_trial_once(
    tables: dict[str, Any], write_toml: Callable[..., Path], disk: Path
) -> None:
    for split in ("train", "validation"):
        tables["data"][split] = tables["data"]["train"]
    tables["compute"] |= {"workers": 1, "storage": str(disk), "max_failures": 0}
    tables["train"] |= {"steps": 1000, "evaluate_every": 250}
    tables["search"] = {"trials": 4, "slots": 2, "scheduler": "fifo", "finalists": 1, "seeds": 1, "length": [4]}
    command = [sys.executable, "-m", "ptuning", "search", str(write_toml(tables))]
    ledger = disk / "toy" / "ledger.json"

    def two_have_finished() -> bool:
        trials = json.loads(ledger.read_text())["trials"] if ledger.exists() else []
        return sum(trial["status"] == "finished" for trial in trials) >= 2

    summary = json.loads(fill_while_running(command, disk, two_have_finished).stdout.splitlines()[-1])
    assert summary["trials"] == {"finished": 4}
    trials = [trial for trial in json.loads(ledger.read_text())["trials"] if not trial["finalist"]]
    assert len(trials) == 4 and {trial["step"] for trial in trials} == {1000}


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_a_lost_node_costs_an_elastic_run_no_more_than_a_worker(
    tables: dict[str, Any], write_toml: Callable[..., Path], tmp_path: Path
) -> None:
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    lost = nodes.add_node(num_cpus=1)
    try:
        tables["compute"] |= {"workers": [1, 2], "cpus_per_worker": 1.0}
        tables["train"] |= {"steps": 1500}
        command = [sys.executable, "-m", "ptuning", "train", str(write_toml(tables)), "--json"]
        environment = os.environ | {"RAY_ADDRESS": nodes.address}
        driver = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        wait_for(lambda: reached_step(tmp_path / "runs" / "toy") >= 200, driver)
        saved = int(storage.list_folders(str(tmp_path / "runs" / "toy" / "checkpoints"))[-1].removeprefix("step-"))
        nodes.remove_node(lost, allow_graceful=False)
        said = driver.communicate(timeout=200)
        lines = (tmp_path / "runs" / "toy" / "tracking" / "events.jsonl").read_text().splitlines()
        times = sorted({each["time"] for line in lines if (each := json.loads(line))["kind"] == "metrics"})
        pause = max((later - time) / 1000 for time, later in itertools.pairwise(times))
        print(f"longest pause {pause:.1f} s")
        assert driver.returncode == 0, said[1]
        summary = json.loads(said[0].splitlines()[-1])
        assert summary["steps"] == 1500 and summary["workers"] == 1
        assert "base loaded by 2 workers" in said[1] and "base loaded by 1 worker " in said[1]
        [begun] = re.findall(r"resumed at step (\d+)", said[1])
        assert int(begun) >= saved
    finally:
        nodes.shutdown()
        close_unused_sockets()


@pytest.mark.soak
@pytest.mark.timeout(800)
def test_a_lost_node_is_told_of_and_another_one_waited_for(
    tables: dict[str, Any], write_toml: Callable[..., Path], tmp_path: Path
) -> None:
    """A fixed number of workers: nothing else can be done."""
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    lost = nodes.add_node(num_cpus=1)
    try:
        tables["compute"] |= {"workers": 2, "cpus_per_worker": 1.0}
        tables["train"] |= {"steps": 1500}
        command = [sys.executable, "-m", "ptuning", "train", str(write_toml(tables)), "--json"]
        log = tmp_path / "said"
        with log.open("w") as said:
            driver = subprocess.Popen(
                command, env=os.environ | {"RAY_ADDRESS": nodes.address}, stdout=subprocess.PIPE, stderr=said, text=True
            )
        wait_for(lambda: reached_step(tmp_path / "runs" / "toy") >= 200, driver)
        nodes.remove_node(lost, allow_graceful=False)
        began = time.monotonic()
        wait_for(lambda: "warning: " in log.read_text(), driver)
        print(f"told after {time.monotonic() - began:.1f} s: {log.read_text().splitlines()[-1]}")
        nodes.add_node(num_cpus=1)
        summary = json.loads(driver.communicate(timeout=250)[0].splitlines()[-1])
        assert summary["steps"] == 1500 and summary["workers"] == 2
        assert re.search(r"warning: .* (was lost|has died)$", log.read_text(), re.MULTILINE)
        assert "resumed at step " in log.read_text()
    finally:
        nodes.shutdown()
        close_unused_sockets()


@pytest.mark.nightly
@pytest.mark.timeout(600)
def test_a_search_counts_trials_whose_process_dies_or_hangs_once(
    tables: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "HUNG", 5.0)
    for split in ("train", "validation"):
        tables["data"][split] = tables["data"]["train"]
    tables["train"] |= {"steps": 1000, "evaluate_every": 250}
    tables["compute"]["workers"] = 1
    tables["prompt"]["length"] = 8  # more than any trial has: nothing follows from it
    tables["search"] = {"trials": 4, "slots": 2, "scheduler": "fifo", "finalists": 1, "seeds": 1, "length": [4]}
    done: list[int] = []
    titles: set[str] = set()

    def strike() -> None:
        """The first trial's process that works is stopped, the second one's killed."""
        while len(done) < 2:
            time.sleep(0.05)
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    title = " ".join(process.cmdline())
                    titles.add(title[:60])
                    if re.match("ray::(ImplicitFunc|trial)", title) and process.pid not in done and len(done) < 2:
                        process.send_signal(signal.SIGKILL if done else signal.SIGSTOP)
                        done.append(process.pid)

    threading.Thread(target=strike, daemon=True).start()
    shown: list[list[TrialRecord]] = []
    summary = run_search(parse_experiment(tables), resume=False, show=shown.append, say=print).as_json()
    print(summary["trials"], [(entry.run, entry.status, entry.message) for entry in shown[-1]])
    assert len(done) == 2, titles
    trials = [entry for entry in shown[-1] if not entry.finalist]
    assert len(trials) == 4 and sum(summary["trials"].values()) == 4
    assert not [pid for pid in done if psutil.pid_exists(pid)]


def close_unused_sockets() -> None:
    """Ray's `Cluster` leaves one that was never bound (2.60), and pytest takes that for a failure of its own."""
    for each in gc.get_objects():
        if type(each) is socket.socket and each.fileno() >= 0 and each.getsockname() == ("0.0.0.0", 0):
            each.close()


def reached_step(folder: Path) -> int:
    """The last step that has reached the driver's disk."""
    spool = folder / "tracking" / "events.jsonl"
    lines = spool.read_text().splitlines() if spool.exists() else []
    return max((json.loads(line).get("step", 0) for line in lines if line.endswith("}")), default=0)


def wait_for(done: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
