"""One driver per run: who is refused, who takes over, and who stops. Whole drivers are in `test_faults`."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ptuning import storage
from ptuning.errors import UserError
from ptuning.training import lease

pytestmark = pytest.mark.fast

HOLD = """
import sys, time
from ptuning.training import lease
with lease.held(sys.argv[1], print):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT", 0.1)
    monkeypatch.setattr(lease, "EXPIRY", 1.0)


@pytest.fixture
def elsewhere(tmp_path: Path) -> Callable[[int], None]:
    """Writes the lease of a driver on another machine, at its so manieth renewal."""

    def write(beat: int) -> None:
        record = {"token": "t", "host": "far", "pid": 7, "born": 0.0, "place": "far", "since": "then", "beat": beat}
        storage.write_file(str(tmp_path), lease.FILE, json.dumps(record).encode())

    return write


def test_a_killed_driver_is_followed_at_once_and_a_living_one_never(tmp_path: Path) -> None:
    first = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout is not None and first.stdout.readline() == "held\n"
        for refuse in (lambda: lease.check(str(tmp_path), print), lambda: lease.held(str(tmp_path), print).__enter__()):
            with pytest.raises(
                UserError, match=rf"another driver is running it \(host .*, pid {first.pid}, since .* UTC\); wait"
            ):
                refuse()
    finally:
        first.kill()
        first.communicate()
    began = time.monotonic()
    with lease.held(str(tmp_path), print):
        assert time.monotonic() - began < 0.5
    assert not storage.exists(str(tmp_path), lease.FILE)


def test_a_driver_elsewhere_is_given_time(tmp_path: Path, elsewhere: Callable[[int], None]) -> None:
    elsewhere(1)
    lines: list[str] = []
    began = time.monotonic()
    with lease.held(str(tmp_path), lines.append):
        assert 1 <= time.monotonic() - began < 2
    assert lines == [f"{tmp_path}: has a lease of a driver on far (pid 7); waiting up to 1 s for its renewal"]

    elsewhere(1)
    threading.Timer(0.4, elsewhere, (2,)).start()
    with pytest.raises(UserError, match="host far, pid 7"):
        lease.check(str(tmp_path), lines.append)


@pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_IGN], ids=["foreground", "background"])
def test_a_driver_that_was_frozen_stops_when_another_has_taken_over(
    tmp_path: Path, elsewhere: Callable[[int], None], handler: Any
) -> None:
    before = signal.signal(signal.SIGINT, handler)
    with pytest.raises(lease.LeaseLost, match=r"another driver \(host far, pid 7\) has taken over"):  # noqa: SIM117
        with lease.held(str(tmp_path), print):
            elsewhere(1)
            time.sleep(5)
    assert signal.signal(signal.SIGINT, before) == handler
    assert json.loads(storage.read_file(str(tmp_path), lease.FILE))["host"] == "far", "the other one's lease stays"


def test_of_many_at_once_one_wins(tmp_path: Path) -> None:
    script = HOLD.replace("60", "4")
    drivers = [
        subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        for _ in range(4)
    ]
    assert sorted(driver.communicate()[0] for driver in drivers) == [b"", b"", b"", b"held\n"]
