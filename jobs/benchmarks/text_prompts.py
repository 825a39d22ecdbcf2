"""What text can do in the place of a soft prompt: nothing, instructions, other formats, examples.

Text prompts are hand-written (`text_prompts.json`) or made of train rows. The best of each kind is chosen on the validation
split; the test split is read once, by the chosen one. Labels behind text prompts are scored without the end token, which
favours them: the base expects something else after a label in a row of examples.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ptuning.config import Experiment
from ptuning.data.dataset import Split
from ptuning.data.encoder import Encoder
from ptuning.data.readers import Columns
from ptuning.data.sources import read_source
from ptuning.data.task import Task
from ptuning.model.base import Base
from ptuning.model.packing import pack_labels
from ptuning.model.prompted_model import PromptedModel
from ptuning.settings.template import fill, template_fields
from ptuning.training import metrics
from ptuning.training.generation import Greedy

WRITTEN = Path(__file__).with_name("text_prompts.json")
ROWS_TO_CHOOSE = 200
PASS = 32
"""Rows of one pass."""

Fields = Sequence[dict[str, Any]]
"""The fields of the rows of a split, as its file has them."""


@dataclass(frozen=True)
class TextPrompt:
    """Text in front of and around the input, and what stands for the labels."""

    kind: str
    before: str
    input: str
    labels: tuple[str, ...]

    def ids(self, encoder: Encoder, fields: dict[str, Any]) -> list[int]:
        """Token ids of the prompt with a row put in."""
        return list(encoder.tokenizer(self.before + fill(self.input, fields))["input_ids"])


def text_prompts(experiment: Experiment, base: Base, model: PromptedModel, task: Task) -> dict[str, dict[str, Any]]:
    """The best text prompt of each kind that fits: its value on the rows that chose it, on the test rows, and its text."""
    assert task.validation and task.test, "a task needs validation and test rows"
    written = json.loads(WRITTEN.read_text(encoding="utf-8")).get(experiment.name, {"instructions": [], "formats": []})
    known = fields_of(task.validation, experiment)
    few = min(ROWS_TO_CHOOSE, len(known))
    chooses, to_choose = cut(task.validation, few), [known[row] for row in spaced(len(known), few)]
    best: dict[str, tuple[float, TextPrompt]] = {}
    for prompt in candidates(experiment, task, written):
        value = measure(model, base, task, chooses, to_choose, prompt)
        if value is not None and (prompt.kind not in best or value > best[prompt.kind][0]):
            best[prompt.kind] = value, prompt
    fields = fields_of(task.test, experiment)
    found = {}
    for kind, (value, prompt) in best.items():
        test = measure(model, base, task, task.test, fields, prompt)
        if test is not None:  # one that leaves no room for the longest test row is no text for this task
            found[kind] = {"validation": value, "test": test, "text": prompt.before + prompt.input}
    return found


def spaced(total: int, many: int) -> list[int]:
    """So many rows out of all, from all over the file: some files are sorted by label."""
    return [number * total // many for number in range(many)]


def cut(split: Split, rows: int | None) -> Split:
    """So many rows of a split at most."""
    if rows is None or rows >= len(split):
        return split
    chosen = spaced(len(split), rows)
    return replace(split, rows=split.rows.select(chosen), lengths=split.lengths[chosen])


def fields_of(split: Split, experiment: Experiment) -> list[dict[str, Any]]:
    """The fields of every row of a split, which may have been `cut` once."""
    rows = list(read_source(split.source, Columns.of(template_fields(experiment.data.input))).rows)
    return [rows[row] for row in spaced(len(rows), len(split))]


def candidates(experiment: Experiment, task: Task, written: dict[str, Any]) -> Iterator[TextPrompt]:
    """All text prompts of a task."""
    data = experiment.data
    labels = tuple(fill(data.target, dict.fromkeys(template_fields(data.target), label)) for label in data.labels or ())
    yield TextPrompt("nothing", "", data.input, labels)
    for text in written["instructions"]:
        yield TextPrompt("text", text, data.input, labels)
    for text, words in written["formats"]:
        yield TextPrompt("text", "", text, tuple(words) or labels)
    for shots in (4, 8):
        for seed in range(3):
            for start in ("", *written["instructions"][:1]):
                examples = few_shot(labels, task.train, shots, seed)
                yield TextPrompt("examples", start + examples, data.input, labels)


def few_shot(labels: tuple[str, ...], train: Split, shots: int, seed: int) -> str:
    """Train rows with their targets, as many of each label as possible."""
    draw = random.Random(seed)
    rows = list(range(len(train)))
    draw.shuffle(rows)
    if labels:
        known = train.rows["label"][:]
        by_label = [[row for row in rows if known[row] == label] for label in range(len(labels))]
        rows = [row for together in zip(*by_label, strict=False) for row in together]
    chosen = rows[:shots]
    draw.shuffle(chosen)
    return "".join(train.rows[row]["text"] + train.rows[row]["target_text"] + "\n" for row in chosen)


@torch.no_grad()
def measure(model: PromptedModel, base: Base, task: Task, split: Split, fields: Fields, prompt: TextPrompt) -> float | None:
    """Accuracy, or ROUGE-L, of the bare base behind a text prompt; None where a row does not fit into the context.

    The ids that all rows begin with stand in the place of a soft prompt: computed once a pass, the same numbers.
    """
    inputs = [prompt.ids(task.encoder, row) for row in fields]
    labels = [list(task.encoder.tokenizer(label, add_special_tokens=False)["input_ids"]) for label in prompt.labels]
    lengths = [len(label) for label in labels]
    if max(map(len, inputs)) + max(lengths, default=task.max_new_tokens) > base.context:
        return None
    shared = min(len(os.path.commonprefix(inputs)), min(map(len, inputs)) - 1)
    embed = model.base.get_input_embeddings()
    before = embed(torch.tensor(inputs[0][:shared], dtype=torch.long)).float()
    inputs = [ids[shared:] for ids in inputs]
    order = sorted(range(len(inputs)), key=lambda row: len(inputs[row]))
    parts = [order[start : start + PASS] for start in range(0, len(order), PASS)]
    if not labels:
        texts: dict[int, str] = {}
        for rows in parts:
            found = Greedy(model, task.encoder, task.max_new_tokens).texts(before, [inputs[row] for row in rows])
            texts |= {row: text.split("\n")[0] for row, text in zip(rows, found, strict=True)}
        references = list(split.rows["references"][: len(inputs)])
        return metrics.generation([texts[row] for row in range(len(inputs))], references)["rouge_l"]
    truth = split.rows["label"][:]
    right = 0
    for rows in parts:
        trie = task.encoder.label_trie
        nll = model([before], pack_labels([shared], [[inputs[row] for row in rows]], trie)).view(len(rows), -1)
        guesses = trie.label_logprobs(-nll).argmax(-1).tolist()
        right += sum(guess == truth[row] for row, guess in zip(rows, guesses, strict=True))
    return right / len(inputs)
