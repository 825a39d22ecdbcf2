"""What lies in the folder where a command is typed, or beside its experiment, is never run, by no process of any command.

Jobs that travel to a cluster: `test_submit`, whose folders hold the same traps.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from conftest import REPOSITORY, set_traps, sprung, toy_rows
from test_tracking import free_port

Write = Callable[..., Path]


def run(folder: Path, *arguments: str, code: int = 0, **environment: str) -> str:
    command = [sys.executable, "-m", "ptuning", *arguments]
    done = subprocess.run(command, cwd=folder, env=os.environ | environment, capture_output=True, text=True, timeout=150)
    assert done.returncode == code, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def trapped(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path) -> Iterator[SimpleNamespace]:
    """A folder with traps to type commands in, and another one with an experiment that lies among traps."""
    here, beside = tmp_path_factory.mktemp("here"), tmp_path_factory.mktemp("beside")
    for folder in (here, beside):
        set_traps(folder)
    for seed, split in enumerate(("train", "validation", "test")):
        (beside / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in toy_rows(32, seed)))
    experiment = beside / "toy.toml"
    experiment.write_text(
        f'name = "toy"\n[model]\npath = "{tiny_base_folder}"\n'
        f'[data]\ntrain = "{beside}/train.jsonl"\nvalidation = "{beside}/validation.jsonl"\ntest = "{beside}/test.jsonl"\n'
        'input = "Text: {text}\\nKind:"\ntarget = " {label}"\nlabels = ["fruit", "tool"]\n'
        "[train]\nsteps = 4\nevaluate_every = 2\nbatch_size = 8\n"
        '[search]\nscheduler = "fifo"\ntrials = 2\nslots = 2\nlength = [2, 4]\nfinalists = 1\nseeds = 1\n'
        f'[compute]\nstorage = "{beside}/runs #1 100% a:b äö"\n'
    )
    assert len(list(here.iterdir())) > 300 and {"datasets.py", "queue.py", "numpy.py"} <= {path.name for path in here.iterdir()}
    yield SimpleNamespace(here=here, beside=beside, experiment=str(experiment))
    assert sprung(here, beside) == []


@pytest.mark.fast
def test_drivers(trapped: SimpleNamespace) -> None:
    assert json.loads(run(trapped.here, "config", trapped.experiment))["name"] == "toy"
    assert run(trapped.here, "prompts", "list", "--storage", f"{trapped.beside}/none", "--json") == '{"soft_prompts": []}\n'
    run(trapped.here, "plan", trapped.experiment)
    # An empty entry in PYTHONPATH is the working folder as well.
    run(trapped.here, "config", trapped.experiment, PYTHONPATH=f":{trapped.here.parent}")
    assert sprung(trapped.here, trapped.beside) == []


@pytest.mark.fast
@pytest.mark.parametrize("script", ["train", "search", "serve"])
def test_scripts_of_the_python_api(trapped: SimpleNamespace, script: str) -> None:
    """Python looks into a script's own folder, as everywhere; the folder where the command is typed is not looked into."""
    done = subprocess.run(
        [sys.executable, REPOSITORY / "jobs" / f"{script}.py", "none.toml"], cwd=trapped.here, capture_output=True, text=True
    )
    assert "none.toml: no such file" in done.stderr, done.stderr
    assert sprung(trapped.here, trapped.beside) == []


@pytest.mark.fast
@pytest.mark.parametrize(
    ("given", "left"),
    [(None, None), ("", ""), (":", None), ("/one::/two", "/one:/two"), ("/one", "/one"), ("{here}", "{here}")],
)
def test_what_the_user_has_named_in_pythonpath_stays(tmp_path: Path, given: str | None, left: str | None) -> None:
    code = (
        "import json, os, sys; from ptuning import sys_path; sys_path.leave_working_folder()\n"
        "print(json.dumps([sys.path, os.environ.get('PYTHONPATH'), os.environ['PYTHONSAFEPATH'], sys_path.carried]))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if given is not None:
        environment["PYTHONPATH"] = given.format(here=tmp_path)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, check=True)
    path, variable, safe, carried = json.loads(done.stdout)
    assert variable == (left and left.format(here=tmp_path)) and safe == "1" and not carried
    assert "" not in path and path.count(str(tmp_path)) == (given == "{here}")
    assert path[: len((left or "").split(":"))] == variable.split(":") if variable else True


@pytest.mark.cluster
@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_search_and_its_server(trapped: SimpleNamespace) -> None:
    """Driver, hub, trials, workers and their controllers; then Serve's controller, proxy and replica, and the doctor's look.

    The server finds what the search has made though the storage folder has moved meanwhile.
    """
    summary = json.loads(run(trapped.here, "search", trapped.experiment, "--json").splitlines()[-1])
    assert summary["trials"] == {"finished": 2} and summary["registered"] == "toy:1"
    assert sprung(trapped.here, trapped.beside) == []

    moved = (trapped.beside / "runs #1 100% a:b äö").rename(trapped.beside / "moved")
    port = free_port()
    log = trapped.beside / "serve.log"
    with log.open("wb") as out:
        command = [
            sys.executable,
            "-m",
            "ptuning",
            "serve",
            trapped.experiment,
            f"serve.port={port}",
            f"compute.storage={moved}",
        ]
        server = subprocess.Popen(command, cwd=trapped.here, stdout=out, stderr=out, start_new_session=True)
    try:
        until = time.monotonic() + 120
        while "serving at" not in log.read_text():
            assert server.poll() is None and time.monotonic() < until, log.read_text()
            time.sleep(0.1)
        answer = run(trapped.here, "ask", "toy", "the old hammer", "--url", f"http://127.0.0.1:{port}/v1")
        assert answer.strip() in ("fruit", "tool")
        parts = [part for process in psutil.Process(server.pid).children(recursive=True) for part in process.cmdline()]
        [address] = {part.partition("=")[2] for part in parts if part.startswith("--gcs-address=")}
        loopback = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # as `environment.apply_for_cluster`
        found: Any = json.loads(run(trapped.here, "doctor", trapped.experiment, "--address", address, "--json", **loopback))
        assert found["ok"] and any(finding["what"] == "packages" for finding in found["findings"])
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)
    assert sprung(trapped.here, trapped.beside) == []


@pytest.mark.cluster
@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_source_checkout_that_is_not_installed(trapped: SimpleNamespace, tmp_path: Path) -> None:
    """Its workers get the package, and only that: not what lies beside it."""
    set_traps(tmp_path)
    package = tmp_path / "ptuning"
    shutil.copytree(REPOSITORY / "ptuning", package, ignore=shutil.ignore_patterns("__pycache__"))
    told = tmp_path / "told"
    told.mkdir()
    (package / "__init__.py").write_text(f"import os\nopen(f'{told}/{{os.getpid()}}', 'w').close()\n")
    run(tmp_path, "train", trapped.experiment, "name=carried", "train.steps=2")
    assert len(list(told.iterdir())) >= 3, "the driver, the mailbox and a worker"
    assert sprung(tmp_path, trapped.beside) == []
