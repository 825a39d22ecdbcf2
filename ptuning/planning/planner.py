"""Plans training and serving from an experiment and some figures of a machine. Reads rows and a config, no weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import psutil
import torch
from transformers import PretrainedConfig

from ptuning.config import Experiment
from ptuning.data.resolve import resolved
from ptuning.data.task import describe_task, load_task
from ptuning.errors import BaseError, UserError
from ptuning.model.base import computes_in_bfloat16, find_base
from ptuning.model.limits import MOST_SLOTS
from ptuning.planning.capacity import Training, plan_serving
from ptuning.planning.estimate import Estimate
from ptuning.planning.meta_model import MetaModel, read_config
from ptuning.planning.placement import describe, place
from ptuning.planning.rates import CPU, GB, GPU, gpu_rate
from ptuning.planning.workload import LABEL_TOKENS, Machine, RunShape

FREE_SHARE, MOST_RANKS = 4, 1024
"""Free text is assumed to be a quarter of a row if there are no rows to count; the most ranks that are tried."""


def make_plan(
    experiment: Experiment,
    *,
    gpus: int,
    memory_gb: float | None = None,
    per_node: int = 8,
    network_gb: float | None = None,
    bandwidth_gb: float | None = None,
    tflops: float | None = None,
    config: str | None = None,
    tokens: int | None = None,
) -> Estimate:
    """Plan an experiment on `gpus` GPUs or, if 0, on `compute.workers` CPU workers of this machine.

    `network_gb`: GB/s of a node's whole network; `bandwidth_gb`: what a worker receives, regardless of it.

    Raises:
        UserError: no such base, rows that cannot be counted, or a batch that is too small for the number of workers.
    """
    ranks = gpus or experiment.compute.most_workers
    if experiment.train.batch_size < ranks:
        raise UserError(
            f"train.batch_size: {experiment.train.batch_size} rows cannot be split over {ranks} workers; "
            f"plan with train.batch_size={ranks}, or fewer workers"
        )
    usual = GPU if gpus else CPU | {"memory_gb": psutil.virtual_memory().total / GB / ranks}
    machine = Machine(
        ranks,
        int((memory_gb or usual["memory_gb"]) * GB),
        min(per_node, ranks),
        (bandwidth_gb or (gpu_rate(per_node, ranks > per_node, network_gb) if gpus else CPU["bandwidth_gb"])) * GB,
        (tflops or usual["tflops"]) * 1e12,
        bool(gpus),
        (bandwidth_gb or gpu_rate(per_node, nodes=False)) * GB if gpus else None,
    )
    described, dtype, settings, lines = _read(experiment, config, tokens, bool(gpus))
    text = described.get_text_config()
    context = getattr(text, "max_position_embeddings", None) or 2**31
    if settings.length + settings.tokens > context:
        raise UserError(
            f"data.max_tokens: {settings.length} virtual tokens and {settings.tokens} of text exceed the {context} positions "
            f"of the base; set it to at most {context - settings.length}"
        )
    meta_model = MetaModel(
        described,
        dtype,
        checkpoint_gradients=experiment.train.gradient_checkpointing,
        quantization=experiment.model.quantization,
    )
    wanted = settings
    settings = place(meta_model.shape, wanted, machine, meta_model.training, meta_model.evaluation)
    training = _training(meta_model, settings, machine)
    slots = training.most_slots(MOST_SLOTS)
    serving = plan_serving(
        meta_model.shape,
        settings,
        machine,
        meta_model.evaluation,
        cache=experiment.serve.cache_mb << 20,
        running=experiment.serve.running,
        resident=max(1, len(experiment.serve.soft_prompts)),
        new=max(settings.targets, settings.new_tokens),
        rows=experiment.serve.rows,
        parallel=experiment.serve.tensor_parallel,
        limit=experiment.serve.resident_mb << 20 if experiment.serve.resident_mb else None,
    )
    found = Estimate(
        experiment.name,
        config or experiment.model.path,
        ", ".join([str(dtype).removeprefix("torch."), *filter(None, [experiment.model.quantization])]),
        meta_model.shape,
        machine,
        settings,
        training.plan(1),
        slots,
        training.plan(slots) if slots else None,
        serving,
        describe(meta_model.shape, settings, machine),
        meta_model.estimated,
        [],
        lines,
    )
    advice = [] if found.fits else [_more_for_training(meta_model, dtype, wanted, machine)]
    advice += [] if found.serves else [_more_for_serving(found)]
    return replace(found, advice=advice)


def _read(
    experiment: Experiment, config: str | None, tokens: int | None, gpus: bool
) -> tuple[PretrainedConfig, torch.dtype, RunShape, list[str]]:
    """The base's config, its compute dtype, the size of the rows, and lines about the rows."""
    folder = Path(experiment.model.path).expanduser()
    bare = folder.suffix == ".json" or (folder.is_dir() and not any(folder.glob("*.safetensors")))
    tokens = tokens or experiment.data.max_tokens
    if config or bare:
        described = read_config(config or folder, experiment.model.trust_remote_code)
        wanted = experiment.model.dtype
        half = str(getattr(described, "dtype", None)) in ("torch.bfloat16", "torch.float16")
        dtype = torch.bfloat16 if half and (gpus or computes_in_bfloat16()) else torch.float32  # of the GPUs that are planned
        dtype = dtype if wanted == "auto" else getattr(torch, wanted)
        if tokens is None:
            raise UserError("data.max_tokens: is not set, and without a tokenizer rows cannot be counted; give --tokens")
        return described, dtype, _settings(experiment, tokens), []
    base = find_base(experiment.model)
    if tokens is not None:
        return base.config, base.dtype(experiment.model.dtype), _settings(experiment, tokens), []
    experiment, lines = resolved(experiment)
    task = load_task(experiment, base)
    split = task.train
    settings = RunShape.of_rows(experiment, split.lengths.tolist(), split.target_lengths.tolist())
    return base.config, base.dtype(experiment.model.dtype), settings, [*lines, *describe_task(task)]


def _settings(experiment: Experiment, tokens: int) -> RunShape:
    targets = LABEL_TOKENS if experiment.data.labels else max(1, tokens // FREE_SHARE)
    return RunShape.read(experiment, tokens, min(targets, tokens - 1))


def _training(meta_model: MetaModel, settings: RunShape, machine: Machine) -> Training:
    settings = place(meta_model.shape, settings, machine, meta_model.training, meta_model.evaluation)
    return Training(meta_model.shape, settings, machine, meta_model.training, meta_model.evaluation)


def _more_for_training(meta_model: MetaModel, dtype: torch.dtype, settings: RunShape, machine: Machine) -> str:
    """The changes that would make one soft prompt fit."""
    small = replace(settings, micro_batch=1)
    ways = [("train.micro_batch_size=1", meta_model, small)]
    recomputing = meta_model
    try:
        config = meta_model.model.base.config
        recomputing = MetaModel(config, dtype, checkpoint_gradients=True, quantization=meta_model.quantization)
        ways += [
            ("train.gradient_checkpointing=true", recomputing, settings),
            ("train.gradient_checkpointing=true train.micro_batch_size=1", recomputing, small),
        ]
    except BaseError:  # this base cannot recompute activations
        pass
    for words, way, changed in ways:
        if _training(way, changed, machine).most_slots(1):
            return f"training: fits with {words}"
    kind, ranks = "GPUs" if machine.gpus else "workers", 2 * machine.ranks
    while ranks <= MOST_RANKS:
        wider = replace(machine, ranks=ranks)
        changed = replace(small, batch=max(ranks, settings.batch))
        if _training(recomputing, changed, wider).most_slots(1):
            memory = f"of {machine.memory / GB:g} GB each"
            return f"training: {ranks} {kind} {memory} would be enough, with {ways[-1][0]}"
        ranks *= 2
    needed = _training(recomputing, replace(small, batch=MOST_RANKS), replace(machine, ranks=MOST_RANKS)).plan(1).needed
    return f"training: even {MOST_RANKS} {kind} need {needed / GB:.1f} GB each; use larger ones, or a smaller base"


def _more_for_serving(found: Estimate) -> str:
    serving = found.serving
    if serving.peak > found.machine.memory:
        place = "one GPU" if found.machine.gpus else "one worker"
        return f"serving: a replica needs {serving.peak / GB:.1f} GB on {place}; use a larger one, or a smaller base"
    return "serving: not one request fits into serve.cache_mb; raise it"
