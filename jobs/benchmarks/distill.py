"""What is left of a text prompt after it was distilled into a soft prompt: accuracy, agreement, tokens, time.

Two texts per task: the hand-written instruction (`text_prompts.json`) and the list of training rows with their labels that are
best on the validation rows. The soft prompts learn from the inputs of the training rows; no label enters their loss or
the choice of the best step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.quality import soft_prompts
from benchmarks.text_prompts import WRITTEN, cut, few_shot
from ptuning.cluster.local_paths import absolute
from ptuning.config import Experiment, read_experiment
from ptuning.data.dataset import Split
from ptuning.data.encoder import Encoder
from ptuning.data.task import load_task
from ptuning.model.base import Base, find_base
from ptuning.model.packing import pack_labels
from ptuning.model.prompted_model import PromptedModel
from ptuning.settings.template import fill, template_fields
from ptuning.training.distributed import Workers
from ptuning.training.evaluate import evaluate
from ptuning.training.loop import Pack

QUESTIONS = 40
"""Questions whose time is measured, in alternating order."""


def taught_by(experiment: Experiment, text: str) -> Experiment:
    """The experiment with a teacher."""
    data = experiment.data.model_copy(update={"teacher": text})
    train = experiment.train.model_copy(update={"objective": "distill", "text_weight": "auto"})
    return experiment.model_copy(update={"data": data, "train": train})


def accuracy(experiment: Experiment, base: Base, model: PromptedModel, rows: int) -> float | None:
    """The teacher's accuracy on validation rows; None if its text and a row do not fit."""
    from ptuning.errors import UserError

    try:
        task = load_task(experiment.model_copy(update={"data": experiment.data.model_copy(update={"test": None})}), base)
    except UserError:
        return None
    assert task.validation
    one = replace(task, validation=cut(task.validation, rows), test=None, train=cut(task.train, 1))
    short = experiment.model_copy(update={"train": experiment.train.model_copy(update={"steps": 1})})
    taught = Pack(model, base, Workers.current(), lambda each: task).teacher.teach(one, short)
    [found] = evaluate(model, [torch.zeros(1, base.width)], taught.validation, task.encoder, Workers.current())  # type: ignore[arg-type]
    return found.metrics["teacher_accuracy"]


def texts(experiment: Experiment, base: Base, tokens: int) -> Iterator[tuple[str, str]]:
    """Candidates: (kind, text). Examples have about so many tokens."""
    for text in json.loads(WRITTEN.read_text(encoding="utf-8")).get(experiment.name, {"instructions": []})["instructions"]:
        yield "instruction", text
    data = experiment.data
    labels = tuple(fill(data.target, dict.fromkeys(template_fields(data.target), label)) for label in data.labels or ())
    train = load_task(experiment, base).train
    for seed in range(3):
        found = ""
        for shots in range(4, 200):
            longer = few_shot(labels, train, shots, seed)
            if len(base.tokenizer(longer)["input_ids"]) > tokens:
                break
            found = longer
        if found:
            yield "examples", found


@torch.no_grad()
def seconds(model: PromptedModel, encoder: Encoder, split: Split, soft_prompt: Tensor) -> tuple[float, float]:
    """Median time of one question behind the text, and behind the soft prompt. Nothing is cached."""
    trie, nothing = encoder.label_trie, torch.zeros(0, soft_prompt.shape[-1])
    sides: list[list[float]] = [[], []]
    for row in range(min(QUESTIONS, len(split))):
        asked = [(nothing, split.teacher_row(row)), (soft_prompt, split.row(row)[0])]
        for side in (0, 1) if row % 2 else (1, 0):
            vectors, ids = asked[side]
            plan = pack_labels([len(vectors)], [[ids]], trie)
            began = time.perf_counter()
            model([vectors], plan)
            sides[side].append(time.perf_counter() - began)
    return statistics.median(sides[0]), statistics.median(sides[1])


def examine(experiment: Experiment, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row of results for each kind of text."""
    base = find_base(experiment.model)
    model = PromptedModel(base.load(base.dtype(experiment.model.dtype)))
    best: dict[str, tuple[float, str]] = {}
    for kind, text in texts(experiment, base, arguments.tokens):
        value = accuracy(taught_by(experiment, text), base, model, arguments.rows)
        if value is not None and (kind not in best or value > best[kind][0]):
            best[kind] = value, text
    for kind, (_, text) in best.items():
        taught = taught_by(experiment, text)
        task = load_task(taught, base)
        runs = soft_prompts(taught, base, model, task, arguments.seeds)
        ends = [run.end for run in runs]
        slow, quick = seconds(model, task.encoder, task.test, torch.randn(experiment.prompt.length, base.width))  # type: ignore[arg-type]
        yield {
            "task": experiment.name,
            "kind": kind,
            "tokens": int(ends[0]["teacher_tokens"]),
            "teacher": ends[0]["test_teacher_accuracy"],
            "accuracy": [end["test_accuracy"] for end in ends],
            "agreement": [end["test_agreement"] for end in ends],
            "seconds": [slow, quick],
        }


def spread(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def distill(arguments: argparse.Namespace) -> None:
    """Text prompts distilled into soft prompts, for each experiment file."""
    torch.set_num_threads(arguments.threads)
    results = []
    print("| task, text | tokens | accuracy of the text | of the soft prompt | kept | agreement | time of a question |")
    print("|---" * 7 + "|")
    for path in arguments.experiments:
        experiment = absolute(read_experiment(path, ["model.dtype=float32", *arguments.set]))
        for found in examine(experiment, arguments):
            results.append(found)
            kept = statistics.fmean(found["accuracy"]) / found["teacher"]
            slow, quick = found["seconds"]
            cells = [
                f"{found['task']}, {found['kind']}",
                str(found["tokens"]),
                f"{found['teacher']:.3f}",
                spread(found["accuracy"]),
                f"{kept:.1%}",
                spread(found["agreement"]),
                f"{quick / slow:.2f} of {1000 * slow:.0f} ms",
            ]
            print(f"| {' | '.join(cells)} |", flush=True)
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(results, indent=1), encoding="utf-8")


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The command `distill`."""
    command = commands.add_parser("distill", help=distill.__doc__)
    command.add_argument("experiments", nargs="+")
    command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="an override for all of them")
    command.add_argument("--tokens", type=int, default=500, help="tokens of the examples, about")
    command.add_argument("--rows", type=int, default=200, help="validation rows that choose the texts")
    command.add_argument("--seeds", type=int, default=3)
    command.add_argument("--threads", type=int, default=2)
    command.add_argument("--out", help="file for the raw numbers (JSON)")
    command.set_defaults(run=distill)
