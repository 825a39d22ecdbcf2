"""Runs the cases of `support/accelerator_cases.py` and the budgets of `support/accelerator_budgets.py` in a process of their
own: a pretended device stays for good."""

from __future__ import annotations

import subprocess
import sys

import pytest
from conftest import REPOSITORY

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("marks", ["not nightly", pytest.param("nightly", marks=pytest.mark.nightly)])
def test_what_an_accelerator_computes_is_what_a_cpu_computes(marks: str) -> None:
    files = [f"tests/support/accelerator_{name}.py" for name in ("cases", "budgets")]
    command = [sys.executable, "-m", "pytest", "-q", "-m", marks, "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout
