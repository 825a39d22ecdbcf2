"""Several initialisations of a soft prompt, trained side by side until one is left, so that a bad one does not spoil a run.

The result of training depends on the initialisation more than on most settings. With `train.starts = N` a run has N starts. In
the first part of its steps they train on the same batches, and in each round the worse half is dropped (successive halving,
Jamieson and Talwalkar 2016), by the loss on the validation rows.

Shapes: P soft-prompt tokens, H width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ptuning.settings.training import TrainConfig

SCALE = 2.0**16
"""Factor of the loss in float16, whose smallest number is 6e-8: without it, gradients of activations would vanish."""
LOWER = 4.0
"""Divides the scale where a gradient exceeds float16's largest number, 65,504."""
SHARE = 0.2
"""Fraction of a run's steps after which one start is left."""


class Start:
    """One start in training: its vectors `[P, H]` and their optimiser."""

    def __init__(self, number: int, vectors: Tensor, config: TrainConfig, scale: float = 1.0) -> None:
        self.number = number
        self.scale = scale
        """Factor of its loss in the backward pass. It only falls (`lower_scale`), so a run gives the same numbers again."""
        self.vectors = nn.Parameter(vectors.clone())  # fp32, on the base's device
        self.optimizer = _optimizer(config, self.vectors)
        self.loss = 0.0
        """Sum of its training losses since the last round: the criterion if there are no validation rows."""

    def lower_scale(self) -> bool:
        """Lower the factor of the loss after a gradient that was not finite; False if that would not help."""
        if self.scale <= 1.0:
            return False
        self.scale = max(1.0, self.scale / LOWER)
        return True

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
        return tensors, {
            "number": self.number,
            "optimizer": numbers,
            "loss": self.loss,
            "scale": self.scale,
        }

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        self.vectors.data.copy_(tensors["vectors"])
        moments = {key.removeprefix("optimizer."): value for key, value in tensors.items() if key.startswith("optimizer.")}
        groups = self.optimizer.state_dict()["param_groups"]
        # It moves the moments, which were read from a file, to the device of the vectors.
        self.optimizer.load_state_dict({"state": {0: {**state["optimizer"], **moments}}, "param_groups": groups})
        self.loss = state["loss"]
        self.scale = state.get("scale", self.scale)  # none in checkpoints of earlier versions


def lower_scales(starts: Sequence[Start], losses: Tensor, gradients: Sequence[Tensor]) -> bool:
    """Lower the scales of the starts whose scaled gradient has exceeded the numbers of float16. True if there are any: the step
    is then computed again, for all starts; the gradients of the others are the same again."""
    lowered = False
    for start, loss, gradient in zip(starts, losses.tolist(), gradients, strict=True):
        if start.scale != 1 and math.isfinite(loss) and not bool(torch.isfinite(gradient).all()):
            lowered |= start.lower_scale()
    if lowered:
        for start in starts:
            start.vectors.grad = None
    return lowered


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
    from transformers import Adafactor  # imports PEFT and bitsandbytes where they are installed (5.23, trainer_utils.py)

    return Adafactor(
        [vectors],
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        scale_parameter=False,
        relative_step=False,
        warmup_init=False,
        decay_rate=-0.8,
    )
