"""READ FIRST: how soft prompts are trained. K slots share one frozen base; training one soft prompt is the case K = 1.

`train` is the loop. It knows neither Ray nor MLflow: a `source` hands out assignments, `report` takes events. Every worker
runs it with the same assignments and ends with the same numbers; `report` is called on the first worker only.
"""

from __future__ import annotations

import itertools
import math
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, Literal, TypeVar

import numpy as np
import psutil
import torch
from torch import Tensor, nn

from ptuning import storage
from ptuning.config import Experiment, Template, TrainConfig, UserError
from ptuning.data.batch_sampler import BatchOrder, share
from ptuning.model import soft_prompt
from ptuning.model.base import Base
from ptuning.model.prompted_model import Objective, PromptedModel, Row, plan_targets
from ptuning.model.soft_prompt import Card, SoftPrompt
from ptuning.training import checkpoint
from ptuning.training.distributed import Workers
from ptuning.training.evaluate import Evaluation, evaluate
from ptuning.training.messages import Assignment, Event, Order, Report, Source, Task
from ptuning.training.starts import Start, rounds, survivors

Each = TypeVar("Each")


class Slot:
    """One soft prompt in training: its starts (one of them is left after the first part of the steps), its data position and
    its best evaluation so far."""

    def __init__(self, assignment: Assignment, task: Task, starts: Sequence[Tensor]) -> None:
        self.experiment = assignment.experiment
        self.config: TrainConfig = self.experiment.train
        self.folder = assignment.folder
        self.task = task
        self.starts = [Start(number, each, self.config) for number, each in enumerate(starts)]
        self.order = BatchOrder(task.train.lengths, self.config.batch_size, self.config.seed)
        choice = self.experiment.objective == "choice"
        self.objective = Objective(task.encoder.label_trie if choice else None, text=not choice or self.config.text_weight > 0)
        self.class_weights = balanced_weights(task) if self.config.class_weights else None
        self.step = 0
        self.best: dict[str, float] = {}
        self.best_step = 0
        self.best_vectors = starts[0].clone()
        self.since_best = 0
        self.parent: str | None = None
        self.told: list[tuple[float, Event]] = []
        """Events, with the monotonic time they were told at, that may not have come to the driver's disk. They go into the
        checkpoint and a resumed run repeats them: no point is lost, however often and wherever it is interrupted."""

    @property
    def name(self) -> str:
        return self.experiment.name

    @property
    def done(self) -> bool:
        patience = self.config.patience
        return self.step >= self.config.steps or (patience is not None and self.since_best >= patience)

    @property
    def vectors(self) -> nn.Parameter:
        """`[P, H]` of the start that is left; before, of the first."""
        return self.starts[0].vectors

    @property
    def keep(self) -> int:
        """How many starts go on after this step."""
        return rounds(self.config).get(self.step, len(self.starts)) if len(self.starts) > 1 else 1

    @property
    def evaluation_due(self) -> bool:
        every, steps = self.config.evaluate_every, self.config.steps
        return self.step % every == 0 or self.step == steps or self.keep < len(self.starts)

    @property
    def checkpoint_due(self) -> bool:
        return self.step % self.config.checkpoint_every == 0

    def loss(self, text: Tensor, choices: Tensor, rows: Sequence[Row], totals: tuple[int, int]) -> Tensor:
        """This share of the global batch's loss, from the negative log-likelihoods of its text's tokens and of its choices;
        `totals`: target tokens and rows of the whole batch.

        Text: the mean over tokens. Choice: the mean over rows of -log p(label), by class weights if there are any.
        """
        tokens, count = totals
        if self.objective.trie is None:
            return text.sum() / tokens
        if self.class_weights is not None:
            choices = choices * self._choice_weights(rows).to(choices)
        loss = choices.sum() / count
        return loss + self.config.text_weight * text.sum() / tokens if self.objective.text else loss

    def _choice_weights(self, rows: Sequence[Row]) -> Tensor:
        """Each choice counts as much as its row's label."""
        assert self.objective.trie is not None and self.class_weights is not None
        paths, weights = self.objective.trie.paths, self.class_weights
        return torch.tensor([weights[tuple(target)] for _, target in rows for _ in paths[tuple(target)]])

    def update(self, gradients: Sequence[Tensor], losses: Sequence[float]) -> float:
        """One optimiser step of every start with its gradient of the whole global batch; returns the first one's norm."""
        rate = learning_rate(self.config, self.step)
        norms = []
        for start, gradient, loss in zip(self.starts, gradients, losses, strict=True):
            norms.append(start.update(gradient, self.config.clip, rate))
            start.loss += loss
        self.step += 1
        return norms[0]

    def halve(self, losses: Sequence[float]) -> None:
        """Let the worse starts go if a round has ended; `losses` of the starts."""
        if self.keep == len(self.starts):
            return
        self.starts = survivors(self.starts, list(losses), self.keep)
        for start in self.starts:
            start.loss = 0.0

    def observe(self, measured: dict[str, float], start: int = 0) -> bool:
        """Take the evaluation of a start into account; True if it is the best so far (ties: the lower loss)."""
        metric = self.experiment.metric
        sign = -1 if metric == "loss" else 1
        better = not self.best or (sign * measured[metric], -measured["loss"]) > (
            sign * self.best[metric],
            -self.best["loss"],
        )
        if better:
            self.best, self.best_step, self.since_best = measured, self.step, 0
            self.best_vectors = self.starts[start].vectors.detach().clone()
        else:
            self.since_best += 1
        return better

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that decides how the run goes on, as tensors and JSON."""
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
            "since_best": self.since_best,
            "parent": self.parent,
            "events": [asdict(event) for _, event in self.told],
        }

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """The inverse of `state`: training goes on bit by bit as if it had not been interrupted."""
        self.starts = [self.starts[numbers["number"]] for numbers in state["starts"]]
        for start, numbers in zip(self.starts, state["starts"], strict=True):
            prefix = f"start{start.number}."
            own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            start.restore(own, numbers)
        self.best_vectors = tensors["best_vectors"]
        self.step, self.best, self.best_step = state["step"], state["best"], state["best_step"]
        self.since_best, self.parent = state["since_best"], state["parent"]


class Pack:
    """The slots that train together over one base, on one of the workers."""

    def __init__(
        self,
        model: PromptedModel,
        base: Base,
        workers: Workers,
        load_task: Callable[[Experiment], Task],
        places: int = 1,
        ringing: Callable[[], bool] | None = None,
        recorded_until: Callable[[], float] = lambda: -math.inf,
    ) -> None:
        """`ringing`: whether the source has news, asked on the first worker only; default: while a place is free.
        `recorded_until`: the monotonic time before which all events that were told will survive a crash; default: none will.
        """
        self.model = model
        self.base = base
        self.workers = workers
        self.load_task = load_task
        self.places = places
        self.ringing = ringing or (lambda: self.free > 0)
        self.recorded_until = recorded_until
        self.called = True
        """The first worker has news from the source. All know it from the step's own collective: one more would cost more
        than a small step."""
        self.slots: list[Slot] = []

    @property
    def free(self) -> int:
        return self.places - len(self.slots)

    def attach(self, assignment: Assignment) -> Slot:
        """Give a free place to an assignment, from its newest checkpoint if it has one."""
        experiment = assignment.experiment
        task = self.load_task(experiment)
        starts, parent = initial_starts(experiment, task, self.base, self.embed)
        slot = Slot(assignment, task, [vectors.to(self.model.base.device) for vectors in starts])
        slot.parent = parent
        # The first worker's view decides: two workers may see a store at different moments.
        saved = self.workers.from_first(checkpoint.newest(checkpoints(assignment.folder)) if self.workers.first else None)
        if saved:
            if "starts" not in saved[1]:
                raise UserError(
                    f"{assignment.folder}: its checkpoints are of ptuning 0.1, whose steps saw other rows; start it again "
                    "under another name"
                )
            slot.restore(*saved)
            slot.told = [(math.inf, Event(**event)) for event in saved[1]["events"]]
        self.slots.append(slot)
        return slot

    @torch.no_grad()
    def embed(self, ids: list[int]) -> Tensor:
        """Rows of the base's input embedding, `[n, H]` fp32, whole or sharded."""
        device = self.model.base.device
        return self.model.base.get_input_embeddings()(torch.tensor(ids, device=device)).float().cpu()


