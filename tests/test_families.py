"""The commands on tiny checkpoints of model families, in the form in which they are published: train, search, serve, ask."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, toy_rows

pytestmark = [pytest.mark.cluster, pytest.mark.nightly, pytest.mark.slow, pytest.mark.timeout(900)]

FAMILIES = {
    "gemma3": "Gemma3ForConditionalGeneration",
    "gemma4": "Gemma4ForConditionalGeneration",
    "llama4": "Llama4ForConditionalGeneration",
    "qwen3_5": "Qwen3_5ForConditionalGeneration",
    "qwen3_next": "Qwen3NextForCausalLM",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "gpt_oss": "GptOssForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "granite4 h": "GraniteMoeHybridForCausalLM",
    "falcon_h1": "FalconH1ForCausalLM",
    "nemotron_h": "NemotronHForCausalLM",
}
"""Types of the matrix, and the classes that their checkpoints name."""


def command(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "RAY_AUTH_MODE": "token"}
    return subprocess.Popen(
        [sys.executable, "-m", "ptuning", *arguments],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )


def run(*arguments: str, cwd: Path) -> str:
    process = command(*arguments, cwd=cwd)
    try:
        out, errors = process.communicate(timeout=400)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            process.wait(90)
    assert process.returncode == 0, errors[-3000:]
    return out


@contextmanager
def serving(*arguments: str, cwd: Path) -> Iterator[None]:
    process = command("serve", *arguments, cwd=cwd)
    said: list[str] = []
    try:
        assert process.stderr is not None
        for line in process.stderr:
            said.append(line)
            if line.startswith("serving at"):
                break
        else:
            pytest.fail("".join(said)[-3000:])
        yield
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=90)


def write_experiment(folder: Path, base: Path, write_toml: Callable[..., Path]) -> Path:
    for split, seed in (("train", 0), ("validation", 1), ("test", 2)):
        rows = "\n".join(json.dumps(row) for row in toy_rows(24, seed))
        (folder / f"{split}.jsonl").write_text(rows + "\n", encoding="utf-8")
    tables: dict[str, Any] = {
        "name": "family",
        "model": {"path": str(base)},
        "prompt": {"length": 4},
        "data": {
            **{split: str(folder / f"{split}.jsonl") for split in ("train", "validation", "test")},
            **{"input": "{text}", "target": " {label}", "labels": ["fruit", "tool"]},
        },
        "train": {"steps": 6, "evaluate_every": 3, "batch_size": 4},
        "search": {"trials": 2, "slots": 2, "length": [3, 4], "finalists": 1, "seeds": 1},
        "compute": {"storage": str(folder / "runs"), "workers": 2},
    }
    return write_toml(tables, "family.toml")


@pytest.mark.parametrize("family", FAMILIES)
def test_train_search_serve_ask(family: str, tmp_path: Path, write_toml: Callable[..., Path]) -> None:
    from matrix.bases import write_base
    from matrix.variants import find_cases

    base = tmp_path / "base"
    write_base(*find_cases([family]), base)
    assert json.loads((base / "config.json").read_text(encoding="utf-8"))["architectures"] == [FAMILIES[family]]
    experiment = str(write_experiment(tmp_path, base, write_toml))
    trained = json.loads(run("train", experiment, "--register", "trained", "--json", cwd=tmp_path).splitlines()[-1])
    assert trained["steps"] == 6 and "test_accuracy" in trained["metrics"]
    run("search", experiment, "name=found", "--register", "found", cwd=tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with serving(experiment, f"serve.port={port}", cwd=tmp_path):
        for name in ("trained", "found"):
            answer = run("ask", name, "the old hammer", "--url", f"http://127.0.0.1:{port}/v1", cwd=tmp_path)
            assert answer.strip() in ("fruit", "tool")
