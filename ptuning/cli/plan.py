"""`ptuning plan`: what fits into memory. Arguments are parsed first; torch and Ray are imported inside."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from ptuning.cli.options import ExperimentArgument, Json, Overrides, busy, fail, non_blank
from ptuning.config import read_experiment
from ptuning.errors import UserError

if TYPE_CHECKING:
    from ptuning.planning.planner import Estimate

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
    bandwidth: Annotated[
        float | None,
        typer.Option(
            "--bandwidth", min=0.001, help="GB/s that a worker receives: 300 within a node, 50 between nodes, 1 on CPU."
        ),
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
    """Plan the memory and time of training and serving, without weights.

    Shows the memory of a worker, the soft prompts that fit side by side, and the bytes and minimum time of a step.

    Example: ptuning plan jobs/sentiment.toml --config llama-70b.json --tokens 256 --gpus 8
    """
    try:
        settings = read_experiment(experiment, overrides or [])
        with busy("planning"):
            from ptuning.planning.planner import make_plan

            found = make_plan(
                settings, gpus=gpus, memory_gb=gpu_memory, per_node=per_node, bandwidth_gb=bandwidth, tflops=tflops,
                config=config, tokens=tokens,
            )  # fmt: skip
    except UserError as error:
        fail(str(error), 2)
    if as_json:
        typer.echo(json.dumps(found.as_json()))
    else:
        _show_plan(found)
    if not (found.fits or found.serves):
        raise typer.Exit(1)


def _show_plan(found: Estimate) -> None:
    machine, settings, one, serving = found.machine, found.settings, found.training, found.serving
    kind = "GPU" if machine.gpus else "CPU worker"
    typer.echo(
        f"{found.name}: {found.base}, {found.shape.numbers / 1e9:.2f} B parameters, {found.dtype}, "
        f"{found.shape.bytes / 1e9:.1f} GB, on {machine.ranks} {kind}{'s' if machine.ranks > 1 else ''} of "
        f"{_gb(machine.memory)} each, {settings.length} virtual tokens, {settings.batch} rows of {settings.tokens} tokens\n"
    )
    packed = found.packed if found.packed and found.packed.slots > 1 else None
    columns = [one, *([packed] if packed else [])]
    _row("training, per rank", *(f"{each.slots} slot{'s' if each.slots > 1 else ''}" for each in columns))
    for words, field in (
        ("taken before", "reserved"),
        ("share of the base", "share"),
        ("gathered, at most", "gathered"),
        ("activations, at most", "activations"),
        ("both, at most", "step"),
        ("an evaluation", "evaluation"),
        ("soft prompts, optimiser", "soft_prompts"),
        ("holes of the heap", "holes"),
        ("needed", "needed"),
    ):
        if field != "holes" or not machine.gpus:
            _row(f"  {words}", *(_gb(getattr(each, field)) for each in columns))
    _row("  gathered per step", *(_gb(each.received) for each in columns))
    _row("  gathered per trial-step", *(_gb(each.received / each.slots) for each in columns))
    _row("  step, at least", *(f"{each.seconds:.3g} s" for each in columns))
    _row("  trial-steps per second", *(f"{each.slots / each.seconds:.3g}" for each in columns))
    _row("  bound by", *(each.bound for each in columns))
    if one.node_copy:
        typer.echo("  every node keeps a second copy of the base, so gathers stay inside the node")
    typer.echo(f"  slots that fit: {found.slots if found.fits else 'not even one'}\n")
    _row("serving, a replica", "")
    for words, size in (
        ("taken before", serving.reserved),
        ("weights", serving.weights),
        ("keys and values (serve.cache_mb)", serving.cache),
        ("bank of soft prompts", serving.bank),
        ("a step", serving.step),
        ("needed", serving.peak),
    ):
        _row(f"  {words}", _gb(size))
    if found.serves:
        _row("  requests at once", str(serving.running))
        _row("  with serve.cache_mb at most", f"{max(0, serving.room) >> 20:,}: {serving.most_running:,} requests")
    for line in found.advice:
        typer.echo(f"does not fit: {line}")


def _row(words: str, *cells: str) -> None:
    typer.echo(f"{words:34}" + "".join(f"{cell:>16}" for cell in cells))


def _gb(size: float) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e7 else f"{size / 1e6:,.3g} MB"