def train(pack: Pack, source: Source, report: Report) -> None:
    """Train until the source has no more orders and every slot is done."""
    more = True
    while more or pack.slots:
        if more and (pack.called or not pack.slots):
            orders = source(pack.free)
            more = orders is not None
            for order in orders or []:
                follow(pack, order, report)
        step(pack, report)
        due = [slot for slot in pack.slots if slot.evaluation_due]
        judged = [slot for slot in due if slot.task.validation]
        found = dict(zip(judged, evaluate_slots(pack, judged, "validation"), strict=True))
        for slot in due:
            observe(pack, slot, found.get(slot, []), report)
        for slot in pack.slots:
            if slot.checkpoint_due or slot.done:
                save_checkpoint(pack, slot)
        for slot in [slot for slot in pack.slots if slot.done]:
            finish(pack, slot, report)


def follow(pack: Pack, order: Order, report: Report) -> None:
    """Let a run join or leave."""
    if isinstance(order, Assignment):
        start(pack, order, report)
        return
    for slot in [slot for slot in pack.slots if slot.name == order.run]:  # none: it has just ended by itself
        if order.keep:
            finish(pack, slot, report)
        else:
            pack.slots.remove(slot)


def start(pack: Pack, assignment: Assignment, report: Report) -> None:
    """Attach an assignment and say where it begins; a resumed one first repeats what its checkpoint saw last."""
    try:
        slot = pack.attach(assignment)
    except UserError as error:  # the same on every worker
        report(Event("failed", assignment.experiment.name, 0, details={"message": str(error)}))
        return
    again, slot.told = [event for _, event in slot.told], []
    for event in again:
        tell(slot, report, event)
    report(Event("start", slot.name, slot.step, details={"steps": slot.config.steps}))
    if slot.done:  # it was interrupted between its last checkpoint and its result
        finish(pack, slot, report)


