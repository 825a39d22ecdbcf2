"""READ FIRST: how soft prompts are trained. K slots share one frozen base; training one soft prompt is the case K = 1.

`train` is the loop. It knows neither Ray nor MLflow: a `source` hands out assignments, `report` takes events. Every worker
runs it with the same assignments and ends with the same numbers; `report` is called on the first worker only.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal, TypeVar

import torch
from torch import Tensor

from ptuning import storage
from ptuning.config import Experiment
from ptuning.data.task import Task
from ptuning.errors import UserError
from ptuning.model.base import Base
from ptuning.model.kv_prefix import computed, kv_shape
from ptuning.model.prompted_model import PromptedModel
from ptuning.model.soft_prompt import SoftPrompt
from ptuning.training import checkpoint
from ptuning.training.distributed import Workers
from ptuning.training.evaluate import Evaluation, evaluate
from ptuning.training.messages import (
    Command,
    Evaluated,
    Event,
    Failed,
    Finished,
    Report,
    Source,
    Started,
    StartRun,
    Stepped,
)
from ptuning.training.slot import Slot, checkpoints, initial_starts, learning_rate, make_card, with_learning_rate
from ptuning.training.starts import SCALE
from ptuning.training.stepper import Stepper
from ptuning.training.teacher import Teacher

Each = TypeVar("Each")


class Pack:
    """The slots that train together over one base, on one of the workers."""

    def __init__(
        self,
        model: PromptedModel,
        base: Base,
        workers: Workers,
        load_task: Callable[[Experiment], Task],
        num_slots: int = 1,
        has_news: Callable[[], bool] | None = None,
        recorded_until: Callable[[], float] = lambda: -math.inf,
    ) -> None:
        """`has_news`: whether the source has news, asked on the first worker only; default: while a slot is free.
        `recorded_until`: the monotonic time before which all events that were told will survive a crash; default: none will.
        """
        self.model = model
        self.base = base
        self.workers = workers
        self.load_task = load_task
        self.num_slots = num_slots
        self.has_news = has_news or (lambda: self.free > 0)
        self.recorded_until = recorded_until
        self.news_pending = True
        """The first worker has news from the source. All know it from the step's own collective: one more would cost more
        than a small step."""
        self.slots: list[Slot] = []
        self.stepper = Stepper(model, workers)
        self.teacher = Teacher(model, workers, self.embed)
        self.writer = checkpoint.Writer()

    @property
    def free(self) -> int:
        return self.num_slots - len(self.slots)

    def attach(self, assignment: StartRun) -> Slot:
        """Give a free slot to a run, from its newest checkpoint if it has one."""
        experiment = assignment.experiment
        task = self.load_task(experiment)
        if experiment.prompt.kind == "kv":
            kv_shape(self.model)  # before anything is computed: not every base takes one
        if experiment.objective == "distill":
            task = self.teacher.teach(task, experiment)
        experiment = with_learning_rate(experiment, self.embed, self.base.vocabulary)
        assignment = replace(assignment, experiment=experiment)
        starts, parent = initial_starts(experiment, task, self.base, self.embed, self.prefix)
        scale = SCALE if self.model.base.dtype == torch.float16 else 1.0
        slot = Slot(assignment, task, [vectors.to(self.model.base.device) for vectors in starts], scale)
        slot.parent = parent
        # The first worker's view decides: two workers may see a store at different moments.
        saved = self.workers.broadcast(checkpoint.newest(checkpoints(assignment.folder)) if self.workers.is_main else None)
        if saved:
            if "starts" not in saved[1]:
                raise UserError(
                    f"{assignment.folder}: its checkpoints are of ptuning 0.1, which used other rows per step; start it again "
                    "under another name"
                )
            slot.restore(*saved)
        self.slots.append(slot)
        return slot

    @torch.no_grad()
    def embed(self, ids: list[int]) -> Tensor:
        """Rows of the base's input embedding, `[n, H]` fp32, whole or sharded."""
        device = self.model.base.device
        return self.model.base.get_input_embeddings()(torch.tensor(ids, dtype=torch.long, device=device)).float().cpu()

    def prefix(self, embeddings: Tensor) -> Tensor:
        """Keys and values of embeddings `[P, H]` in all layers, fp32."""
        return computed(self.model, embeddings).cpu()


