"""The best validation metric over budget, for several ways to search, replayed many times on a table of whole trainings.

The table is made once: every configuration of the experiment's grid (`search.trials` points) is trained to its end, packed,
and evaluated every few steps. A search is then a walk through the table, which costs nothing, so it is repeated with many
seeds. Random, TPE and ASHA are the product's own (`ptuning.searching.searcher`: Optuna's samplers, Ray Tune's ASHAScheduler),
told what a search would tell them. Learning rates are places on the table's scale, in their order. `grid` is nested loops in
a random order of the axes: a shuffled grid would be random search here.

Budget is counted in trial-steps. Wall time: trial-steps and evaluations at the speed measured with one and with all slots;
what it takes to start a trial is left out, which favours those that train one at a time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import optuna
import torch
from optuna.distributions import CategoricalDistribution, IntDistribution

from benchmarks.text_prompts import cut
from ptuning.cluster.local_paths import absolute
from ptuning.config import Experiment, read_experiment
from ptuning.data.task import load_task
from ptuning.model.base import find_base
from ptuning.model.prompted_model import PromptedModel
from ptuning.searching import space
from ptuning.searching.searcher import OptunaSearcher, make_scheduler
from ptuning.searching.space import INIT, LENGTH, RATE
from ptuning.searching.trial_store import TrialRecord, TrialStore
from ptuning.tracking import plots
from ptuning.training.distributed import Workers
from ptuning.training.loop import Pack, evaluate_slots, step
from ptuning.training.loop import train as train_slots
from ptuning.training.messages import Evaluated, Event, Failed, Finished, StartRun

SHARES = (0.05, 0.1, 0.2, 0.33, 0.5)
PATIENCE = 20
"""Times 30 draws of configurations that were all tried before, until a search counts as over."""
POINTS = 30
"""Points of a drawn curve: with more, `figures.curves` would smooth it."""


@dataclass(frozen=True)
class Method:
    """A way to search: what comes next, who is stopped, and how many train side by side."""

    algorithm: str
    scheduler: str
    packed: bool = False


METHODS = {
    "grid": Method("grid", "fifo"),
    "random": Method("random", "fifo"),
    "TPE": Method("tpe", "fifo"),
    "ASHA": Method("random", "asha"),
    "ASHA, packed": Method("random", "asha", packed=True),
    "TPE + ASHA, packed": Method("tpe", "asha", packed=True),
}


@dataclass
class Walk:
    """A trial on its way through its curve of the table: evaluations seen, and the best score among them."""

    curve: list[tuple[int, float, float]]
    trial: Any
    at: int = 0
    score: float = -math.inf


class Forgetful(TrialStore):
    """A ledger that stays in memory."""

    def _write(self) -> None:
        pass


class TableChooser(OptunaSearcher):
    """The product's chooser on the table's own learning rates, which it sees as places in their order."""

    def __init__(self, experiment: Experiment, axes: dict[str, list[Any]]) -> None:
        super().__init__(experiment, experiment.model_dump(mode="json"), "", Forgetful(""), lambda trial, entry: None)
        lists = {key: CategoricalDistribution(axes[key]) for key in (LENGTH, INIT)}
        self._distributions = {**lists, RATE: IntDistribution(0, len(axes[RATE]) - 1)}

    def _new(self) -> tuple[TrialRecord, optuna.Trial] | None:
        # A search gives up after some draws that were all tried before. In a real one, with a range of learning rates, that
        # does not happen; here it must not end the search before the table does.
        for _ in range(PATIENCE):
            found = super()._new()
            if found:
                return found
        return None


class NestedLoops:
    """A plain grid search: random order of the axes, each up or down. What a trial reaches changes nothing."""

    def __init__(self, axes: dict[str, list[Any]], seed: int) -> None:
        draw = random.Random(seed)
        places = {**axes, RATE: list(range(len(axes[RATE])))}
        order = draw.sample(list(places), len(places))
        values = [places[key][:: draw.choice((1, -1))] for key in order]
        self._points = iter([dict(zip(order, point, strict=True)) for point in itertools.product(*values)])

    def suggest(self, trial: str) -> dict[str, Any] | None:
        return next(self._points, None)

    def on_trial_complete(self, trial: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        pass


def make_table(experiment: Experiment, arguments: argparse.Namespace) -> dict[str, Any]:
    """Every configuration of the grid, trained to its end; kept in the file as it grows, so that it can be gone on with."""
    axes = space.grid(experiment)
    points = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    random.Random(0).shuffle(points)  # a pack has long and short ones
    out = Path(arguments.out)
    made: dict[str, Any] = {"axes": axes, "steps": experiment.train.steps, "every": experiment.train.evaluate_every}
    made |= {"metric": experiment.metric, "name": experiment.name, "rows": arguments.rows, "curves": {}}
    if out.exists():
        known = json.loads(out.read_text(encoding="utf-8"))["table"]
        same = all(known[key] == json.loads(json.dumps(made[key])) for key in made if key != "curves")
        assert same, f"{out} has another table; remove it"
        made = known
    waiting = [point for point in points if key_of(point) not in made["curves"]]
    if not waiting and "speed" in made:
        return made
    base = find_base(experiment.model)
    model = PromptedModel(base.load(base.dtype(experiment.model.dtype)))
    longest = experiment.prompt.model_copy(update={"length": max(experiment.search.length)})
    data = experiment.data.model_copy(update={"max_tokens": base.context - longest.length, "test": None})
    task = load_task(experiment.model_copy(update={"prompt": longest, "data": data}), base)
    assert task.validation
    task = replace(task, validation=cut(task.validation, arguments.rows))
    tables = experiment.model_copy(update={"data": data}).model_dump(mode="json")
    tables["train"]["checkpoint_every"] = experiment.train.steps

    def assign(point: dict[str, Any], folder: str) -> StartRun:
        name = f"t{points.index(point):03d}"
        return StartRun(Experiment.model_validate(space.trial_tables(tables, name, point)), f"{folder}/{name}")

    with tempfile.TemporaryDirectory() as folder:
        if "speed" not in made:
            made["speed"] = measure_speed(
                [assign(point, folder) for point in points[: arguments.slots]],
                lambda slots: Pack(model, base, Workers(), lambda experiment: task, slots),
            )
        found: dict[str, list[Any]] = {}

        def report(event: Event) -> None:
            point = points[int(event.run[1:])]
            if isinstance(event, Evaluated):
                found.setdefault(event.run, []).append([event.step, event.values[experiment.metric], event.values["loss"]])
            elif isinstance(event, (Finished, Failed)):
                made["curves"][key_of(point)] = found.get(event.run, [])
                out.write_text(json.dumps({"table": made}), encoding="utf-8")
                print(f"{len(made['curves'])} of {len(points)}: {point} {found.get(event.run, [])[-1:]}", flush=True)

        pack = Pack(model, base, Workers(), lambda experiment: task, arguments.slots)

        def source(free: int) -> list[StartRun] | None:
            if not waiting:
                return None
            now, waiting[:] = waiting[:free], waiting[free:]
            return [assign(point, folder) for point in now]

        train_slots(pack, source, report)
    return made


def measure_speed(assignments: Sequence[StartRun], make_pack: Any) -> dict[str, Any]:
    """Seconds of a trial-step and of a trial's evaluation, one at a time and side by side, over the same configurations."""
    groups = {"alone": [[assignment] for assignment in assignments], "packed": [list(assignments)]}
    seconds: dict[str, Any] = {"slots": len(assignments)}
    taken: dict[str, list[list[float]]] = {"alone": [], "packed": []}
    for name in ("alone", "packed", "packed", "alone"):
        stepping = evaluating = 0.0
        for group in groups[name]:
            pack = make_pack(len(group))
            for assignment in group:
                pack.attach(assignment)
            step(pack, lambda event: None)
            began = time.perf_counter()
            for _ in range(4):
                step(pack, lambda event: None)
            stepped = time.perf_counter()
            evaluate_slots(pack, pack.slots, "validation")
            stepping, evaluating = stepping + (stepped - began) / 4, evaluating + time.perf_counter() - stepped
        taken[name].append([stepping / len(assignments), evaluating / len(assignments)])
    for name, pairs in taken.items():
        seconds[name] = {"step_s": min(pair[0] for pair in pairs), "evaluation_s": min(pair[1] for pair in pairs)}
    return seconds