def step(pack: Pack, report: Report) -> None:
    """One optimiser update of every slot, on the global batch that its workers share."""
    slots = pack.slots
    if not slots:
        return
    began = time.perf_counter()
    rows = [slot.order.batch(slot.step) for slot in slots]
    totals = [(int(slot.task.train.target_lengths[batch].sum()), len(batch)) for slot, batch in zip(slots, rows, strict=True)]
    starts = [(slot, start, total) for slot, total in zip(slots, totals, strict=True) for start in slot.starts]
    losses = torch.zeros(len(starts))
    tokens = 0
    for batches in _micro_batches(pack, rows):
        plan = plan_targets([len(start.vectors) for _, start, _ in starts], batches, [slot.objective for slot, _, _ in starts])
        nll = pack.model([start.vectors for _, start, _ in starts], plan)
        parts = [
            slot.loss(*predictions, targets, total)
            for (slot, _, total), predictions, targets in zip(starts, plan.split(nll), batches, strict=True)
        ]
        torch.stack(parts).sum().backward()  # the starts' losses share no term: each keeps its own gradient
        losses += torch.stack([part.detach().float().cpu() for part in parts])
        tokens += plan.positions
    gradients = _reduce(pack, losses)
    seconds = time.perf_counter() - began
    sizes = [len(slot.starts) for slot in slots]
    for slot, own in zip(list(slots), zip(losses.split(sizes), _split(gradients, sizes), strict=True), strict=True):
        _update(pack, slot, *own, tokens * pack.workers.size / seconds, report)


def _update(pack: Pack, slot: Slot, losses: Tensor, gradients: list[Tensor], speed: float, report: Report) -> None:
    """Move a slot's starts. One whose loss or gradient is not finite leaves; the last one takes the slot with it."""
    sound = [
        math.isfinite(loss) and bool(torch.isfinite(gradient).all())
        for loss, gradient in zip(losses.tolist(), gradients, strict=True)
    ]
    if not any(sound):
        fail(pack, slot, report, float(losses[0]))
        return
    slot.starts = [start for start, well in zip(slot.starts, sound, strict=True) if well]
    gradients = [gradient for gradient, well in zip(gradients, sound, strict=True) if well]
    kept = losses[torch.tensor(sound)].tolist()
    values = {"loss": min(kept), "learning_rate": learning_rate(slot.config, slot.step)}
    if len(kept) > 1:
        values |= {f"start_{start.number}_loss": loss for start, loss in zip(slot.starts, kept, strict=True)}
    values |= {"gradient_norm": slot.update(gradients, kept), "tokens_per_second": speed}
    tell(slot, report, Event("step", slot.name, slot.step, values))