def train(pack: Pack, source: Source, report: Report) -> None:
    """Train until the source has no more orders and every slot is done."""
    try:
        _train(pack, source, report)
    except BaseException:
        pack.writer.settle()
        raise
    pack.writer.end()


def _train(pack: Pack, source: Source, report: Report) -> None:
    more = True
    while more or pack.slots:
        if more and (pack.news_pending or not pack.slots):
            orders = source(pack.free)
            more = orders is not None
            for order in orders or []:
                apply(pack, order, report)
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


def apply(pack: Pack, order: Command, report: Report) -> None:
    """Let a run join or leave."""
    if isinstance(order, StartRun):
        start(pack, order, report)
        return
    for slot in [slot for slot in pack.slots if slot.name == order.run]:  # none: it has just ended by itself
        if order.how == "finish":
            finish(pack, slot, report)
            continue
        if order.how == "pause":
            save_checkpoint(pack, slot)
        pack.writer.wait(checkpoints(slot.folder))  # nothing is written any more once it has left
        pack.slots.remove(slot)


def start(pack: Pack, assignment: StartRun, report: Report) -> None:
    """Attach an assignment and say where it begins; a resumed one first repeats what its checkpoint saw last."""
    try:
        slot = pack.attach(assignment)
    except UserError as error:  # the same on every worker
        report(Failed(assignment.experiment.name, 0, str(error)))
        return
    again, slot.unrecorded_events = [event for _, event in slot.unrecorded_events], []
    for event in again:
        emit(slot, report, event)
    report(Started(slot.name, slot.step, slot.config.steps))
    if slot.done:  # it was interrupted between its last checkpoint and its result
        finish(pack, slot, report)


def step(pack: Pack, report: Report) -> None:
    """One optimiser update of every slot, on the global batch that its workers share."""
    slots = list(pack.slots)
    if not slots:
        return
    began = time.perf_counter()
    done = pack.stepper.step(slots, pack.has_news)
    pack.news_pending = done.news
    speed = done.tokens * pack.workers.size / (time.perf_counter() - began)
    for slot, losses, norms in zip(slots, done.losses, done.norms, strict=True):
        _advance(pack, slot, losses, norms, speed, report)


def _advance(pack: Pack, slot: Slot, losses: list[float], norms: list[float], speed: float, report: Report) -> None:
    """A slot's starts have moved. One whose loss or gradient is not finite leaves; the last one takes the slot with it."""
    sound = [math.isfinite(loss) and math.isfinite(norm) for loss, norm in zip(losses, norms, strict=True)]
    if not any(sound):
        fail(pack, slot, report, losses[0])
        return
    slot.starts = list(itertools.compress(slot.starts, sound))
    losses, norms = (list(itertools.compress(each, sound)) for each in (losses, norms))
    values = {"loss": min(losses), "learning_rate": learning_rate(slot.config, slot.step)}
    if len(losses) > 1:
        values |= {f"start_{start.number}_loss": loss for start, loss in zip(slot.starts, losses, strict=True)}
    values |= {"gradient_norm": norms[0], "tokens_per_second": speed}
    slot.advance(losses)
    emit(slot, report, Stepped(slot.name, slot.step, values))


def _split(values: list[Each], sizes: Sequence[int]) -> list[list[Each]]:
    ends = list(itertools.accumulate(sizes))
    return [values[end - size : end] for end, size in zip(ends, sizes, strict=True)]


