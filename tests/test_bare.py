"""Rooms that run with torch and transformers alone: without Ray, DeepSpeed, MLflow, Optuna and PEFT, as on a machine that is
lent for some minutes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import REPOSITORY

BLOCKED = """
import importlib, importlib.metadata, json, pkgutil, sys
BLOCKED = ("ray", "deepspeed", "mlflow", "optuna", "peft")
for name in BLOCKED:
    sys.modules[name] = None  # how Python marks a module that cannot be imported
version = importlib.metadata.version

def installed(name):
    if name in BLOCKED:
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)

importlib.metadata.version = installed
"""

ROOMS = """
import ptuning.model, ptuning.data, ptuning.inference, ptuning.planning
for room in (ptuning.model, ptuning.data, ptuning.inference, ptuning.planning):
    for module in pkgutil.iter_modules(room.__path__, room.__name__ + "."):
        if module.name.rpartition(".")[2] not in ("vllm_rows", "vllm_sampling"):  # only vLLM's own processes import them
            importlib.import_module(module.name)

import torch
from support.training import Run
from ptuning.config import Experiment
from ptuning.model.base import find_base
from ptuning.model.prompted_model import PromptedModel

from pathlib import Path
experiment = Experiment.model_validate(json.loads(sys.argv[1]))
base = find_base(experiment.model)
done = Run(PromptedModel(base.load(torch.float32)), base, Path(sys.argv[2]))(experiment)
print(json.dumps([event.kind for event in done.events if event.kind != "step"]))
print(json.dumps(sorted(done.result(experiment.name).card.versions)))
"""

BENCHMARK = """
from types import SimpleNamespace
from benchmarks import gpu
arguments = SimpleNamespace(device="cpu", small=True, sizes=["1b"])
for part in ("machine", "right", "waits"):
    print(json.dumps(gpu.run_part(part, arguments)))
"""


def run(program: str, *arguments: str) -> list[str]:
    path = [str(REPOSITORY), str(REPOSITORY / "tests"), str(REPOSITORY / "jobs")]
    code = f"{BLOCKED}\nsys.path[:0] = {path}\n{program}"
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


@pytest.mark.fast
def test_training_needs_torch_and_transformers(toy_task: SimpleNamespace, tmp_path: Path) -> None:
    tables = toy_task.experiment
    tables["train"] |= {"steps": 4, "evaluate_every": 2}
    kinds, versions = [json.loads(line) for line in run(ROOMS, json.dumps(tables), str(tmp_path))]
    assert kinds == ["start", "evaluation", "evaluation", "finished"]
    assert "torch" in versions and not {"ray", "deepspeed"} & set(versions)


@pytest.mark.nightly
@pytest.mark.slow
def test_the_first_parts_of_the_gpu_benchmark_need_torch_and_transformers() -> None:
    parts = [json.loads(line) for line in run(BENCHMARK)]
    assert [part["part"] for part in parts] == ["machine", "right", "waits"]
    right = parts[1]["found"]
    assert right.pop("resumed") == {"adamw": True, "adafactor": True}
    assert len(right) == 3 and all(found["right"] for found in right.values())
    assert parts[0]["found"]["attention"]["flash_sdp"] and not {"ray", "peft"} & set(parts[0]["found"]["versions"])


@pytest.mark.nightly
@pytest.mark.slow
def test_the_gpu_benchmark_runs_from_end_to_end() -> None:
    command = [sys.executable, "jobs/benchmark.py", "gpu", "--device", "cpu", "--small"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert not [line for line in lines if "error" in line], done.stderr[-3000:]
    parts = ["machine", "right", "waits", "cudnn", "cascade", "train", "serve"]
    assert [line["part"] for line in lines if "found" in line] == parts
    found = {line["part"]: line["found"] for line in lines if "found" in line}
    assert all(each["step_s"] > 0 for each in found["train"].values())
    assert found["serve"]["labels"]["labels"] == 9 and found["serve"]["R=4 top_p 0.9"]["tokens_per_s"] > 0
