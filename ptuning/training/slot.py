"""One soft prompt in training: its state, its initialisation, and the card of its result."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ptuning import storage
from ptuning.config import Experiment
from ptuning.data.batch_sampler import BatchSampler
from ptuning.data.task import Task
from ptuning.model import initializers, soft_prompt
from ptuning.model.base import Base
from ptuning.model.compatibility import check_base
from ptuning.model.packing import Objective, TokenShares, TurnsRow
from ptuning.model.prompted_model import PromptedModel
from ptuning.model.soft_prompt import Card, SoftPromptError
from ptuning.settings.training import TrainConfig
from ptuning.training.messages import Event, Finished, StartRun, event_fields, read_event
from ptuning.training.starts import Start, rounds, survivors

Array = NDArray[np.float32]

ROWS = 2048
"""Tokens that tell the size of a base's embeddings."""
SAMPLE = 64
"""Tokens whose keys and values give the mean and deviation of random ones, at least."""


class Slot:
    """One soft prompt in training: its starts (only one is left after the first part of the steps), its data position and its
    best evaluation so far."""

    def __init__(self, assignment: StartRun, task: Task, starts: Sequence[Tensor], scale: float = 1.0) -> None:
        """`scale`: factor of the loss in the backward pass, for a base in float16."""
        self.experiment = assignment.experiment
        self.config: TrainConfig = self.experiment.train
        self.folder = assignment.folder
        self.keep_best = assignment.keep_best
        self.task = task
        decay = self.config.resolved_average_decay(self.experiment.chooses)
        frozen = self.experiment.prompt.frozen
        self.starts = [Start(number, each, self.config, scale, decay, frozen) for number, each in enumerate(starts)]
        self.order = BatchSampler(task.train.lengths, self.config.batch_size, self.config.seed)
        chooses, distills = self.experiment.chooses, self.experiment.objective == "distill"
        longest = max(map(len, task.encoder.label_ids), default=0)
        self.text_weight = self.config.resolved_text_weight(longest) if chooses and not distills else 0.0
        """Weight of the text objective in addition to the choice."""
        self.objective = Objective(
            task.encoder.label_trie if chooses else None, not chooses or self.text_weight > 0, all_labels=chooses and distills
        )
        self.class_weights = balanced_weights(task) if self.config.class_weights else None
        self.step = 0
        self.best: dict[str, float] = {}
        self.highest = 0.0
        """The highest accuracy so far, which `best` need not have."""
        self.best_step = 0
        self.best_vectors = starts[0].clone()
        self.since_best = 0
        self.parent: str | None = None
        self.unrecorded_events: list[tuple[float, Event]] = []
        """Events, with their monotonic times, that may not yet be on the driver's disk. They are part of the checkpoint, and a
        resumed run sends them again, so that no point is lost by interruptions."""

    @property
    def name(self) -> str:
        return self.experiment.name

    @property
    def done(self) -> bool:
        patience = self.config.patience
        return self.step >= self.config.steps or (patience is not None and self.since_best >= patience)

    @property
    def vectors(self) -> Tensor:
        """Those of the remaining start; if there are several, of the first."""
        return self.starts[0].vectors

    @property
    def keep(self) -> int:
        """Number of starts that continue after this step."""
        return rounds(self.config).get(self.step, len(self.starts)) if len(self.starts) > 1 else 1

    @property
    def evaluation_due(self) -> bool:
        every, steps = self.config.evaluate_every, self.config.steps
        return self.step % every == 0 or self.step == steps or self.keep < len(self.starts)

    @property
    def checkpoint_due(self) -> bool:
        return self.step % self.config.checkpoint_every == 0

    def shares(self, numbers: NDArray[np.int64]) -> list[TokenShares] | None:
        """What the teacher says at every token of the targets of these rows of the training split; None: they have a target
        alone."""
        teaching = self.task.train.teaching
        found = teaching.tokens if teaching else None
        return [each for row in numbers if (each := found[int(row)]) is not None] if found else None

    def weights(
        self, predictions: int, numbers: NDArray[np.int64], rows: Sequence[TurnsRow], totals: tuple[int, int]
    ) -> tuple[Array, Array]:
        """The factors of the negative log-likelihoods in the loss of the global batch, fp32: of this worker's `predictions`
        over the whole vocabulary, and of its choices for `rows`, which have these numbers in the training split. `totals`:
        target tokens and rows of the whole batch.

        Text: the mean over tokens. Choice: the mean over rows of -log p(label), weighted by class weights if there are any;
        with a teacher of -log p of every label, weighted by the teacher's p.
        """
        per_token, per_row = (np.float32(1) / np.float32(total) for total in totals)
        if self.objective.trie is None:
            return np.full(predictions, per_token), np.empty(0, np.float32)
        teaching = self.task.train.teaching
        if teaching is not None and teaching.labels is not None:
            shares = self.objective.trie.edge_shares(np.exp(teaching.labels[numbers]))
            return np.empty(0, np.float32), shares.astype(np.float32).flatten() * per_row
        paths, classes = self.objective.trie.paths, self.class_weights
        choices = [
            np.full(len(paths[tuple(target)]), per_row * np.float32(classes[tuple(target)] if classes else 1))
            for _, target, *_ in rows
        ]
        return np.full(predictions, per_token * np.float32(self.text_weight)), np.concatenate(
            [np.empty(0, np.float32), *choices]
        )

    def advance(self, losses: Sequence[float]) -> None:
        """One step is done, with these losses of the starts."""
        for start, loss in zip(self.starts, losses, strict=True):
            start.loss += loss
        self.step += 1

    def halve(self, losses: Sequence[float]) -> None:
        """Drop the worse starts at the end of a round; `losses` of the starts."""
        if self.keep == len(self.starts):
            return
        self.starts = survivors(self.starts, list(losses), self.keep)
        for start in self.starts:
            start.loss = 0.0

    def observe(self, measured: dict[str, float], start: int = 0) -> bool:
        """Record the evaluation of a start; True if it is the best so far."""
        better = not self.best or self._is_better(measured)
        if better:
            self.best, self.best_step, self.since_best = measured, self.step, 0
            self.best_vectors = self.starts[start].average.clone()
        else:
            self.since_best += 1
        return better

    def _is_better(self, measured: dict[str, float]) -> bool:
        """Compare an evaluation with the best one. Accuracies that differ by less than a standard error from the highest count
        as equal, and between equal ones the loss decides (the one-standard-error rule, Breiman et al. 1984, section 3.4.3):
        on a few hundred rows the highest accuracy is often luck, while the loss changes with every row."""
        metric = self.experiment.metric
        sign = -1 if metric == "loss" else 1
        new, old = sign * measured[metric], sign * self.best[metric]
        if metric != "accuracy":
            return (new, -measured["loss"]) > (old, -self.best["loss"])
        self.highest = max(self.highest, old, new)
        assert self.task.validation is not None
        enough = self.highest - math.sqrt(self.highest * (1 - self.highest) / len(self.task.validation))
        return new >= enough and (old < enough or measured["loss"] < self.best["loss"])

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The complete state of the slot, as tensors and JSON."""
        tensors, starts = {"best_vectors": self.best_vectors}, []
        for start in self.starts:
            own, numbers = start.state()
            tensors |= {f"start{start.number}.{key}": value for key, value in own.items()}
            starts.append(numbers)
        return tensors, {
            "step": self.step,
            "starts": starts,
            "best": self.best,
            "best_step": self.best_step,
            "highest": self.highest,
            "since_best": self.since_best,
            "parent": self.parent,
            "events": [event_fields(event) for _, event in self.unrecorded_events],
        }

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """The inverse of `state`: training continues bit-identically on CPU. On GPUs the backward pass of
        attention adds in any order, so it continues within a tolerance."""
        self.starts = [self.starts[numbers["number"]] for numbers in state["starts"]]
        for start, numbers in zip(self.starts, state["starts"], strict=True):
            prefix = f"start{start.number}."
            own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            start.restore(own, numbers)
        self.best_vectors = tensors["best_vectors"].to(self.vectors.device)
        self.step, self.best, self.best_step = state["step"], state["best"], state["best_step"]
        self.since_best, self.parent = state["since_best"], state["parent"]
        self.highest = state.get("highest", 0.0)  # unknown to checkpoints of 0.1
        again = (read_event(event) for event in state["events"])
        place = storage.join(self.folder, "soft_prompt")  # the run's folder may have been moved
        found = (replace(event, soft_prompt=place) if isinstance(event, Finished) else event for event in again)
        self.unrecorded_events = [(math.inf, event) for event in found]


def embedding_size(embed: initializers.Embed, vocabulary: int) -> float:
    """The median root mean square of rows of the base's input embedding, of at most `ROWS` tokens over the whole vocabulary: a
    few rows that were never trained do not change it."""
    rows = embed(list(range(0, vocabulary, max(1, vocabulary // ROWS))))
    return float(rows.pow(2).mean(1).sqrt().median())


def with_learning_rate(experiment: Experiment, embed: initializers.Embed, vocabulary: int) -> Experiment:
    """The experiment with its learning rate as a number. The base's embeddings are only measured where they count."""
    counts = experiment.train.learning_rate == "auto" and experiment.prompt.kind != "kv"
    train = experiment.train.with_learning_rate(embedding_size(embed, vocabulary) if counts else None)
    return experiment.model_copy(update={"train": train})


