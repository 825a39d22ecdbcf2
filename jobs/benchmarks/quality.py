"""What a soft prompt reaches on a task, beside text in its place, PEFT's prompt tuning, LoRA and full fine-tuning.

Same base, rows, steps and seeds for all; the best step and every choice (text prompt, learning rate of LoRA and full
fine-tuning) is made on the validation rows. Ours and PEFT's prompt tuning train at the experiment's learning rate. Ours, LoRA
and full fine-tuning train with the experiment's objective (`--set train.objective=text` for the other), PEFT with its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers import RATES, Learned, prompt_tuning, weights
from benchmarks.text_prompts import cut, text_prompts
from ptuning.cluster.local_paths import absolute
from ptuning.config import Experiment, read_experiment
from ptuning.data.task import Task, load_task
from ptuning.model.base import Base, find_base
from ptuning.model.prompted_model import PromptedModel
from ptuning.searching.space import trial_tables
from ptuning.training.distributed import Workers
from ptuning.training.loop import Pack
from ptuning.training.loop import train as train_slots
from ptuning.training.messages import Evaluated, Event, Failed, Finished, StartRun
from ptuning.training.run_record import RUN
from ptuning.training.slot import with_learning_rate

METHODS = ("text", "peft", "ours", "lora", "full")
NEAR = 0.9
"""Share of the better one's final validation score whose step is compared."""
COLUMNS = {
    "majority": "majority",
    "nothing": "zero-shot",
    "text": "best text",
    "examples": "few-shot",
    "peft": "PEFT prompt tuning",
    "ours": "ours",
    "searched": "ours, searched",
    "lora": "LoRA",
    "full": "full fine-tuning",
}


def soft_prompts(experiment: Experiment, base: Base, model: PromptedModel, task: Task, seeds: int) -> list[Learned]:
    """The experiment with several seeds, side by side."""
    metric = "accuracy" if experiment.data.labels else "rouge_l"
    events: dict[str, list[Event]] = {}
    began = time.perf_counter()

    def report(event: Event) -> None:
        assert not isinstance(event, Failed), event
        events.setdefault(event.run, []).append(event)

    with tempfile.TemporaryDirectory() as folder:
        pack = Pack(model, base, Workers.current(), lambda experiment: task)
        orders = []
        for seed in range(seeds):
            train = experiment.train.model_copy(update={"seed": seed, "checkpoint_every": experiment.train.steps})
            each = experiment.model_copy(update={"name": f"seed-{seed}", "train": train})
            orders.append(StartRun(each, f"{folder}/{seed}"))
        assignments = iter([orders])
        train_slots(pack, lambda free: next(assignments, None), report)
    seconds = round((time.perf_counter() - began) / seeds, 1)
    found = []
    for happened in events.values():
        curve = [(event.step, event.values[experiment.metric]) for event in happened if isinstance(event, Evaluated)]
        assert isinstance(happened[-1], Finished)
        end = happened[-1].values
        best = end[f"validation_{experiment.metric}"]
        found.append(Learned(experiment.train.peak, curve, best, end[f"test_{metric}"], seconds, end))
    return found


def tuned(method: str, experiment: Experiment, base: Base, task: Task, seeds: int) -> list[Learned]:
    """LoRA or full fine-tuning: seed 0 with each learning rate, the other seeds with the best one."""
    sign = -1 if experiment.metric == "loss" else 1
    tried = [weights(method, experiment, base, task, 0, rate) for rate in RATES[method]]
    best = max(tried, key=lambda learned: sign * learned.best)
    return [best, *(weights(method, experiment, base, task, seed, best.rate) for seed in range(1, seeds))]


def winner(experiment: Experiment, storage: str) -> Experiment:
    """The experiment with what a finished search of its name in `storage` has chosen."""
    record = json.loads(Path(storage, experiment.name, RUN).read_text(encoding="utf-8"))
    tables = experiment.model_dump(mode="json")
    changed = trial_tables(tables, experiment.name, record["summary"]["winner"]["values"])
    changed["data"]["test"] = experiment.data.test
    return Experiment.model_validate(changed)


