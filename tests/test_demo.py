"""`make demo` as impatient people run it: interrupted, and then once more."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import REPOSITORY

pytestmark = pytest.mark.cluster


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "jobs").symlink_to(REPOSITORY / "jobs")
    return tmp_path


def start(folder: Path) -> tuple[subprocess.Popen[bytes], Path]:
    said = folder / "said"
    # As at a user's: Ray has no token, and its own pace.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(REPOSITORY)}
    with said.open("wb") as file:
        demo = subprocess.Popen([sys.executable, "jobs/demo.py"], cwd=folder, env=environment, stdout=file, stderr=file)
    return demo, said


def interrupt(demo: subprocess.Popen[bytes], how: signal.Signals = signal.SIGINT) -> list[psutil.Process]:
    """What it has started and is still there when it has ended."""
    family = psutil.Process(demo.pid)
    began = set(family.children(recursive=True))
    demo.send_signal(how)
    until = time.monotonic() + 60
    while demo.poll() is None and time.monotonic() < until:
        with contextlib.suppress(psutil.Error):
            began |= set(family.children(recursive=True))
        time.sleep(0.05)
    assert demo.poll() == 130
    return psutil.wait_procs(began, 10)[1]


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.parametrize("moment", ["test: 800 rows", "starting 2 workers"], ids=["as Ray starts", "as workers start"])
def test_a_demo_that_is_interrupted_leaves_nothing(folder: Path, moment: str) -> None:
    demo, said = start(folder)
    try:
        until = time.monotonic() + 60
        while moment not in said.read_text():
            assert demo.poll() is None and time.monotonic() < until, said.read_text()
            time.sleep(0.1)
        time.sleep(1)
        assert interrupt(demo, signal.SIGTERM) == []
    finally:
        demo.kill()
    assert "ptuning: stopped; continue with: ptuning train jobs/sentiment.toml" in said.read_text()
    assert "Traceback" not in said.read_text()


@pytest.mark.soak
@pytest.mark.timeout(1500)
def test_a_demo_that_is_interrupted_anywhere_can_be_repeated(folder: Path) -> None:
    for seconds in (0.3, 1.5, 3, 5, 8, 12, 18, 25, 35, 50, 70):
        demo, said = start(folder)
        time.sleep(seconds)
        assert interrupt(demo) == [], seconds
        assert "Traceback" not in said.read_text(), (seconds, said.read_text())
    demo, said = start(folder)
    assert demo.wait(400) == 0, said.read_text()
    assert "I love this product!  ->  Positive" in said.read_text()
    assert "arning" not in said.read_text()
