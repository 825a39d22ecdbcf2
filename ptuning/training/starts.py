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

from torch import Tensor

from ptuning.settings.training import TrainConfig
from ptuning.training.optimizer import RULES

SCALE = 2.0**16
"""Factor of the loss in float16, whose smallest number is 6e-8: without it, gradients of activations would vanish."""
LOWER = 4.0
"""Divides the scale where a gradient exceeds float16's largest number, 65,504."""
SHARE = 0.2
"""Fraction of a run's steps after which one start is left."""


class Start:
    """One start in training, on the base's device: its vectors, fp32, `[P, H]` or of a key-value prefix
    `[P, layers, 2, heads, d]`, their average, and the moments of their optimiser. While it trains, they are parts of the
    tensors of all starts (`optimizer.Together`)."""

    def __init__(
        self,
        number: int,
        vectors: Tensor,
        config: TrainConfig,
        scale: float = 1.0,
        average_decay: float = 0.0,
        frozen: int = 0,
    ) -> None:
        self.number = number
        self.scale = scale
        """Factor of its loss in the backward pass. It only falls (`lower_scale`), so a run gives the same numbers again."""
        self.optimizer: str = config.optimizer
        self.weight_decay = config.weight_decay
        self.frozen = frozen
        self.vectors = vectors.clone()
        self.moments = RULES[self.optimizer].empty(self.vectors.flatten(1))
        self.updates = 0
        """Number of updates so far."""
        self.average_decay = average_decay
        self.average = self.vectors.clone()
        """What is evaluated and kept: an exponential average of the vectors over the updates. Without one: the vectors."""
        self.loss = 0.0
        """Sum of its training losses since the last round: the criterion if there are no validation rows."""

    def lower_scale(self) -> bool:
        """Lower the factor of the loss after a gradient that was not finite; False if that would not help."""
        if self.scale <= 1.0:
            return False
        self.scale = max(1.0, self.scale / LOWER)
        return True

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The complete state of the start, as tensors and JSON."""
        tensors = {"vectors": self.vectors, **{f"optimizer.{key}": value for key, value in self.moments.items()}}
        if self.average_decay:
            tensors["average"] = self.average
        return tensors, {
            "number": self.number,
            "optimizer": {"step": self.updates},
            "loss": self.loss,
            "scale": self.scale,
        }

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        self.vectors.copy_(tensors["vectors"])
        self.average.copy_(tensors.get("average", self.vectors))  # none without an average, and in those of earlier versions
        found = {key.removeprefix("optimizer."): value for key, value in tensors.items() if key.startswith("optimizer.")}
        for key, into in self.moments.items():
            if key in found:  # not in those of earlier versions before the first step
                into.copy_(found[key])
        # Earlier versions have the step of AdamW as a tensor.
        self.updates = int(found["step"]) if "step" in found else state["optimizer"].get("step", 0)
        self.loss = state["loss"]
        self.scale = state.get("scale", self.scale)  # none in checkpoints of earlier versions


def lower_scales(starts: Sequence[Start], losses: Sequence[float], norms: Sequence[float]) -> bool:
    """Lower the scales of the starts whose scaled gradient has exceeded the numbers of float16. True if there are any: the step
    is then computed again, for all starts; the gradients of the others are the same again."""
    lowered = False
    for start, loss, norm in zip(starts, losses, norms, strict=True):
        if start.scale != 1 and math.isfinite(loss) and not math.isfinite(norm):
            lowered |= start.lower_scale()
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
