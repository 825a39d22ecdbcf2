"""The worker groups of Ray Train: their resources, and the modifications of Ray Train."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import ray
import ray.train
from ray._raylet import PlacementGroupID
from ray.exceptions import OutOfMemoryError
from ray.train import UserCallback
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks import BackendSetupCallback
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.failure_handling.default import DefaultFailurePolicy
from ray.train.v2._internal.execution.scaling_policy.fixed import FixedScalingPolicy
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

from ptuning.cluster.connection import own_cluster
from ptuning.cluster.resources import await_resources
from ptuning.config import Experiment
from ptuning.errors import CannotRun, UserError
from ptuning.redaction import redacted

FEWER = "lower compute.workers, or leave it out: the default is one worker for each GPU"

WITHOUT_GPUS = {"env_vars": {"CUDA_VISIBLE_DEVICES": ""}}
"""The runtime environment of workers without GPUs on a node with some. Ray (2.60) no longer hides them from such workers, which
would all use the first one."""


class _Trainer(TorchTrainer):
    """Ray Train without unneeded helper processes, each of which takes 2 s to start and 200 MB."""

    placement: str | None = None
    """Begin of the names of its placement groups. Who gives one removes what a killed controller leaves
    (`remove_placement_groups`)."""

    def _create_default_callbacks(self) -> list[Any]:
        # Private (2.60, train/v2/api/data_parallel_trainer.py): a version without this method does not call ours either.
        callbacks = super()._create_default_callbacks()  # type: ignore[misc]  # V2's, which ray's types do not know
        cleaned = own_cluster() or self.placement is not None
        idle = {"DatasetsCallback"} | ({"PlacementGroupCleanerCallback"} if cleaned else set())
        used = [each for each in callbacks if type(each).__name__ not in idle]
        for each in used:
            if isinstance(each, BackendSetupCallback):
                each.__class__ = _tolerate_out_of_memory()
        return used + ([_named_placement_groups(self.placement)] if self.placement else [])

    def _initialize_and_run_controller(self, **given: Any) -> Any:
        policy = given.get("scaling_policy")
        if own_cluster() and type(policy) is FixedScalingPolicy:
            policy.__class__ = _without_autoscaler_requests()
        retrying = given.get("failure_policy")
        if type(retrying) is DefaultFailurePolicy:
            retrying.__class__ = _without_useless_retries()
        return super()._initialize_and_run_controller(**given)  # type: ignore[misc]


def _named_placement_groups(begin: str) -> ControllerCallback:
    """A local class, as in `_tolerate_out_of_memory`."""

    class NamedPlacementGroups(ControllerCallback):
        def after_controller_start(self, train_run_context: Any) -> None:
            # In the controller's process. Train's groups have no names (2.60, execution/worker_group/worker_group.py), and
            # nothing says whose they are when a controller was killed.
            import uuid

            from ray.train.v2._internal.execution.worker_group import worker_group

            module: Any = worker_group
            made = module.placement_group

            def named(*given: Any, **more: Any) -> Any:
                return made(*given, name=f"{begin}-{uuid.uuid4().hex}", **more)

            module.placement_group = named

    return NamedPlacementGroups()


def remove_placement_groups(begin: str) -> None:
    """Remove the placement groups whose names begin so, and with them the processes that are left in them."""
    for key, group in placement_group_table().items():
        if str(group["name"]).startswith(f"{begin}-") and group["state"] != "REMOVED":
            remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(key))))


def _tolerate_out_of_memory() -> type[BackendSetupCallback]:
    """A local class: it is pickled by value for Train's controller, so that process does not import this package."""

    class TolerateOutOfMemory(BackendSetupCallback):
        def before_execution_group_shutdown(self, execution_group: Any) -> None:
            # Ray's own tolerates only RayActorError (2.60). A worker that the memory monitor killed raises OutOfMemoryError: it
            # ended the run as an error of the controller, without a retry, and the placement group was never removed.
            with suppress(OutOfMemoryError):
                super().before_execution_group_shutdown(execution_group)

    return TolerateOutOfMemory


def _without_autoscaler_requests() -> type[FixedScalingPolicy]:
    """A local class, as in `_tolerate_out_of_memory`."""

    class NoAutoscalerRequests(FixedScalingPolicy):
        # A controller first calls the actor that talks to the autoscaler (2.60), and workers wait until that actor has started.
        def _send_resource_request(self) -> None:
            pass

        def _maybe_send_resource_request(self) -> None:
            pass

        def _cancel_resource_request(self) -> None:
            pass

    return NoAutoscalerRequests


