"""More workers, and what stands around the steps: orchestration, the way from the command to the first step, checkpoints."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.bare import Steps, train_bare
from benchmarks.measuring import heading, line, tell_machine, tell_part, typical, write
from benchmarks.plan import SHAPES, make_base
from ptuning.config import Experiment, read_experiment
from ptuning.model.base import find_base
from ptuning.tracking import plots

WORKER = "RayTrainWorker"
"""In the title of a worker's process."""
LOOK_S = 0.25
"""Seconds between looks at the command's processes."""
NICENESS = 15
"""Of Ray's workers, and so of the plain processes beside them: else what other work on the machine takes from nicer processes
would count as Ray's."""


def settings(arguments: argparse.Namespace, *overrides: str) -> list[str]:
    """The overrides that both sides get: one thread for each worker, and the user's own last."""
    return ["compute.cpus_per_worker=1", *overrides, *arguments.overrides]


def only_steps(experiment: Experiment) -> Experiment:
    """The same without evaluations."""
    data = experiment.data.model_copy(update={"validation": None, "test": None})
    return experiment.model_copy(update={"data": data})


def workers(arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds and gathered bytes per step over the number of workers (plain processes, one thread each, the same global
    batch), whole bases (stage 0) and sharded ones (stage 3)."""
    found: dict[tuple[int, int], list[Steps]] = {(number, stage): [] for number in arguments.workers for stage in (0, 3)}
    for turn in range(arguments.pairs):
        for number, stage in list(found)[:: -1 if turn % 2 else 1]:
            overrides = settings(arguments, f"train.steps={arguments.steps}", f"zero.stage={stage}")
            experiment = only_steps(read_experiment(arguments.experiment, overrides))
            found[number, stage].append(train_bare(experiment, number))
    heading(
        "workers", "stage", "seconds per step (each run)", f"times as fast as {arguments.workers[0]}", "bytes gathered per step"
    )
    rows = []
    for (number, stage), runs in found.items():
        step = statistics.median(run.step_s for run in runs)
        alone = statistics.median(run.step_s for run in found[arguments.workers[0], stage])
        gathered = runs[0].bytes_per_step
        rows.append(
            {"workers": number, "stage": stage, "step_s": step, "bytes": gathered, "runs": [run.step_s for run in runs]}
        )
        each = ", ".join(f"{run.step_s:.3f}" for run in runs)
        line(number, stage, f"{step:.3f} ({each})", f"{alone / step:.2f}", f"{gathered:,}")
    return {"rows": rows}


class Watch:
    """When the workers of a command were first seen. Looks no longer than that: a look takes some milliseconds of a core."""

    def __init__(self, process: psutil.Process, workers: int) -> None:
        self.seen: dict[int, float] = {}
        self._process, self._workers = process, workers
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while len(self.seen) < self._workers and self._process.is_running():
            time.sleep(LOOK_S)
            with suppress(psutil.Error):
                for child in self._process.children(recursive=True):
                    with suppress(psutil.Error):
                        if child.pid not in self.seen and WORKER in " ".join(child.cmdline()):
                            self.seen[child.pid] = time.time()


def cpu_seconds(driver: psutil.Process) -> dict[str, float]:
    """Processor time so far of the command itself, its workers, and all other processes of Ray."""
    found = {"driver": sum(driver.cpu_times()[:2]), "workers": 0.0, "ray": 0.0}
    for child in driver.children(recursive=True):
        with suppress(psutil.Error):
            found["workers" if WORKER in " ".join(child.cmdline()) else "ray"] += sum(child.cpu_times()[:2])
    return found


def time_command(arguments: argparse.Namespace, overrides: Sequence[str], folder: str) -> dict[str, Any]:
    """Run `ptuning train`: the instants of its phases, in seconds from the start of its process, and the ends of its steps."""
    experiment = read_experiment(arguments.experiment, overrides)
    command = [sys.executable, "-m", "ptuning", "train", arguments.experiment, *overrides, f"compute.storage={folder}"]
    began = time.time()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    tree = psutil.Process(process.pid)
    watch = Watch(tree, experiment.compute.most_workers)
    said: list[tuple[str, float]] = []
    used: list[dict[str, float]] = []
    assert process.stderr is not None
    for words in process.stderr:
        said.append((words.strip(), time.time()))
        if words.startswith(("base loaded", f"step {experiment.train.steps}/{experiment.train.steps}  validation")):
            used.append(cpu_seconds(tree))
    code = process.wait()
    exited = time.time()
    if code:
        raise RuntimeError("\n".join(words for words, _ in said))
    records = [
        json.loads(words) for words in Path(folder, experiment.name, "tracking", "events.jsonl").read_text().splitlines()
    ]
    ends = [record["time"] for record in records if record["kind"] == "metrics" and "train/loss" in record["values"]]
    instants = {
        "rows": next(at for words, at in said if words.startswith("train:")),
        "ray": next(at for words, at in said if words.startswith("starting")),
        "placed": max(watch.seen.values()),
        "loaded": next(at for words, at in said if words.startswith("base loaded")),
        "first": ends[0] / 1000,
        "last": ends[-1] / 1000,
        "result": next(record["time"] / 1000 for record in records if record["kind"] == "finish"),
        "exit": exited,
    }
    cpu = {who: used[-1][who] - used[0][who] for who in used[0]}
    return {"instants": {phase: at - began for phase, at in instants.items()}, "ends_ms": ends, "cpu_s": cpu}


PHASES = {
    "rows": "imports, checks, rows read and tokenised",
    "ray": "Ray started, lease taken",
    "placed": "workers' processes there",
    "loaded": "their imports, process group, base loaded",
    "first": "rows on the workers, first step",
    "last": "all other steps, evaluations, checkpoints",
    "result": "test split, soft prompt, plots: result stands",
    "exit": "MLflow's last records, Ray's end, exit",
}


def command(arguments: argparse.Namespace) -> dict[str, Any]:
    """The whole command with Ray and MLflow against plain processes that run the same loop: seconds per step, the command's
    phases, and how long a checkpoint holds up training."""
    number = arguments.workers[0] if len(arguments.workers) == 1 else 2
    overrides = settings(arguments, f"compute.workers={number}", f"train.steps={arguments.steps}")
    experiment = read_experiment(arguments.experiment, overrides)
    commands: list[dict[str, Any]] = []
    runs: list[Steps] = []
    whole: list[float] = []
    for turn in range(arguments.pairs):
        for side in ("command", "bare") if turn % 2 == 0 else ("bare", "command"):
            if side == "command":
                with tempfile.TemporaryDirectory() as folder:
                    commands.append(time_command(arguments, overrides, folder))
            else:
                began = time.perf_counter()
                runs.append(train_bare(experiment, number, NICENESS))
                whole.append(time.perf_counter() - began)
    steps = {"command": [typical(one["ends_ms"]) for one in commands], "bare": [run.step_s for run in runs]}
    added = [mine / bare - 1 for mine, bare in zip(steps["command"], steps["bare"], strict=True)]
    heading("pair", "step in `ptuning train`, ms", "in plain processes, ms", "added", "whole command, s", "plain processes, s")
    for pair, share in enumerate(added):
        took = commands[pair]["instants"]["exit"]
        mine, bare = 1000 * steps["command"][pair], 1000 * steps["bare"][pair]
        line(pair + 1, f"{mine:.1f}", f"{bare:.1f}", f"{share:+.1%}", f"{took:.1f}", f"{whole[pair]:.1f}")
    print(f"\nAdded to a step by Ray and MLflow: {statistics.median(added):+.1%} (median of {len(added)} pairs)\n", flush=True)
    cpu = {who: statistics.median(one["cpu_s"][who] for one in commands) for who in commands[0]["cpu_s"]}
    print(
        "Processor time from the base loaded to the last step: "
        + ", ".join(f"{who} {value:.1f} s" for who, value in cpu.items())
    )
    print(flush=True)
    phases = tell_phases([one["instants"] for one in commands])
    saving = statistics.median(seconds for run in runs for seconds in run.saving_s)
    every = experiment.train.checkpoint_every
    share = saving / (every * statistics.median(steps["bare"]))
    print(f"\nA checkpoint takes {1000 * saving:.1f} ms: {share:.2%} of {every} steps (train.checkpoint_every)")
    return {
        "workers": number,
        "steps": steps,
        "added": added,
        "commands": commands,
        "bare_s": whole,
        "phases": phases,
        "checkpoint_s": saving,
        "checkpoint_share": share,
    }


def tell_phases(instants: list[dict[str, float]]) -> dict[str, float]:
    """Median seconds of each phase, from the end of the phase before it, as a table."""
    found, before = {}, [0.0] * len(instants)
    heading("phase", "seconds")
    for phase, words in PHASES.items():
        ends = [one[phase] for one in instants]
        found[phase] = statistics.median(end - begin for end, begin in zip(ends, before, strict=True))
        line(words, f"{found[phase]:.1f}")
        before = ends
    imports = "import ptuning.training.run, ptuning.training.loop"
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", imports], check=True, env=os.environ | {"TOKENIZERS_PARALLELISM": "false"})
    found["imports"] = time.perf_counter() - began
    line("of the first phase: imports alone (measured apart)", f"{found['imports']:.1f}")
    return found


PARTS = {"workers": workers, "command": command}


def scale(arguments: argparse.Namespace) -> None:
    """1, 2, 4 workers, whole and sharded bases; what Ray adds to a step and to a command; what a checkpoint costs."""
    torch.set_num_threads(1)
    results: dict[str, Any] = {"machine": tell_machine(1)}
    with tempfile.TemporaryDirectory() as folder:
        if arguments.shape:
            shape = next(shape for name, shape in SHAPES.items() if name.startswith(arguments.shape))
            dtype = getattr(torch, arguments.dtype)
            arguments.overrides.append(f"model.path={make_base(Path(folder, 'base'), dtype, **shape)}")
        arguments.overrides.append(f"model.dtype={arguments.dtype}")
        experiment = read_experiment(arguments.experiment, arguments.overrides)
        results["base"] = f"{find_base(experiment.model).numbers:,} parameters, {arguments.dtype}"
        print(f"base: {results['base']}", flush=True)
        for part in arguments.parts or list(PARTS):
            tell_part(PARTS[part])
            results[part] = PARTS[part](arguments)
    write(arguments.out, results, {"steps": picture(results["workers"]["rows"])} if "workers" in results else {})


def picture(rows: list[dict[str, Any]]) -> bytes:
    """Seconds per step over the number of workers."""
    history: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        history.setdefault(f"ZeRO stage {row['stage']}", []).append((row["workers"], row["step_s"]))
    return plots.curves(history, "The same global batch on more workers", "seconds per step", "workers")


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The command `scale`."""
    parser = commands.add_parser("scale", help=scale.__doc__)
    parser.add_argument("experiment")
    parser.add_argument("overrides", nargs="*", help="key=value")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), help="default: all")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4], help="a single number also holds for `command`")
    parser.add_argument("--shape", default="", help=f"a random base instead of the experiment's: {', '.join(SHAPES)}")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--pairs", type=int, default=2, help="runs of each setting, in turns")
    parser.add_argument("--out", help="file for the raw numbers (JSON); pictures go beside it")
    parser.set_defaults(run=scale)
