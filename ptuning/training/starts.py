"""Several initialisations of a soft prompt, trained side by side until one is left, so that a bad one does not spoil a run.

The result of training depends on the initialisation more than on most settings. With `train.starts = N` a run has N starts. In
the first part of its steps they train on the same batches, and in each round the worse half is dropped (successive halving,
Jamieson and Talwalkar 2016), by the loss on the validation rows.

Shapes: P soft-prompt tokens, H width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Adafactor

from ptuning.settings.training import TrainConfig

SHARE = 0.2
"""Fraction of a run's steps after which one start is left."""


class Start:
    """One start in training: its vectors `[P, H]` and their optimiser."""

    def __init__(self, number: int, vectors: Tensor, config: TrainConfig) -> None:
        self.number = number
        self.vectors = nn.Parameter(vectors.clone())  # fp32, on the base's device
        self.optimizer = _optimizer(config, self.vectors)
        self.loss = 0.0
        """Sum of its training losses since the last round: the criterion if there are no validation rows."""

    def update(self, gradient: Tensor, clip: float, rate: float) -> float:
        """One optimiser step with the gradient of the whole global batch; returns its norm before clipping."""
        norm = float(gradient.norm())
        if clip and norm > clip:
            gradient = gradient * (clip / norm)
        self.vectors.grad = gradient
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.vectors.grad = None
        return norm

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The complete state of the start, as tensors and JSON."""
        tensors, numbers = {"vectors": self.vectors.detach()}, {}
        for key, value in self.optimizer.state[self.vectors].items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{key}"] = value
            else:
                numbers[key] = value
        return tensors, {"number": self.number, "optimizer": numbers, "loss": self.loss}

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        self.vectors.data.copy_(tensors["vectors"])
        moments = {key.removeprefix("optimizer."): value for key, value in tensors.items() if key.startswith("optimizer.")}
        groups = self.optimizer.state_dict()["param_groups"]
        # It moves the moments, which were read from a file, to the device of the vectors.
        self.optimizer.load_state_dict({"state": {0: {**state["optimizer"], **moments}}, "param_groups": groups})
        self.loss = state["loss"]


def rounds(config: TrainConfig) -> dict[int, int]:
    """Step -> number of starts that continue after it; empty with a single start."""
    many = math.ceil(math.log2(config.starts))
    last = min(config.steps, max(many, round(SHARE * config.steps)))
    return {math.ceil(last * (number + 1) / many): math.ceil(config.starts / 2 ** (number + 1)) for number in range(many)}


def survivors(starts: list[Start], losses: list[float], keep: int) -> list[Start]:
    """The `keep` starts with the lowest losses, in their original order; ties: the earlier start. NaN counts as the highest."""
    order = sorted(range(len(starts)), key=lambda at: (math.isnan(losses[at]), losses[at], at))
    return [starts[at] for at in sorted(order[:keep])]


def _optimizer(config: TrainConfig, vectors: nn.Parameter) -> torch.optim.Optimizer:
    if config.optimizer == "adamw":
        return torch.optim.AdamW([vectors], lr=config.learning_rate, weight_decay=config.weight_decay)
    # As in Lester et al. 2021, section 3: external learning rate, no parameter scaling, beta2 decay 0.8.
    return Adafactor(
        [vectors],
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        scale_parameter=False,
        relative_step=False,
        warmup_init=False,
        decay_rate=-0.8,
    )