def key_of(point: dict[str, Any]) -> str:
    return f"{point[LENGTH]} {point[INIT]} {point[RATE]:.6g}"


def replay(experiment: Experiment, made: dict[str, Any], method: Method, seed: int) -> list[tuple[int, int, float]]:
    """One search on the table: trial-steps, evaluations and best metric after every evaluation."""
    axes, every = made["axes"], made["every"]
    sign = -1 if made["metric"] == "loss" else 1
    algorithm = "random" if method.algorithm == "grid" else method.algorithm
    search = {"algorithm": algorithm, "scheduler": method.scheduler, "seed": seed}
    searched = experiment.model_copy(update={"search": experiment.search.model_copy(update=search)})
    scheduler = make_scheduler(searched, Forgetful(""))
    chooser = NestedLoops(axes, seed) if method.algorithm == "grid" else TableChooser(searched, axes)
    controller: Any = None  # ASHA does not look at it
    running: dict[str, Walk] = {}
    path: list[tuple[int, int, float]] = []
    best, steps, started = -math.inf, 0, 0
    while True:
        while len(running) < (made["speed"]["slots"] if method.packed else 1):
            name = f"trial{started}"
            point = chooser.suggest(name)
            if not isinstance(point, dict):
                break
            running[name] = Walk(
                made["curves"][key_of({**point, RATE: axes[RATE][point[RATE]]})], SimpleNamespace(trial_id=name)
            )
            scheduler.on_trial_add(controller, running[name].trial)
            started += 1
        if not running:
            return path
        for name, walk in list(running.items()):
            steps += every
            if walk.at == len(walk.curve):  # it has diverged
                chooser.on_trial_complete(name, error=True)
                del running[name]
                continue
            at, value, _ = walk.curve[walk.at]
            walk.at, walk.score = walk.at + 1, max(walk.score, sign * value)
            best = max(best, walk.score)
            path.append((steps, len(path) + 1, sign * best))
            result = {"step": at, "score": walk.score, "training_iteration": walk.at}
            if scheduler.on_trial_result(controller, walk.trial, result) == "STOP" or at == made["steps"]:
                scheduler.on_trial_complete(controller, walk.trial, result)
                chooser.on_trial_complete(name, result)
                del running[name]