def _split(values: list[Each], sizes: Sequence[int]) -> list[list[Each]]:
    ends = list(itertools.accumulate(sizes))
    return [values[end - size : end] for end, size in zip(ends, sizes, strict=True)]


def _micro_batches(pack: Pack, rows: list[np.ndarray]) -> list[list[list[Row]]]:
    """This worker's rows, pass by pass and start by start: `[passes][starts of all slots]` lists of rows.

    Every worker makes the same number of passes, as a sharded base needs; one with fewer rows may have empty lists. Where a
    slot has several starts, each gets so few rows at a time that together they take the memory of one.
    """
    mine = [share(batch, pack.workers.rank, pack.workers.size) for batch in rows]
    most = max(math.ceil(len(batch) / pack.workers.size) for batch in rows)
    limit = min((slot.config.micro_batch_size or most) for slot in pack.slots)
    passes = math.ceil(most / max(1, limit // max(len(slot.starts) for slot in pack.slots)))
    return [
        [
            part
            for slot, own in zip(pack.slots, mine, strict=True)
            for part in [[slot.task.train.row(int(row)) for row in np.array_split(own, passes)[index]]] * len(slot.starts)
        ]
        for index in range(passes)
    ]


def _reduce(pack: Pack, losses: Tensor) -> list[Tensor]:
    """Sum the workers' gradients and, in place, losses, with one collective; gradients as `[P, H]` per start.

    With them travels whether the first worker has news.
    """
    vectors = [start.vectors for slot in pack.slots for start in slot.starts]
    pieces = [each.grad if each.grad is not None else torch.zeros_like(each) for each in vectors]
    bell = losses.new_tensor([float(pack.workers.first and pack.ringing())])
    flat = pack.workers.sum(torch.cat([*(piece.flatten() for piece in pieces), torch.cat([losses, bell]).to(pieces[0])]))
    *parts, summed, bell = flat.split([*(piece.numel() for piece in pieces), len(losses), 1])
    losses.copy_(summed)
    pack.called = bool(bell)
    return [part.view_as(piece).clone() for part, piece in zip(parts, pieces, strict=True)]


def evaluate_slots(pack: Pack, slots: list[Slot], split: Literal["validation", "test"]) -> list[list[Evaluation]]:
    """Evaluate slots on a split: those in training as they are, every start, on the test split with their best vectors.

    Text is generated for the test split, and on validation only where the metric that chooses the best step needs it.
    """
    evaluations: dict[str, list[Evaluation]] = {}
    for together in _sharing(slots, split):
        task = together[0].task
        text = split == "test" or together[0].experiment.metric != "loss"
        vectors = [
            [slot.best_vectors] if split == "test" else [start.vectors.detach() for start in slot.starts] for slot in together
        ]
        found = evaluate(
            pack.model,
            sum(vectors, []),
            getattr(task, split),
            task.encoder,
            pack.workers,
            task.max_new_tokens if text else None,
        )
        for slot, own in zip(together, _split(found, [len(each) for each in vectors]), strict=True):
            evaluations[slot.name] = own
    return [evaluations[slot.name] for slot in slots]


def _sharing(slots: list[Slot], split: str) -> list[list[Slot]]:
    """Slots that read the same rows by the same metric: they share their passes."""
    groups: dict[tuple[int, str], list[Slot]] = {}
    for slot in slots:
        groups.setdefault((id(getattr(slot.task, split)), slot.experiment.metric), []).append(slot)
    return list(groups.values())


def observe(pack: Pack, slot: Slot, evaluations: list[Evaluation], report: Report) -> None:
    """Compare the evaluation of the best start with the best one so far, and let the worse starts go where a round ends.

    `evaluations` of every start, none without validation rows. If no start has a finite loss, the slot ends.
    """
    if not evaluations:
        slot.halve([start.loss for start in slot.starts])
        return
    losses = [evaluation.metrics["loss"] for evaluation in evaluations]
    if not any(map(math.isfinite, losses)):
        fail(pack, slot, report, losses[0])
        return
    leader = losses.index(min(filter(math.isfinite, losses)))
    values = dict(evaluations[leader].metrics)
    details = {"best": slot.observe(evaluations[leader].metrics, leader), "memory": pack.workers.gather(_memory())}
    if len(losses) > 1:
        values |= {f"start_{start.number}_loss": loss for start, loss in zip(slot.starts, losses, strict=True)}
    slot.halve(losses)
    tell(slot, report, Event("evaluation", slot.name, slot.step, values, details=details))


def save_checkpoint(pack: Pack, slot: Slot) -> None:
    """The first worker writes; all hold the same state."""
    recorded_until = pack.recorded_until()
    slot.told = [(at, event) for at, event in slot.told if at >= recorded_until]
    if pack.workers.first:
        checkpoint.save(checkpoints(slot.folder), slot.step, *slot.state())


def finish(pack: Pack, slot: Slot, report: Report) -> None:
    """Read the test split once, with the best soft prompt; save the soft prompt; free the place."""
    if not slot.best:
        slot.best_vectors, slot.best_step = slot.vectors.detach().clone(), slot.step
    measured = {f"validation_{name}": value for name, value in slot.best.items()}
    details: dict[str, Any] = {"best_step": slot.best_step, "early": slot.step < slot.config.steps}
    if slot.task.test:
        [[evaluation]] = evaluate_slots(pack, [slot], "test")
        measured |= {f"test_{name}": value for name, value in evaluation.metrics.items()}
        details |= {"predictions": evaluation.predictions, "classification": evaluation.classification}
        details["labels"] = list(slot.task.encoder.template.labels or ())
    details["peak_bytes"] = pack.workers.gather(_peak_memory())
    if pack.workers.first:  # all workers hold the same vectors
        config = pack.base.config.get_text_config()
        result = SoftPrompt(slot.best_vectors.detach().cpu(), make_card(slot, pack.base, measured))
        details["content_hash"] = result.card.content_hash
        details["soft_prompt"] = storage.join(slot.folder, "soft_prompt")
        result.save(
            details["soft_prompt"],
            layers=int(getattr(config, "num_hidden_layers", 0)),
            heads=int(getattr(config, "num_attention_heads", 0)),
        )
        report(Event("finished", slot.name, slot.step, measured, details=details))
    pack.slots.remove(slot)


def fail(pack: Pack, slot: Slot, report: Report, loss: float) -> None:
    """Give up one slot, on all workers together: they see the same loss and gradient. The others go on."""
    cause = f"loss {loss:g}" if not math.isfinite(loss) else "a gradient that is not finite"
    message = (
        f"{slot.name}: {cause} at step {slot.step + 1} (learning rate "
        f"{learning_rate(slot.config, slot.step):g}); lower train.learning_rate, or look at these rows"
    )
    report(Event("failed", slot.name, slot.step, details={"message": message}))
    pack.slots.remove(slot)


def tell(slot: Slot, report: Report, event: Event) -> None:
    """Report an event and remember it until a checkpoint finds it recorded."""
    slot.told.append((time.monotonic(), event))
    report(event)


def learning_rate(config: TrainConfig, step: int) -> float:
    """The learning rate of update number `step` (from 0)."""
    warm = round(config.warmup * config.steps)
    if step < warm:
        return config.learning_rate * (step + 1) / warm
    progress = (step - warm) / max(1, config.steps - warm)
    factor = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1.0 + math.cos(math.pi * progress))}
    return config.learning_rate * factor[config.schedule]