def learning_rate(config: TrainConfig, step: int) -> float:
    """The learning rate of update number `step` (from 0)."""
    warm = round(config.warmup * config.steps)
    if step < warm:
        return config.peak * (step + 1) / warm
    progress = (step - warm) / max(1, config.steps - warm)
    factor = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1.0 + math.cos(math.pi * progress))}
    return config.peak * factor[config.schedule]


def balanced_weights(task: Task) -> dict[tuple[int, ...], float]:
    """Label -> n / (L * rows with this label), as scikit-learn's "balanced": the mean over the n training rows is 1."""
    labels = [tuple(label) for label in task.encoder.label_ids]
    counts = np.bincount(np.asarray(task.train.rows["label"][:]), minlength=len(labels))
    return {label: float(counts.sum() / (len(labels) * max(1, many))) for label, many in zip(labels, counts, strict=True)}


def initial_starts(
    experiment: Experiment, task: Task, base: Base, embed: initializers.Embed, prefix: initializers.Prefix
) -> tuple[list[Tensor], str | None]:
    """The soft prompts before their first step, fp32, `[P, H]` or of kind kv `[P, layers, 2, heads, d]`, and the content hash
    of the parent if there is one.

    The first is drawn with the run's seed, the others with different seeds. If `prompt.init` involves no random numbers (a
    text, a soft prompt of the same length), the others start from the vocabulary.
    """
    first, parent = initial_vectors(experiment, task, base, embed, prefix)
    starts = [first]
    for number in range(1, experiment.train.starts):
        again, _ = initial_vectors(experiment, task, base, embed, prefix, number)
        if torch.equal(again, first):
            frequent = task.train.frequent_tokens()
            again = initializers.vocabulary_rows(len(first), frequent, embed, _generator(experiment.train.seed, number))
            again = prefix(again) if first.ndim > 2 else again
        starts.append(again)
    return starts, parent


