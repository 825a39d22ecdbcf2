"""`ptuning predict` on a real Ray cluster: the same answers as alone, two workers, killed drivers and engines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
from conftest import title, toy_rows
from test_predict import FREE, KIND, rows_file, toy_prompt
from typer.testing import CliRunner

import ptuning
from ptuning.cli.app import app
from ptuning.inference.predictor import Predictor
from ptuning.prediction.parts import Parts
from ptuning.registry.publish import publish
from ptuning.registry.registry import Registry
from ptuning.tracking.client import default_artifact_root, default_uri

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("local_ray", "in_cluster")]

KILLS = int(os.environ.get("PTUNING_KILLS", "1"))


@pytest.fixture
def store(tmp_path: Path, tiny_base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A registry with two soft prompts of one base, and a folder for tables, as the current one."""
    runs = tmp_path / "runs"
    registry = Registry(default_uri(runs))
    prompts = {}
    for name, template in (("kind", KIND), ("free", FREE)):
        prompts[name] = toy_prompt(tiny_base_folder, template, 0)
        prompts[name].save(str(tmp_path / "made" / name))
        publish(registry, name, str(tmp_path / "made" / name), None, default_artifact_root(runs))
    monkeypatch.chdir(tmp_path)
    return SimpleNamespace(prompts=prompts, folder=str(runs))


def test_a_table_of_two_soft_prompts(store: SimpleNamespace) -> None:
    rows = [{"number": number, **row, "who": ("", "kind:1", "free")[number % 3]} for number, row in enumerate(toy_rows(300, 5))]
    rows[7]["text"] = rows[8]["text"] = None
    table = rows_file("rows.jsonl", rows)
    more = ["--model-column", "who", "--probabilities", "--workers", "2", "--storage", store.folder, "--json"]
    done = CliRunner().invoke(app, ["predict", "kind", table, "-o", "out.parquet", *more])
    assert done.exit_code == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    found = pq.read_table("out.parquet").to_pylist()
    assert [{key: row[key] for key in rows[0]} for row in found] == rows, "every column, in order"
    with Predictor(store.prompts) as predictor:
        for name in ("kind", "free"):
            own = [row for row in found if row["version"] == f"{name}:1" and row["text"] is not None]
            texts = [row["text"] for row in own]
            assert [row["prediction"] for row in own] == predictor.predict(texts, name)
            if name == "free":
                assert {row["finish_reason"] for row in own} <= {"stop", "length"} and own[0]["probability_fruit"] is None
                continue
            for row, shares in zip(own, predictor.probabilities(texts, name), strict=True):
                assert row["probability_fruit"] == pytest.approx(shares["fruit"], abs=1e-6)
                assert row["probability"] == max(row["probability_fruit"], row["probability_tool"])
            right = [row["prediction"] == row["label"] for row in own]
            assert summary["metrics"]["kind:1"]["accuracy"] == pytest.approx(sum(right) / len(right))
            assert summary["measured"] == {"kind:1": len(own)}
    assert [row["error"] for row in found[7:9]] == ["the field 'text' is null; fill it or remove the row"] * 2
    assert (summary["rows"], summary["errors"], summary["answered"]) == (300, 2, 300) and not Path("out.parquet.parts").exists()
    until = time.monotonic() + 30
    while _engines() and time.monotonic() < until:
        time.sleep(0.1)
    assert not _engines(), "nobody holds a base any more"


def long_rows(many: int) -> str:
    """Rows of 2 kB, which are cut: some sixty make a block."""
    return rows_file("long.jsonl", [{"id": row, "text": f"{row} apple " + "many words " * 180} for row in range(many)])


def test_killed_drivers_leave_no_row_out_and_none_twice(store: SimpleNamespace) -> None:
    table = long_rows(1200)
    whole = ptuning.predict("kind", table, "whole.parquet", storage=store.folder, progress=False)
    assert (whole.rows, whole.errors, whole.answered) == (1200, 0, 1200)
    command = [sys.executable, "-m", "ptuning", "predict", "kind", table, "-o", "out.parquet", "--storage", store.folder]
    parts = Parts(str(Path("out.parquet").absolute()))
    for life in range(KILLS):
        _killed([*command, *(["--resume"] if life else [])], lambda life=life: _files(parts) > 2 * life)
    done = len(parts.clean())
    assert done > 0 and not Path("out.parquet").exists()
    last = ptuning.predict("kind", table, "out.parquet", storage=store.folder, resume=True, progress=False)
    assert (last.rows, last.errors, last.answered) == (1200, 0, 1200 - done)
    assert pq.read_table("out.parquet").equals(pq.read_table("whole.parquet"))
    with pytest.raises(ptuning.UserError, match=r"out.parquet: exists already"):
        ptuning.predict("kind", table, "out.parquet", storage=store.folder, resume=True, progress=False)


@pytest.mark.nightly
def test_a_killed_engine_is_replaced(store: SimpleNamespace) -> None:
    table = long_rows(600)
    parts = Parts(str(Path("out.parquet").absolute()))
    command = [sys.executable, "-m", "ptuning", "predict", "kind", table, "-o", "out.parquet", "--storage", store.folder]
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    _wait(lambda: _files(parts) > 0, driver)
    [engine] = _engines()
    engine.kill()
    _, said = driver.communicate(timeout=120)
    assert driver.returncode == 0, said
    assert [row["id"] for row in pq.read_table("out.parquet").to_pylist()] == list(range(600))


def _engines() -> list[psutil.Process]:
    return [each for each in psutil.Process().children(recursive=True) if "MapWorker" in title(each)]


def _files(parts: Parts) -> int:
    return len(list(Path(parts.path).glob("*.parquet")))


def _killed(command: list[str], when: Callable[[], bool]) -> None:
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _wait(when, driver)
    driver.kill()
    driver.wait()


def _wait(when: Callable[[], bool], driver: subprocess.Popen[Any]) -> None:
    until = time.monotonic() + 120
    while driver.poll() is None and not when() and time.monotonic() < until:
        time.sleep(0.02)
    assert driver.poll() is None
