"""The whole way on a real Ray cluster with real DeepSpeed and MLflow: two workers, ZeRO-3."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from ptuning import storage
from ptuning.cluster.local_paths import absolute
from ptuning.config import Experiment, parse_experiment
from ptuning.errors import RunFailed, UserError
from ptuning.model import soft_prompt
from ptuning.training import ray_trainer
from ptuning.training.messages import Event, Loaded, Stepped
from ptuning.training.run import run_training

pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.fixture
def tables(toy_task: SimpleNamespace) -> dict[str, Any]:
    toy_task.experiment["compute"]["workers"] = 2
    toy_task.experiment["train"] |= {"steps": 30, "learning_rate": 0.3, "checkpoint_every": 5}
    toy_task.experiment["prompt"]["length"] = 10
    return toy_task.experiment


def start(tables: dict[str, Any], events: list[Event], *, resume: bool = False) -> Any:
    return run_training(parse_experiment(tables), resume=resume, show=events.append, say=print).as_json()


def test_train_gives_a_soft_prompt_and_an_mlflow_run_that_holds_everything(finished_run: SimpleNamespace) -> None:
    tables, summary, events, lines = finished_run.tables, finished_run.summary, finished_run.events, finished_run.lines
    assert set(summary) >= {"name", "run_id", "soft_prompt", "steps", "seconds", "metrics"}
    assert summary["steps"] == 60 and summary["unsent"] == 0
    assert lines[0].startswith("train: 64 rows")
    shares = next(event for event in events if isinstance(event, Loaded)).shares
    assert len(shares) == 2 and all(share.held <= 0.55 * share.whole for share in shares)

    loaded = soft_prompt.load(summary["soft_prompt"])
    assert loaded.card.metrics == summary["metrics"]
    base = AutoModelForCausalLM.from_pretrained(tables["model"]["path"], dtype=torch.float32)
    assert PeftModel.from_pretrained(base, summary["soft_prompt"]).get_prompt(1).shape == (1, 10, 32)

    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{finished_run.folder}/runs/mlflow.db")
    run = client.get_run(summary["run_id"])
    assert run.info.status == "FINISHED" and run.data.params["prompt.length"] == "10"
    curve = client.get_metric_history(summary["run_id"], "train/loss")
    assert [(point.step, point.value) for point in curve] == [
        (event.step, event.values["loss"]) for event in events if isinstance(event, Stepped)
    ]
    assert len(client.get_metric_history(summary["run_id"], "validation/accuracy")) == 6
    assert len(client.get_metric_history(summary["run_id"], "system/memory_bytes_rank1")) == 6
    assert {found.dataset.name for found in run.inputs.dataset_inputs} == {"train", "validation", "test"}
    files = {
        found.path for folder in ("", "plots", "soft_prompt") for found in client.list_artifacts(summary["run_id"], folder)
    }
    assert files >= {
        "experiment.json",
        "predictions.json",
        "plots/loss.png",
        "labels.json",
        "plots/confusion.png",
        "plots/reliability.png",
        "plots/validation.png",
        "plots/words.png",
        "soft_prompt/card.json",
        "soft_prompt/adapter_config.json",
        "soft_prompt/adapter_model.safetensors",
    }

    with pytest.raises(UserError, match=r"a run of this name exists \(finished\); continue it with --resume, or choose"):
        start(tables, [])
    assert start(tables, [], resume=True) == summary
    tables["train"]["learning_rate"] = 0.1
    with pytest.raises(UserError, match="cannot be resumed with another train.learning_rate .*; undo the change"):
        start(tables, [], resume=True)


@pytest.mark.nightly
def test_a_cluster_that_is_gone_is_not_waited_for(tables: dict[str, Any]) -> None:
    imports = "import ray; from ptuning.config import Experiment; from ptuning.cluster.connection import start_ray"
    start = imports + "; start_ray(Experiment.model_validate({tables}))"
    with tempfile.TemporaryDirectory() as folder:  # short, sockets lie in it
        (Path(folder) / "ray").mkdir()
        (Path(folder) / "ray" / "ray_current_cluster").write_text("127.0.0.1:1")  # as `ray start` leaves it behind
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {"RAY_TMPDIR": folder}
        code = f"{start.format(tables=tables)}; print(len(ray.nodes()))"
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "1", done.stderr


def test_a_failed_run_says_why_and_can_be_resumed(tables: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    tables["compute"]["workers"] = 1
    source = torch.zeros(10, 32)
    source[0, 0] = 3e38  # finite in the file, not in the first layer
    card = soft_prompt.Card(name="x", base="x", length=10, width=32, content_hash=soft_prompt.content_hash(source))
    folder = str(Path(tables["compute"]["storage"]) / "poison")
    soft_prompt.SoftPrompt(source, card).save(folder)
    tables["prompt"] |= {"init": "soft-prompt", "init_from": folder}
    tables["train"] |= {"clip": 0.0}
    events: list[Event] = []
    try:
        start(tables, events)
    except RunFailed as error:
        assert "lower train.learning_rate" in str(error)
        record = json.loads(storage.read_file(str(Path(tables["compute"]["storage"]) / "toy"), "run.json"))
        assert record["status"] == "failed"
    else:
        pytest.fail("a loss that is not finite must fail the run")


def test_more_workers_than_the_cluster_has_is_a_sentence(tables: dict[str, Any]) -> None:
    tables["compute"]["workers"] = 8
    with pytest.raises(UserError) as refused:
        start(tables, [])
    assert str(refused.value) == (
        "compute.workers: 8 workers with 1 CPU each need 8, the cluster has 2; lower compute.workers or compute.cpus_per_worker"
    )
    assert not storage.exists(tables["compute"]["storage"], "toy")


def test_offloading_needs_gpus(tables: dict[str, Any]) -> None:
    tables["zero"] = {"offload": True}
    with pytest.raises(UserError, match="zero.offload: has no effect on workers without GPUs; remove it"):
        ray_trainer.scale(parse_experiment(tables))


def test_workers_may_be_a_range(tables: dict[str, Any]) -> None:
    tables["compute"]["workers"] = (1, 2)
    scaling = ray_trainer.scale(parse_experiment(tables))
    assert scaling.num_workers == (1, 2) and scaling.resources_per_worker == {"CPU": 1}


def test_experiments_travel_with_absolute_paths(
    tables: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    tables["data"]["train"] = "toy/train.jsonl"
    tables["compute"]["storage"] = "runs"
    resolved: Experiment = absolute(parse_experiment(tables))
    assert resolved.data.train == str(tmp_path / "toy/train.jsonl") and resolved.compute.storage == str(tmp_path / "runs")


@pytest.mark.nightly
def test_a_process_that_locks_up_at_its_end_is_ended() -> None:
    """It has said farewell to Ray, which no longer counts it, and yet it is there."""
    script = """
import atexit, os, time, ray
from ptuning.cluster import connection

connection.join_ray(None)

@ray.remote(num_cpus=0)
class Stuck:
    def pid(self):
        atexit.register(time.sleep, 600)
        return os.getpid()

    def leave(self):
        ray.actor.exit_actor()

stuck = Stuck.remote()
print(ray.get(stuck.pid.remote()))
stuck.leave.remote()
time.sleep(2)
connection.leave_ray()
"""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    pid = int(done.stdout.splitlines()[-1])
    with contextlib.suppress(psutil.NoSuchProcess):
        assert psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