def evaluate_slots(pack: Pack, slots: list[Slot], split: Literal["validation", "test"]) -> list[list[Evaluation]]:
    """Evaluate slots on a split: those in training as they are, every start, on the test split with their best vectors.

    Text is generated for the test split, and on validation only where the metric that chooses the best step needs it.
    """
    evaluations: dict[str, list[Evaluation]] = {}
    for together in _sharing(slots, split):
        task = together[0].task
        text = split == "test" or together[0].experiment.metric != "loss"
        vectors = [[slot.best_vectors] if split == "test" else [start.average for start in slot.starts] for slot in together]
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
    best = slot.observe(evaluations[leader].metrics, leader)
    kept: str | None = None
    if best and slot.keep_best:
        kept = storage.join(slot.folder, "best", f"step-{slot.step:09d}")
        if pack.workers.is_main:
            save_soft_prompt(pack, slot, {f"validation_{name}": value for name, value in slot.best.items()}, kept)
    if len(losses) > 1:
        values |= {f"start_{start.number}_loss": loss for start, loss in zip(slot.starts, losses, strict=True)}
    slot.halve(losses)
    emit(slot, report, Evaluated(slot.name, slot.step, values, best, pack.workers.memory(), kept))


def save_checkpoint(pack: Pack, slot: Slot) -> None:
    """The first worker writes; all hold the same state."""
    recorded_until = pack.recorded_until()
    slot.unrecorded_events = [(at, event) for at, event in slot.unrecorded_events if at >= recorded_until]
    if pack.workers.is_main:
        pack.writer.save(checkpoints(slot.folder), slot.step, *slot.state())


def finish(pack: Pack, slot: Slot, report: Report) -> None:
    """Read the test split once, with the best soft prompt; save the soft prompt; free the place."""
    pack.writer.wait(checkpoints(slot.folder))
    if not slot.best:
        slot.best_vectors, slot.best_step = slot.starts[0].average.clone(), slot.step
    measured = {f"validation_{name}": value for name, value in slot.best.items()}
    tested: Evaluation | None = None
    if slot.task.test:
        [[tested]] = evaluate_slots(pack, [slot], "test")
        measured |= {f"test_{name}": value for name, value in tested.metrics.items()}
    train = slot.task.train
    if train.teaching:  # what the soft prompt replaces
        measured["teacher_tokens"] = len(train.teacher_row(0)) - len(train.row(0)[0])
    peak_bytes = pack.workers.peak_memory()
    if pack.workers.is_main:  # all workers hold the same vectors
        folder = storage.join(slot.folder, "soft_prompt")
        result = save_soft_prompt(pack, slot, measured, folder)
        finished = Finished(
            slot.name,
            slot.step,
            measured,
            best_step=slot.best_step,
            early=slot.step < slot.config.steps,
            soft_prompt=folder,
            content_hash=result.card.content_hash,
            peak_bytes=peak_bytes,
            predictions=tested.predictions if tested else [],
            classification=tested.classification if tested else None,
            labels=list(slot.task.encoder.template.labels or ()),
        )
        report(finished)
    pack.slots.remove(slot)


def save_soft_prompt(pack: Pack, slot: Slot, measured: dict[str, float], folder: str) -> SoftPrompt:
    """Write the best soft prompt of a slot so far, with these metrics in its card."""
    config = pack.base.config.get_text_config()
    result = SoftPrompt(slot.best_vectors.detach().cpu(), make_card(slot, pack.base, pack.model, measured))
    result.save(
        folder,
        layers=int(getattr(config, "num_hidden_layers", 0)),
        heads=int(getattr(config, "num_attention_heads", 0)),
    )
    return result


def fail(pack: Pack, slot: Slot, report: Report, loss: float) -> None:
    """Give up one slot, on all workers together: they see the same loss and gradient. The others go on."""
    cause = f"loss {loss:g}" if not math.isfinite(loss) else "a gradient that is not finite"
    message = (
        f"{slot.name}: {cause} at step {slot.step + 1} (learning rate "
        f"{learning_rate(slot.config, slot.step):g}); lower train.learning_rate, or check the rows of this step"
    )
    report(Failed(slot.name, slot.step, message))
    pack.slots.remove(slot)


def emit(slot: Slot, report: Report, event: Event) -> None:
    """Report an event and remember it until a checkpoint finds it recorded."""
    slot.unrecorded_events.append((time.monotonic(), event))
    report(event)
