"""`ptuning plan`: what fits into memory. Arguments are parsed first; torch is imported inside."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from ptuning import api
from ptuning.cli.options import ExperimentArgument, Json, Overrides, busy, fail, non_blank
from ptuning.config import read_experiment
from ptuning.errors import UserError

Gpus = Annotated[int, typer.Option("--gpus", min=0, help="GPUs, one per worker; 0: compute.workers CPU workers.")]


def plan(
    experiment: ExperimentArgument,
    overrides: Overrides = None,
    gpus: Gpus = 0,
    gpu_memory: Annotated[
        float | None,
        typer.Option("--gpu-memory", min=0.01, help="GB per GPU (80), or per CPU worker (its part of this machine)."),
    ] = None,
    per_node: Annotated[int, typer.Option("--per-node", min=1, help="GPUs per node.")] = 8,
    network: Annotated[
        float | None, typer.Option("--network", min=0.001, help="GB/s of a node's whole network; default: 50 per GPU.")
    ] = None,
    bandwidth: Annotated[
        float | None,
        typer.Option("--bandwidth", min=0.001, help="GB/s that a worker receives: with GPUs at most 300, on CPU 1."),
    ] = None,
    tflops: Annotated[
        float | None,
        typer.Option("--tflops", min=0.001, help="Tera-operations/s of a worker: 400 with GPUs, else 0.1."),
    ] = None,
    config: Annotated[
        str | None,
        typer.Option("--config", metavar="FILE", callback=non_blank, help="config.json of the base, instead of model.path."),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option("--tokens", min=2, help="Tokens per row; default: data.max_tokens, else counted.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Plan memory and time of training and serving, without weights.

    Shows the memory of a worker, the soft prompts that fit side by side, and the bytes and minimum time of a step.

    Example: ptuning plan jobs/sentiment.toml --config llama-70b.json --tokens 256 --gpus 8
    """
    try:
        settings = read_experiment(experiment, overrides or [])
        with busy("planning"):
            found = api.plan(
                settings, gpus=gpus, memory_gb=gpu_memory, per_node=per_node, network_gb=network,
                bandwidth_gb=bandwidth, tflops=tflops, config=config, tokens=tokens,
            )  # fmt: skip
    except UserError as error:
        fail(str(error), 2)
    if as_json:
        typer.echo(json.dumps(found.as_json()))
    else:
        typer.echo(str(found))
    if not (found.fits or found.serves):
        raise typer.Exit(1)