def examine(experiment: Experiment, arguments: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """All that was asked for on one task, as it comes."""
    base = find_base(experiment.model)
    model = PromptedModel(base.load(base.dtype(experiment.model.dtype)))
    pack = Pack(model, base, Workers.current(), lambda _: task)
    experiment = with_learning_rate(experiment, pack.embed, base.vocabulary)
    task = load_task(experiment, base)
    assert task.validation and task.test, "a task needs validation and test rows"
    task = replace(task, validation=cut(task.validation, arguments.rows), test=cut(task.test, arguments.test_rows))
    assert task.validation and task.test
    train = experiment.train
    yield "metric", "accuracy" if experiment.data.labels else "rouge_l"
    yield "rows", {"train": len(task.train), "validation": len(task.validation), "test": len(task.test)}
    yield "steps", train.steps
    if experiment.data.labels:
        counts = Counter(task.test.rows["label"])
        yield "majority", {"test": max(counts.values()) / sum(counts.values())}
    if "text" in arguments.methods:
        yield from text_prompts(experiment, base, model, task).items()
    if "ours" in arguments.methods:
        yield "ours", described(soft_prompts(experiment, base, model, task, arguments.seeds))
    if "peft" in arguments.methods:
        yield "peft", described([prompt_tuning(experiment, base, model, task, seed) for seed in range(arguments.seeds)])
    if arguments.searched:
        chosen = winner(experiment, arguments.searched)
        other = load_task(chosen, base)
        other = replace(other, validation=task.validation, test=task.test)
        values = {"length": chosen.prompt.length, "learning_rate": chosen.train.learning_rate, "init": chosen.prompt.init}
        yield "searched", described(soft_prompts(chosen, base, model, other, arguments.seeds)) | values
    for method in RATES:
        if method in arguments.methods:
            yield method, described(tuned(method, experiment, base, task, arguments.seeds))


def described(runs: Sequence[Learned]) -> dict[str, Any]:
    """Mean and range of the test metric over seeds."""
    reached = [run.test for run in runs]
    found: dict[str, Any] = {"test": statistics.fmean(reached), "low": min(reached), "high": max(reached)}
    return found | {"validation": statistics.fmean(run.best for run in runs), "runs": [asdict(run) for run in runs]}


def near(ours: dict[str, Any], theirs: dict[str, Any]) -> tuple[float, list[int | None], list[int | None]]:
    """90 % of the better final validation score, and the first evaluation of each seed that reaches it."""
    goal = NEAR * max(ours["validation"], theirs["validation"])

    def first(run: dict[str, Any]) -> int | None:
        return next((step for step, value in run["curve"] if value >= goal), None)

    return goal, [first(run) for run in ours["runs"]], [first(run) for run in theirs["runs"]]


def table(results: dict[str, dict[str, Any]]) -> str:
    """The results as Markdown: the test metric, and the steps to 90 % of the final validation score."""
    lines = ["| task | " + " | ".join(COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, found in results.items():
        cells = []
        for key in COLUMNS:
            each = found.get(key)
            cells.append(
                "-"
                if not each
                else f"{each['test']:.3f}" + (f" [{each['low']:.3f}, {each['high']:.3f}]" if "low" in each else "")
            )
        lines.append(f"| {name} ({found['metric']}) | {' | '.join(cells)} |")
    lines += [
        "",
        "| task | 90 % of the final validation score | ours, step per seed | PEFT, step per seed |",
        "|---|---|---|---|",
    ]
    for name, found in results.items():
        if "ours" in found and "peft" in found and found["metric"] == "accuracy":
            goal, *steps = near(found["ours"], found["peft"])
            ours, theirs = (", ".join(str(step or "never") for step in seeds) for seeds in steps)
            lines.append(f"| {name} | {goal:.3f} | {ours} | {theirs} |")
    return "\n".join(lines)


def quality(arguments: argparse.Namespace) -> None:
    """Soft prompts against text prompts, PEFT's prompt tuning, LoRA and full fine-tuning, for each experiment file; a file of
    earlier results is added to."""
    torch.set_num_threads(arguments.threads)
    out = Path(arguments.out) if arguments.out else None
    results: dict[str, dict[str, Any]] = json.loads(out.read_text(encoding="utf-8")) if out and out.exists() else {}
    for path in arguments.experiments:
        experiment = absolute(read_experiment(path, ["model.dtype=float32", *arguments.set]))
        found = results.setdefault(experiment.name, {})
        began = time.perf_counter()
        for key, value in examine(experiment, arguments):
            found[key] = value
            if isinstance(value, dict) and "test" in value and key in COLUMNS:
                print(
                    f"{experiment.name}, {COLUMNS[key]}: {value['test']:.3f} ({time.perf_counter() - began:.0f} s)", flush=True
                )
            if out:
                out.write_text(json.dumps(results, indent=1), encoding="utf-8")
    print(table(results))


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The command `quality`."""
    command = commands.add_parser("quality", help=quality.__doc__)
    command.add_argument("experiments", nargs="+")
    command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="an override for all of them")
    command.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, metavar="METHOD", help=", ".join(METHODS))
    command.add_argument(
        "--searched", metavar="STORAGE", help="storage of finished searches of the same names: adds their winners"
    )
    command.add_argument("--seeds", type=int, default=3)
    command.add_argument("--rows", type=int, help="validation rows at most")
    command.add_argument("--test-rows", type=int, help="test rows at most")
    command.add_argument("--threads", type=int, default=2)
    command.add_argument("--out", help="file for the raw numbers (JSON)")
    command.set_defaults(run=quality)
