"""Workers and replicas on machines with GPUs, counted as Ray counts them. No GPU is needed: Ray takes their number as given."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from conftest import REPOSITORY
from support.training import experiment

from ptuning.cluster import resources
from ptuning.config import read_experiment
from ptuning.errors import UserError
from ptuning.serving import deployment, server
from ptuning.training import ray_trainer


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """One node with this many GPUs and 16 CPUs."""

    def machine(gpus: int) -> None:
        amounts = {"CPU": 16.0} | ({"GPU": float(gpus)} if gpus else {})
        for name, value in (("cluster_resources", amounts), ("available_resources", amounts), ("nodes", [{}])):
            monkeypatch.setattr(ray, name, lambda value=value: value)
        monkeypatch.setattr(ray, "is_initialized", lambda: True)
        monkeypatch.setattr(resources, "can_grow", lambda: False)

    return machine


@pytest.mark.fast
@pytest.mark.parametrize("file", sorted((REPOSITORY / "jobs").glob("*.toml")), ids=lambda file: file.stem)
def test_every_file_of_the_project_runs_on_one_gpu(file: Any, machine: Any) -> None:
    machine(1)
    scaling = ray_trainer.scale(read_experiment(file), 1, 0.25)
    assert (scaling.num_workers, scaling.use_gpu, scaling.resources_per_worker) == (1, True, {"CPU": 12.0, "GPU": 1})


@pytest.mark.fast
@pytest.mark.parametrize(
    ("gpus", "groups", "given", "expected"),
    [
        (0, 1, {}, (1, False)),
        (1, 1, {}, (1, True)),
        (4, 1, {}, (4, True)),
        (4, 2, {}, (2, True)),
        (64, 1, {}, (8, True)),  # the rows of a batch
        (4, 1, {"compute__workers": 2}, (2, True)),
        (4, 1, {"compute__workers": 2, "compute__gpus_per_worker": 0}, (2, False)),
        (4, 1, {"compute__gpus_per_worker": 0}, (1, False)),
        (4, 1, {"compute__workers": [1, 3]}, ((1, 3), True)),
    ],
)
def test_workers_are_as_many_as_gpus(
    toy_task: SimpleNamespace, machine: Any, gpus: int, groups: int, given: Any, expected: Any
):
    machine(gpus)
    scaling = ray_trainer.scale(experiment(toy_task, **given), groups)
    assert (scaling.num_workers, scaling.use_gpu) == expected


@pytest.mark.fast
def test_too_many_workers_for_the_gpus_are_refused(toy_task: SimpleNamespace, machine: Any) -> None:
    machine(1)
    with pytest.raises(UserError) as refused:
        ray_trainer.scale(experiment(toy_task, compute__workers=2))
    assert str(refused.value) == (
        "compute.workers: 2 workers with 1 GPU each need 2, the cluster has 1; lower compute.workers, or leave it out: "
        "the default is one worker for each GPU"
    )


@pytest.mark.fast
@pytest.mark.parametrize(("gpus", "given", "many", "hidden"), [(0, None, 0, False), (2, None, 1, False), (2, 0.0, 0, True)])
def test_a_replica_has_a_gpu_or_sees_none(
    toy_task: SimpleNamespace, machine: Any, gpus: int, given: float | None, many: float, hidden: bool
) -> None:
    machine(gpus)
    served = experiment(toy_task, serve={"gpus_per_replica": given} if given is not None else {})
    options = deployment.application(served, {})._bound_deployment.ray_actor_options
    assert options["num_gpus"] == many
    assert (options.get("runtime_env", {}).get("env_vars", {}) == {"CUDA_VISIBLE_DEVICES": ""}) == hidden
    server._await_resources(served, print)
    with pytest.raises(UserError, match="serve.replicas: 3 replicas with .* lower serve.replicas or serve.gpus_per_replica"):
        server._await_resources(experiment(toy_task, serve={"replicas": 3, "gpus_per_replica": 1.0}), print)


@pytest.mark.fast
@pytest.mark.parametrize(("gpus", "given", "environment"), [(0, None, None), (2, 1, None), (2, 0, ray_trainer.WITHOUT_GPUS)])
def test_gpus_are_hidden_from_workers_that_ask_for_none(
    toy_task: SimpleNamespace, machine: Any, tmp_path: Any, gpus: int, given: int | None, environment: Any
) -> None:
    machine(gpus)
    tried = experiment(toy_task, **({} if given is None else {"compute__gpus_per_worker": given}))
    trainer = ray_trainer.make_trainer(tried, str(tmp_path), ray_trainer.scale(tried), print, {"events": None})
    assert trainer.run_config.worker_runtime_env == (environment or {})


SCRIPT = """
import json, os, sys
import ray
from ptuning.config import Experiment
from ptuning.training.ray_trainer import make_trainer, scale

def work(config):
    import os
    import ray
    return {"visible": os.environ.get("CUDA_VISIBLE_DEVICES"), "gpus": len(ray.get_gpu_ids())}

ray.init(num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=False)
tables = json.loads(sys.argv[1])
for gpus in (None, 0):
    tables["compute"]["gpus_per_worker"] = gpus
    experiment = Experiment.model_validate(tables)
    scaling = scale(experiment)
    if gpus is None:  # to start it would need a GPU
        print(json.dumps([scaling.num_workers, scaling.use_gpu]))
    else:
        result = make_trainer(experiment, sys.argv[2], scaling, work, {"events": None}).fit()
        print(json.dumps(result.return_value))
"""


@pytest.mark.nightly
@pytest.mark.cluster
@pytest.mark.slow
def test_workers_without_gpus_see_none(toy_task: SimpleNamespace, tmp_path: Any) -> None:
    """On a node with a GPU, in a real cluster."""
    arguments = [sys.executable, "-c", SCRIPT, json.dumps(toy_task.experiment), str(tmp_path / "ray")]
    done = subprocess.run(arguments, cwd=REPOSITORY, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line[:1] in "[{"]
    assert found == [[1, True], {"visible": "", "gpus": 0}]