def reached(path: Sequence[tuple[float, float]], budget: float) -> float | None:
    """Best metric within a budget."""
    within = [value for spent, value in path if spent <= budget + 1e-9]
    return within[-1] if within else None


def quartiles(values: Sequence[float | None]) -> list[float] | None:
    """First quartile, median, third quartile; None while a search has nothing to show."""
    known = [value for value in values if value is not None]
    return np.quantile(known, (0.25, 0.5, 0.75)).tolist() if len(known) == len(values) else None


def budget(arguments: argparse.Namespace) -> None:
    """Best metric over budget for grid, random, TPE and ASHA, replayed on a table of whole trainings."""
    torch.set_num_threads(arguments.threads)
    experiment = absolute(read_experiment(arguments.experiment, ["search.trials=48", *arguments.overrides]))
    made = make_table(experiment, arguments)
    speed, whole = made["speed"], len(made["curves"]) * made["steps"]
    sign = -1 if made["metric"] == "loss" else 1
    finals = sorted((max(sign * value for _, value, _ in curve) for curve in made["curves"].values() if curve), reverse=True)
    print(f"{experiment.name}: {len(made['curves'])} configurations of {made['steps']} steps, {whole} trial-steps in all")
    print(
        f"best {sign * finals[0]:.4f}, median {sign * np.median(finals):.4f}, worst {sign * finals[-1]:.4f} ({made['metric']})"
    )
    alone, packed = (1 / speed[name]["step_s"] for name in ("alone", "packed"))
    print(f"alone {alone:.1f} trial-steps/s, {speed['slots']} side by side {packed:.1f}")
    curves: dict[str, dict[str, Any]] = {}
    for name, method in METHODS.items():
        rate = speed["packed" if method.packed else "alone"]
        paths = [replay(experiment, made, method, seed) for seed in range(arguments.seeds)]
        steps = [[(float(spent), best) for spent, _, best in path] for path in paths]
        seconds = [
            [(spent * rate["step_s"] + done * rate["evaluation_s"], best) for spent, done, best in path] for path in paths
        ]
        curves[name] = {"steps": steps, "seconds": seconds}
    limits = {
        "steps": float(whole),
        "seconds": whole * (speed["alone"]["step_s"] + speed["alone"]["evaluation_s"] / made["every"]),
    }
    results: dict[str, Any] = {"table": made, "limits": limits, "seeds": arguments.seeds, "methods": {}}
    for unit, limit in limits.items():
        budgets = [limit * place / POINTS for place in range(1, POINTS + 1)]
        lines: dict[str, list[tuple[int, float]]] = {}
        print(
            f"\nbest validation {made['metric']} within a share of {limit:,.0f} {'trial-steps' if unit == 'steps' else 's'}\n"
        )
        print("| search | " + " | ".join(f"{share:.0%}" for share in SHARES) + " |\n" + "|---" * (len(SHARES) + 1) + "|")
        for name, found in curves.items():
            points = [(spent, quartiles([reached(path, spent) for path in found[unit]])) for spent in budgets]
            lines[name] = [(round(spent), each[1]) for spent, each in points if each]
            shares = [quartiles([reached(path, limit * share) for path in found[unit]]) for share in SHARES]
            cells = [f"{each[1]:.3f} [{each[0]:.3f}, {each[2]:.3f}]" if each else "-" for each in shares]
            print(f"| {name} | {' | '.join(cells)} |")
            results["methods"].setdefault(name, {})[unit] = points
        picture = plots.curves(
            lines,
            f"{experiment.name}: median of {arguments.seeds} searches on the same {len(made['curves'])} configurations",
            f"best validation {made['metric']}",
            "trial-steps" if unit == "steps" else "seconds",
        )
        Path(arguments.out).with_suffix(f".{unit}.png").write_bytes(picture)
    Path(arguments.out).write_text(json.dumps(results), encoding="utf-8")


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The command `budget`."""
    command = commands.add_parser("budget", help=budget.__doc__)
    command.add_argument("experiment")
    command.add_argument("overrides", nargs="*")
    command.add_argument("--seeds", type=int, default=50)
    command.add_argument("--slots", type=int, default=8)
    command.add_argument("--rows", type=int, default=200, help="validation rows at most")
    command.add_argument("--threads", type=int, default=2)
    command.add_argument(
        "--out", default="budget.json", help="file for the table and the raw numbers (JSON); a half-made table is gone on with"
    )
    command.set_defaults(run=budget)