def balanced_weights(task: Task) -> dict[tuple[int, ...], float]:
    """Label -> n / (L * rows with this label), as scikit-learn's "balanced": the mean over the n training rows is 1."""
    labels = [tuple(label) for label in task.encoder.label_ids]
    counts = np.bincount(np.asarray(task.train.rows["label"]), minlength=len(labels))
    return {label: float(counts.sum() / (len(labels) * max(1, many))) for label, many in zip(labels, counts, strict=True)}


def initial_starts(experiment: Experiment, task: Task, base: Base, embed: soft_prompt.Embed) -> tuple[list[Tensor], str | None]:
    """The soft prompts before their first step, `[P, H]` fp32 each, and the content hash of the parent if there is one.

    The first is drawn with the run's seed, the others with seeds of their own; where `prompt.init` leaves nothing to draw (a
    text, a soft prompt of the same length), they begin from the vocabulary.
    """
    first, parent = initial_vectors(experiment, task, base, embed)
    starts = [first]
    for number in range(1, experiment.train.starts):
        again, _ = initial_vectors(experiment, task, base, embed, number)
        if torch.equal(again, first):
            frequent = task.train.frequent_tokens()
            again = soft_prompt.vocabulary_rows(len(first), frequent, embed, _generator(experiment.train.seed, number))
        starts.append(again)
    return starts, parent