def _without_useless_retries() -> type[DefaultFailurePolicy]:
    """A local class, as in `_tolerate_out_of_memory`."""
    permanent = f"{CannotRun.__module__}.{CannotRun.__name__}"

    class NoUselessRetries(DefaultFailurePolicy):
        # Ray's own restarts the workers after any of their errors (2.60).
        def _is_retryable_error(self, training_failed_error: Any) -> bool:
            failures = getattr(training_failed_error, "worker_failures", None) or {}
            if any(permanent in str(failure) for failure in failures.values()):
                return False
            return bool(super()._is_retryable_error(training_failed_error))

    return NoUselessRetries


def gpus_per_worker(experiment: Experiment, have: Mapping[str, float]) -> int:
    """`compute.gpus_per_worker` on a cluster that has these resources."""
    given = experiment.compute.gpus_per_worker
    return given if given is not None else int(have.get("GPU", 0) >= 1)


def scale(
    experiment: Experiment, groups: int = 1, spare: float = 0.0, say: Callable[[str], None] = lambda line: None
) -> ray.train.ScalingConfig:
    """Workers of a group and their resources, which the cluster has when this returns; each worker leaves the fraction `spare`
    of its CPUs to other processes. `say`: what is waited for.

    Raises:
        UserError: the cluster cannot have these resources, or not in time. Ray Train would wait for ever.
    """
    compute = experiment.compute
    have = ray.cluster_resources()
    gpus = gpus_per_worker(experiment, have)
    workers = compute.workers
    if workers is None:
        workers = max(1, min(int(have.get("GPU", 0)) // groups, experiment.train.batch_size)) if gpus else 1
    least, most = workers if isinstance(workers, tuple) else (workers, workers)
    local = len(ray.nodes()) == 1
    cpus = compute.cpus_per_worker or (max(1, int(have.get("CPU", 1) // (most * groups))) if local else 1)
    who = f"compute.workers: {least} workers" if groups == 1 else f"compute.workers: {groups} groups of {least} workers"
    fixes = {"CPU": "lower compute.workers or compute.cpus_per_worker", "GPU": FEWER}
    await_resources(groups * least, {"CPU": cpus, "GPU": gpus}, who, fixes, compute.wait_s, say)
    if experiment.zero.offload and not gpus:
        raise UserError("zero.offload: has no effect on workers without GPUs; remove it")
    resources = {"CPU": cpus * (1 - spare)} | ({"GPU": gpus} if gpus else {})
    # ray's types describe Train V1; V2, the default since 2.51, takes (min, max) and more limits on failures.
    scaling: Any = ray.train.ScalingConfig
    return scaling(num_workers=workers, use_gpu=bool(gpus), resources_per_worker=resources)


def for_workers(experiment: Experiment) -> dict[str, Any]:
    """The tables of an experiment without passwords: workers do not need them, and Ray stores and shows the workers' config."""
    tables = experiment.model_dump(mode="json")
    return tables | {table: redacted(tables[table]) for table in ("tracking", "compute")}


def make_trainer(
    experiment: Experiment,
    attempt: str,
    scaling: ray.train.ScalingConfig,
    work: Callable[[dict[str, Any]], None],
    config: dict[str, Any],
    placement: str | None = None,
) -> TorchTrainer:
    """A Ray Train run of workers that call `work` with `config`. Ray's own files go to `attempt`. `placement`: see `_Trainer`.

    `work` is a local function, which is pickled by value and imports on the worker, so each side loads only what it needs.
    """
    failures: Any = ray.train.FailureConfig
    run: Any = ray.train.RunConfig
    trainer = _Trainer(
        work,
        train_loop_config={"experiment": for_workers(experiment), "threads": None} | config,
        scaling_config=scaling,
        run_config=run(
            name=uuid.uuid4().hex,
            storage_path=attempt,
            worker_runtime_env=WITHOUT_GPUS if not scaling.use_gpu and ray.cluster_resources().get("GPU") else None,
            callbacks=[_report_failures(experiment.name, config["events"])],
            failure_config=failures(max_failures=experiment.compute.max_failures, controller_failure_limit=3),
        ),
    )
    trainer.placement = placement
    return trainer


def _report_failures(run: str, queue: Any) -> Any:  # ray's types know Train V1's callbacks only
    """Reports worker failures immediately, not only after the last retry.

    A local class, as in `_tolerate_out_of_memory`."""

    class FailureReporter(UserCallback):
        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            workers = [str(each) for each in worker_exceptions.values()]
            event = {"kind": "broken", "run": run, "step": 0, "details": {"workers": workers}}
            queue.put.remote([event])

    return FailureReporter()
