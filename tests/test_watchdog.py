"""The watchdog alone, in processes of its own: when it barks, whom it blames, and what it forgives."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ptuning.training.messages import StuckReport
from ptuning.training.watchdog import FIRST, HUNG, LEAST, SIGNS, TIMES, Watchdog, diagnose

pytestmark = pytest.mark.fast

SCRIPT = """
import time
from ptuning.training.watchdog import Watchdog
dog = Watchdog(lambda words: print(words, flush=True), limit_s=1.0)
dog.heartbeat()
print("begins", flush=True)
"""


def watched(body: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", SCRIPT + body], stdout=subprocess.PIPE, text=True)


def test_a_thread_that_sleeps_is_ended_and_told_where() -> None:
    process = watched("time.sleep(60)")
    said = process.communicate(timeout=20)[0].splitlines()
    assert process.returncode == HUNG
    assert len(said) == 3 and "last=False" in said[1] and "last=True" in said[2] and "waits=False" in said[2]


def test_signs_of_life_rests_and_stopped_processes_are_forgiven() -> None:
    process = watched(
        "dog.expect_idle(); time.sleep(3); dog.heartbeat()\n"
        "for _ in range(15): time.sleep(0.15); time.sleep(0.15); time.sleep(0.15); dog.heartbeat()\n"
        "dog.end(); time.sleep(2)\n"
    )
    for pause in (4.0, 1.0, 1.0):
        time.sleep(pause)
        process.send_signal(signal.SIGSTOP)
        time.sleep(2)
        process.send_signal(signal.SIGCONT)
    said = process.communicate(timeout=30)[0]
    assert process.returncode == 0 and "last=True" not in said


def test_who_may_take_its_time_must_work(tmp_path: Path) -> None:
    """Before the first sign of life, as while a base is loaded, and in a rest: processor time or bytes."""
    script = SCRIPT.replace("dog.heartbeat()\n", "").replace("limit_s=1.0", "limit_s=0.2")
    assert "beat" not in script
    spin = "def spin(s):\n    end = time.monotonic() + s\n    while time.monotonic() < end: pass\n"
    write = f"open({str(tmp_path / 'copy')!r}, 'wb').write(bytes(10**6))"
    copy = f"def copy(s):\n    for _ in range(int(s * 5)): {write}; time.sleep(.2)\n"
    cases = {
        "time.sleep(8)": HUNG,
        "dog.heartbeat(); dog.expect_idle(); time.sleep(8)": HUNG,
        "for _ in range(5): time.sleep(1); spin(0.3)": 0,
        "copy(5)": 0,
    }
    command = [sys.executable, "-c"]
    processes = [subprocess.Popen([*command, script + spin + copy + body], stdout=subprocess.PIPE, text=True) for body in cases]
    for process, (body, code) in zip(processes, cases.items(), strict=True):
        said = process.communicate(timeout=30)[0]
        assert process.returncode == code, (body, said)
        assert ("last=True" in said) == bool(code)


def test_who_waits_for_a_worker_that_takes_its_time_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "torch" / "distributed").mkdir(parents=True)
    waiting = tmp_path / "torch" / "distributed" / "waiting.py"
    waiting.write_text("import time\ntime.sleep(5)\n")
    script = SCRIPT.replace("dog.heartbeat()\n", "").replace("limit_s=1.0", "limit_s=0.2")
    run = f"exec(compile(open({str(waiting)!r}).read(), {str(waiting)!r}, 'exec'))"
    process = subprocess.Popen([sys.executable, "-c", f"{script}{run}"], stdout=subprocess.PIPE, text=True)
    said = process.communicate(timeout=20)[0]
    assert process.returncode == 0 and "waits=True, last=False" in said and "last=True" not in said


def test_the_limit_follows_the_longest_step() -> None:
    dog = Watchdog(lambda words: None)
    try:
        assert dog.limit == FIRST
        for _ in range(SIGNS):
            dog.heartbeat()
        assert dog.limit == LEAST
        dog._longest = 30.0
        assert dog.limit == 30 * TIMES
    finally:
        dog.end()


def test_the_verdict_names_the_worker_that_the_others_wait_for() -> None:
    waits = StuckReport(60.2, "all_reduce (distributed_c10d.py:1)", "pid 2 on b", waits=True, last=True)
    stuck = StuckReport(61.0, "read (ssl.py:2)", "pid 1 on a", waits=False, last=True)
    places = ["pid 1 on a", "pid 2 on b"]
    rest = "; all workers restart from the newest checkpoint"
    assert diagnose(places, {0: waits}) == f"no progress for 60 s: worker 1 (pid 2 on b) does not respond{rest}"
    assert diagnose(places, {0: stuck, 1: waits}) == (
        f"no progress for 61 s: worker 0 (pid 1 on a) is stuck in read (ssl.py:2){rest}"
    )
    assert diagnose(places, {0: waits, 1: waits}) == f"no progress for 60 s: all 2 workers wait for each other{rest}"