def _generator(seed: int, start: int) -> torch.Generator:
    """Of a run's first start: its seed; the others' are far from those of neighbouring runs."""
    return torch.Generator().manual_seed(seed + start * 1_000_003)


def initial_vectors(
    experiment: Experiment, task: Task, base: Base, embed: soft_prompt.Embed, start: int = 0
) -> tuple[Tensor, str | None]:
    """A start of the soft prompt, `[P, H]` fp32, and the content hash of its parent if it has one."""
    config = experiment.prompt
    generator = _generator(experiment.train.seed, start)
    frequent = task.train.frequent_tokens()
    tokenizer = task.encoder.tokenizer
    parent = None
    if config.init == "random":
        vectors = soft_prompt.random_rows(config.length, embed(frequent), generator)
    elif config.init == "vocabulary":
        vectors = soft_prompt.vocabulary_rows(config.length, frequent, embed, generator)
    elif config.init == "text":
        ids = tokenizer(config.init_text, add_special_tokens=False)["input_ids"]
        vectors = soft_prompt.text_rows(config.length, ids, embed)
    elif config.init == "labels":
        labels = [tokenizer(label, add_special_tokens=False)["input_ids"] for label in experiment.data.labels or ()]
        vectors = soft_prompt.label_rows(config.length, labels, frequent, embed, generator)
    else:
        folder = str(config.init_from)
        source = soft_prompt.load(folder)
        soft_prompt.check_base(source, folder, base.width, base.name, base.fingerprint.model_dump())
        vectors = soft_prompt.transferred_rows(config.length, source.vectors, frequent, embed, generator)
        parent = source.card.content_hash
    return vectors, parent


def make_card(slot: Slot, base: Base, measured: dict[str, float]) -> Card:
    """The card of a slot's best soft prompt."""
    experiment, task = slot.experiment, slot.task
    splits = {"train": task.train, "validation": task.validation, "test": task.test}
    template = {name: getattr(experiment.data, name) for name in Template.model_fields}
    return Card(
        name=experiment.name,
        base=base.name,
        revision=base.revision,
        base_fingerprint=base.fingerprint.model_dump(),
        length=experiment.prompt.length,
        width=base.width,
        template=Template(**template),
        max_new_tokens=task.max_new_tokens,
        init=experiment.prompt.init,
        metrics=measured,
        data={name: split.fingerprint for name, split in splits.items() if split},
        experiment=experiment.model_dump(mode="json"),
        parent=slot.parent,
        versions=soft_prompt.versions(),
        content_hash=soft_prompt.content_hash(slot.best_vectors),
    )


def checkpoints(folder: str) -> str:
    """Where a run's checkpoints lie."""
    return storage.join(folder, "checkpoints")


def _memory() -> int:
    """Memory that this worker uses now, in bytes: GPU memory where there is one, else resident memory."""
    if torch.cuda.is_available():
        return int(torch.cuda.memory_allocated())
    return int(psutil.Process().memory_info().rss)


def _peak_memory() -> int:
    """Most memory this worker has used so far, in bytes: GPU memory where there is one, else resident memory."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