def _generator(seed: int, start: int) -> torch.Generator:
    """The seed of a start: the run's for the first; those of the others do not collide with the seeds of other runs."""
    return torch.Generator().manual_seed(seed + start * 1_000_003)


def initial_vectors(
    experiment: Experiment,
    task: Task,
    base: Base,
    embed: initializers.Embed,
    prefix: initializers.Prefix,
    start: int = 0,
) -> tuple[Tensor, str | None]:
    """The initial vectors of one start, as in `initial_starts`, and the content hash of the parent if there is one."""
    config = experiment.prompt
    generator = _generator(experiment.train.seed, start)
    frequent = task.train.frequent_tokens()
    tokenizer = task.encoder.tokenizer
    parent = None
    kv = config.kind == "kv"
    if config.init == "random":
        sample = embed(frequent)
        if kv:
            sample = prefix(initializers.vocabulary_rows(max(config.length, SAMPLE), frequent, embed, generator))
        return initializers.random_rows(config.length, sample, generator), None
    if config.init == "vocabulary":
        vectors = initializers.vocabulary_rows(config.length, frequent, embed, generator)
    elif config.init == "text":
        ids = tokenizer(config.init_text, add_special_tokens=False)["input_ids"]
        vectors = initializers.text_rows(config.length, ids, embed)
    elif config.init == "labels":
        labels = [tokenizer(label, add_special_tokens=False)["input_ids"] for label in experiment.data.labels or ()]
        vectors = initializers.label_rows(config.length, labels, frequent, embed, generator)
    else:
        folder = str(config.init_from)
        source = soft_prompt.load(folder)
        check_base(source, folder, base)
        parent = source.card.content_hash
        if source.card.kind == "kv":
            if not kv:
                raise SoftPromptError(f'{folder}: is a key-value prefix; set prompt.kind = "kv", or choose another soft prompt')
            others = prefix(initializers.vocabulary_rows(config.length, frequent, embed, generator))
            return torch.cat([source.vectors[: config.length], others[len(source.vectors) :]]), parent
        vectors = initializers.transferred_rows(config.length, source.vectors, frequent, embed, generator)
    return prefix(vectors) if kv else vectors, parent


def make_card(slot: Slot, base: Base, model: PromptedModel, measured: dict[str, float]) -> Card:
    """The card of a slot's best soft prompt."""
    experiment, task = slot.experiment, slot.task
    splits = {"train": task.train, "validation": task.validation, "test": task.test}
    tables = experiment.model_dump(mode="json")
    tables["train"] |= {"objective": experiment.objective, "text_weight": slot.text_weight}
    tables["train"]["average_decay"] = experiment.train.resolved_average_decay(experiment.chooses)
    return Card(
        name=experiment.name,
        base=base.name,
        revision=base.revision,
        base_fingerprint=base.fingerprint.parts(),
        base_notes=tuple(base.notes),
        dtype=str(model.base.dtype).removeprefix("torch."),
        training_pass="shared-prefix" if model.shared_prefix else "concatenated",
        kind=experiment.prompt.kind,
        kv_shape=model.kv_shape if experiment.prompt.kind == "kv" else None,
        length=experiment.prompt.length,
        width=base.width,
        template=task.encoder.template,
        max_new_tokens=task.max_new_tokens,
        init=experiment.prompt.init,
        metrics=measured,
        data={name: split.fingerprint for name, split in splits.items() if split},
        experiment=tables,
        parent=slot.parent,
        versions=soft_prompt.versions(),
        content_hash=soft_prompt.content_hash(slot.best_vectors),
    )


def checkpoints(folder: str) -> str:
    """The folder of a run's checkpoints."""
    return storage.join(folder, "checkpoints")
