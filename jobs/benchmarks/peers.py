"""The same task learned in other ways: PEFT's prompt tuning in a plain loop, LoRA, full fine-tuning.

Optimiser, schedule, clipping, batch size, steps and the choice of the best step are the experiment's; batches are drawn from
plain permutations. All are evaluated by this project's own code. PEFT's prompt tuning runs PEFT's forward pass; LoRA and full
fine-tuning train through `PromptedModel` without a soft prompt, which computes the same loss sooner (checked by `agree`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn

from benchmarks.steps import padded
from ptuning.config import Experiment
from ptuning.data.dataset import Split
from ptuning.data.task import Task
from ptuning.model.base import Base
from ptuning.model.packing import Objective, Row, pack_targets
from ptuning.model.prompted_model import PromptedModel
from ptuning.training.distributed import Workers
from ptuning.training.evaluate import evaluate
from ptuning.training.slot import learning_rate

RATES = {"lora": (1e-3, 5e-3), "full": (2e-4, 1e-3)}
"""Learning rates of which the first seed chooses one on the validation rows."""
RANK = 8


@dataclass(frozen=True)
class Learned:
    """What one training reached."""

    rate: float
    curve: list[tuple[int, float]]
    """Step and validation metric of each evaluation."""
    best: float
    test: float
    seconds: float
    end: dict[str, float] = field(default_factory=dict)
    """All metrics at the end, of a soft prompt of ours."""


@dataclass(frozen=True)
class Learner:
    """Parameters to be trained, the loss of a batch (mean over target tokens), and the metrics of a split."""

    parameters: list[nn.Parameter]
    loss: Callable[[list[Row]], Tensor]
    measure: Callable[[Split, int | None], dict[str, float]]


def prompt_tuning(experiment: Experiment, base: Base, model: PromptedModel, task: Task, seed: int) -> Learned:
    """PEFT's prompt tuning with the experiment's length and learning rate, begun from rows of the vocabulary."""
    torch.manual_seed(seed)
    config = PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=experiment.prompt.length, prompt_tuning_init="SAMPLE_VOCAB"
    )
    peft: Any = get_peft_model(base.load(torch.float32), config)
    weight: nn.Parameter = peft.prompt_encoder["default"].embedding.weight

    def loss(rows: list[Row]) -> Tensor:
        return peft(**padded(rows)).loss

    def measure(split: Split, room: int | None) -> dict[str, float]:
        return evaluate(model, [weight.detach()], split, task.encoder, Workers(), room)[0].metrics

    return fit(Learner([weight], loss, measure), experiment, task, seed, experiment.train.peak)


def weights(method: str, experiment: Experiment, base: Base, task: Task, seed: int, rate: float) -> Learned:
    """LoRA on all linear maps of the layers ("lora"), or all parameters of the base ("full"), by the experiment's objective; no
    soft prompt."""
    model = PromptedModel(base.load(torch.float32))
    if method == "lora":
        torch.manual_seed(seed)
        get_peft_model(model.base, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"))
    else:
        model.base.requires_grad_(True)
    nothing = torch.zeros(0, base.width)
    objective = Objective(task.encoder.label_trie, text=False) if experiment.objective == "choice" else Objective()

    def loss(rows: list[Row]) -> Tensor:
        nll = model([nothing], pack_targets([0], [rows], [objective]))
        return nll.mean() if objective.text else nll.sum() / len(rows)

    def measure(split: Split, room: int | None) -> dict[str, float]:
        return evaluate(model, [nothing], split, task.encoder, Workers(), room)[0].metrics

    parameters = [parameter for parameter in model.base.parameters() if parameter.requires_grad]
    if method == "full" and seed == 0:
        whole = lambda rows: model([nothing], pack_targets([0], [rows])).mean()  # noqa: E731
        agree(base, parameters, whole, [task.train.row(row)[:2] for row in range(4)])
    return fit(Learner(parameters, loss, measure), experiment, task, seed, rate)


def agree(base: Base, parameters: list[nn.Parameter], loss: Callable[[list[Row]], Tensor], rows: list[Row]) -> None:
    """Our pass gives the gradient of every weight that transformers' own gives."""
    plain: Any = base.load(torch.float32)
    plain(**padded(rows)).loss.backward()
    ours = torch.autograd.grad(loss(rows), parameters)
    theirs = [parameter.grad for parameter in plain.parameters()]
    expected = torch.cat([gradient.flatten() for gradient in theirs])
    difference = torch.cat([gradient.flatten() for gradient in ours]) - expected
    relative = float(difference.norm() / expected.norm())
    assert relative < 1e-4, f"gradients of the base differ by {relative:.1e}"


def fit(learner: Learner, experiment: Experiment, task: Task, seed: int, rate: float) -> Learned:
    """Train, keep the best step on the validation rows, read the test rows once."""
    assert task.validation and task.test and experiment.train.optimizer == "adamw"
    config = experiment.train.model_copy(update={"learning_rate": rate})
    metric, target = experiment.metric, "accuracy" if experiment.data.labels else "rouge_l"
    sign = -1 if metric == "loss" else 1
    optimizer = torch.optim.AdamW(learner.parameters, lr=rate, weight_decay=config.weight_decay)
    batches = shuffled(len(task.train), config.batch_size, seed)
    curve: list[tuple[int, float]] = []
    best: tuple[float, float] | None = None
    kept: list[Tensor] = []
    began = time.perf_counter()
    for step in range(1, config.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step - 1)
        learner.loss([task.train.row(int(row))[:2] for row in next(batches)]).backward()
        if config.clip:
            nn.utils.clip_grad_norm_(learner.parameters, config.clip)
        optimizer.step()
        optimizer.zero_grad()
        if step % config.evaluate_every == 0 or step == config.steps:
            measured = learner.measure(task.validation, task.max_new_tokens if metric not in ("loss", "accuracy") else None)
            curve.append((step, measured[metric]))
            order = (sign * measured[metric], -measured["loss"])
            if best is None or order > best:
                best, kept = order, [parameter.detach().clone() for parameter in learner.parameters]
    assert best is not None
    with torch.no_grad():
        for parameter, value in zip(learner.parameters, kept, strict=True):
            parameter.copy_(value)
    test = learner.measure(task.test, task.max_new_tokens)[target]
    return Learned(rate, curve, sign * best[0], test, round(time.perf_counter() - began, 1))


def shuffled(rows: int, size: int, seed: int) -> Iterator[np.ndarray]:
    """Batches of row numbers, from one random permutation after the other."""
    draw = np.random.default_rng(seed)
    waiting = np.zeros(0, dtype=np.int64)
    while True:
        while len(waiting) < size:
            waiting = np.concatenate([waiting, draw.permutation(rows)])
        yield waiting[:size]
        waiting = waiting[size:]
