"""What a soft prompt reaches on a task, against text in its place: nothing, instructions, other formats, examples.

Text prompts are hand-written (`text_prompts.json`) or made of train rows. The best of each kind is chosen on the validation
split; the test split is read once, by the chosen one. Labels behind text prompts are scored without the end token, which
favours them: the base expects something else after a label in a row of examples.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ptuning import metrics
from ptuning.base import Base, find_base
from ptuning.config import Experiment, read_experiment, template_fields
from ptuning.data import Encoder, Split
from ptuning.evaluate import greedy
from ptuning.model import PromptedModel, plan_labels
from ptuning.orders import Assignment, Event, Task
from ptuning.prepare import absolute, load_task
from ptuning.sources import read_source
from ptuning.train import Pack
from ptuning.train import train as train_slots
from ptuning.workers import Workers

TEXT_PROMPTS = Path(__file__).with_name("text_prompts.json")
ROWS_TO_CHOOSE = 200
PASS = 32
"""Rows of one pass."""


@dataclass(frozen=True)
class TextPrompt:
    """Text in front of and around the input, and what stands for the labels."""

    kind: str
    before: str
    input: str
    labels: tuple[str, ...]

    def ids(self, encoder: Encoder, fields: dict[str, Any]) -> list[int]:
        """Token ids of the prompt with a row put in."""
        return list(encoder.tokenizer(self.before + self.input.format_map(fields))["input_ids"])


def candidates(experiment: Experiment, task: Task, written: dict[str, Any]) -> Iterator[TextPrompt]:
    """All text prompts of a task."""
    data = experiment.data
    labels = tuple(data.target.format(label=label) for label in data.labels or ())
    yield TextPrompt("nothing", "", data.input, labels)
    for text in written["instructions"]:
        yield TextPrompt("instruction", text, data.input, labels)
    for text, words in written["formats"]:
        yield TextPrompt("format", "", text, tuple(words))
    for shots in (4, 8):
        for seed in range(3):
            for start in ("", written["instructions"][0]):
                examples = few_shot(data.input, data.target, labels, task.train, shots, seed)
                yield TextPrompt("examples", start + examples, data.input, labels)


def few_shot(template: str, target: str, labels: tuple[str, ...], train: Split, shots: int, seed: int) -> str:
    """Train rows with their targets, as many of each label as possible."""
    draw = random.Random(seed)
    rows = list(range(len(train.lengths)))
    draw.shuffle(rows)
    if labels:
        by_label = [[row for row in rows if train.rows["label"][row] == label] for label in range(len(labels))]
        rows = [row for together in zip(*by_label, strict=False) for row in together]
    chosen = rows[:shots]
    draw.shuffle(chosen)
    return "".join(train.rows["text"][row] + train.rows["target_text"][row] + "\n" for row in chosen)


@torch.no_grad()
def measure(
    model: PromptedModel, base: Base, task: Task, split: Split, fields: Sequence[dict[str, Any]], prompt: TextPrompt
) -> float:
    """Accuracy, or ROUGE-L, of the bare base behind a text prompt."""
    nothing = torch.zeros(0, base.width)
    inputs = [prompt.ids(task.encoder, row) for row in fields]
    if not prompt.labels:
        room = task.max_new_tokens
        texts = [
            text.split("\n")[0]
            for start in range(0, len(inputs), PASS)
            for text in greedy(model, nothing, inputs[start : start + PASS], task.encoder, room)
        ]
        return metrics.generation(texts, list(split.rows["references"][: len(texts)]))["rouge_l"]
    labels = [list(task.encoder.tokenizer(label, add_special_tokens=False)["input_ids"]) for label in prompt.labels]
    lengths = [len(label) for label in labels]
    right = 0
    for start in range(0, len(inputs), PASS):
        part = inputs[start : start + PASS]
        nll = model([nothing], plan_labels([0], [part], labels)).view(len(part), -1)
        guesses = torch.stack([each.sum(-1) for each in nll.split(lengths, -1)], -1).argmin(-1).tolist()
        right += sum(guess == split.rows["label"][start + row] for row, guess in enumerate(guesses))
    return right / len(inputs)


def soft_prompts(experiment: Experiment, base: Base, model: PromptedModel, task: Task, seeds: int) -> list[dict[str, float]]:
    """The experiment with several seeds, side by side."""
    found = {}

    def report(event: Event) -> None:
        if event.kind == "finished":
            found[event.run] = event.values
        assert event.kind != "failed", event.details

    with tempfile.TemporaryDirectory() as folder:
        pack = Pack(model, base, Workers.current(), lambda experiment: task)
        orders = []
        for seed in range(seeds):
            train = experiment.train.model_copy(update={"seed": seed})
            each = experiment.model_copy(update={"name": f"seed-{seed}", "train": train})
            orders.append(Assignment(each, f"{folder}/{seed}"))
        assignments = iter([orders])
        train_slots(pack, lambda free: next(assignments, None), report)
    return list(found.values())


def quality(arguments: argparse.Namespace) -> None:
    """Soft prompts (mean and range over seeds) against the best text prompts, for each experiment file."""
    torch.set_num_threads(arguments.threads)
    written = json.loads(TEXT_PROMPTS.read_text(encoding="utf-8"))
    results = []
    for path in arguments.experiments:
        experiment = absolute(read_experiment(path, arguments.set))
        base = find_base(experiment.model)
        model = PromptedModel(base.load(base.dtype(experiment.model.dtype)))
        task = load_task(experiment, base)
        assert task.validation and task.test, "a task needs validation and test rows"
        metric = "accuracy" if experiment.data.labels else "rouge_l"
        found: dict[str, Any] = {"task": experiment.name, "metric": metric, "rows": len(task.test.lengths)}
        if experiment.data.labels:
            counts = Counter(task.test.rows["label"])
            found["majority"] = max(counts.values()) / sum(counts.values())
        fields = {split: fields_of(split, experiment) for split in (task.validation, task.test)}
        to_choose = fields[task.validation][:ROWS_TO_CHOOSE]
        best: dict[str, tuple[float, TextPrompt]] = {}
        for prompt in candidates(experiment, task, written[experiment.name]):
            value = measure(model, base, task, task.validation, to_choose, prompt)
            if prompt.kind not in best or value > best[prompt.kind][0]:
                best[prompt.kind] = value, prompt
        for kind, (_, prompt) in best.items():
            found[kind] = measure(model, base, task, task.test, fields[task.test], prompt)
            found[f"{kind}_text"] = prompt.before + prompt.input
        reached = [values[f"test_{metric}"] for values in soft_prompts(experiment, base, model, task, arguments.seeds)]
        found |= {"soft_prompt": statistics.fmean(reached), "seeds": reached}
        results.append(found)
        parts = [f"{key} {value:.3f}" for key, value in found.items() if isinstance(value, float)]
        print(f"{experiment.name} ({metric}): {', '.join(parts)} [{min(reached):.3f}, {max(reached):.3f}]", flush=True)
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(results, indent=1))


def fields_of(split: Split, experiment: Experiment) -> list[dict[str, Any]]:
    """The fields of every row, as its file has them."""
    return list(read_source(split.source, template_fields(experiment.data.input), False).rows)


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The command `quality`."""
    command = commands.add_parser("quality", help=quality.__doc__)
    command.add_argument("experiments", nargs="+")
    command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="an override for all of them")
    command.add_argument("--seeds", type=int, default=3)
    command.add_argument("--threads", type=int, default=2)
    command.add_argument("--out", help="file for the raw numbers (JSON)")
    command.set_defaults(run=quality)
