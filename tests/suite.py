"""Runs the tests that need no cluster in a process for every core, and beside them those that start clusters, one after the
other. The latter wait for processes and for each other most of the time; they go first where both want a core.

`python tests/suite.py MARKS [ARGUMENTS]`: marks such as "not nightly and not soak", and more arguments of pytest. The seconds
of every test are in build/*.xml.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
BUILD = REPOSITORY / "build"

PARTS = {
    "clusters": ("cluster", 0, []),
    "tests": ("not cluster", 5, ["--numprocesses=logical", "--maxprocesses=4", "--dist=loadfile", "--no-loadscope-reorder"]),
}
"""Name, marks, niceness and more arguments of pytest."""


def start(name: str, marks: str, arguments: tuple[str, ...]) -> subprocess.Popen[bytes]:
    which, nice, more = PARTS[name]
    command = [sys.executable, "-m", "pytest", "-m", f"{which} and {marks}", f"--junitxml={BUILD / name}.xml", *more]

    def niced() -> None:
        os.nice(nice)

    with (BUILD / f"{name}.log").open("wb") as log:
        return subprocess.Popen([*command, *arguments], cwd=REPOSITORY, stdout=log, stderr=subprocess.STDOUT, preexec_fn=niced)


def main(marks: str, *arguments: str) -> int:
    """The worst exit status of the parts; what each said is shown as soon as it has ended."""
    BUILD.mkdir(exist_ok=True)
    began = time.monotonic()
    running = {name: start(name, marks, arguments) for name in PARTS}
    print(f"running; see {', '.join(str(BUILD / f'{name}.log') for name in PARTS)}", flush=True)
    worst = 0
    try:
        while running:
            time.sleep(0.5)
            for name in [name for name, each in running.items() if each.poll() is not None]:
                status = running.pop(name).returncode
                worst = max(worst, abs(status))
                print((BUILD / f"{name}.log").read_text(encoding="utf-8", errors="replace"), flush=True)
                print(f"{name}: status {status} after {time.monotonic() - began:.0f} s", flush=True)
    except KeyboardInterrupt:  # the parts have had it, too
        for each in running.values():
            each.wait()
        return 130
    return worst


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
