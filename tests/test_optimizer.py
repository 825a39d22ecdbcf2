"""One optimiser for the soft prompts of all slots: against torch's and transformers' for each alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Adafactor

from ptuning.settings.training import TrainConfig
from ptuning.training import checkpoint
from ptuning.training.optimizer import Together
from ptuning.training.starts import Start

pytestmark = pytest.mark.fast

KINDS: list[dict[str, Any]] = [
    {"optimizer": "adamw"},
    {"optimizer": "adamw", "weight_decay": 0.1},
    {"optimizer": "adafactor"},
    {"optimizer": "adafactor", "weight_decay": 0.1},
]
SIZES, RATES, STEPS = (3, 20, 1, 7), (0.3, 0.01, 0.1, 0.2), 6


def drawn(seed: int, rows: int) -> Tensor:
    return torch.randn(rows, 48, generator=torch.Generator().manual_seed(seed))


def starts(kinds: list[dict[str, Any]]) -> list[Start]:
    return [Start(0, drawn(rows, rows), TrainConfig(**kind)) for rows, kind in zip(SIZES, kinds, strict=True)]


def update(these: list[Start], step: int, sizes: tuple[int, ...] = SIZES, rates: tuple[float, ...] = RATES) -> None:
    together = Together(these)
    rates = tuple(rate / (1 + step) for rate in rates)
    numbers = together.numbers([start.updates + 1 for start in these], rates)
    together.update([torch.cat([drawn(100 * step + rows, rows) for rows in sizes])], numbers)


def alone(kind: dict[str, Any], rows: int, rate: float) -> Tensor:
    """What the library's own optimiser gives."""
    vectors = torch.nn.Parameter(drawn(rows, rows))
    config = TrainConfig(**kind)
    optimizer: Any = torch.optim.AdamW([vectors], weight_decay=config.weight_decay)
    if config.optimizer == "adafactor":
        options: Any = {"scale_parameter": False, "relative_step": False, "warmup_init": False, "decay_rate": -0.8}
        optimizer = Adafactor([vectors], lr=0.0, weight_decay=config.weight_decay, **options)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = rate / (1 + step)
        vectors.grad = drawn(100 * step + rows, rows)
        optimizer.step()
    return vectors.detach()


@pytest.mark.parametrize("kinds", [[KINDS[0]] * 4, [KINDS[2]] * 4, KINDS, [KINDS[at] for at in (3, 1, 0, 2)]])
def test_each_moves_as_with_the_librarys_optimiser(kinds: list[dict[str, Any]]) -> None:
    """Other lengths, rates, step numbers and kinds beside it, and joined anew before a step."""
    these = starts(kinds)
    for step in range(STEPS):
        update(these, step)
    for start, kind, rows, rate in zip(these, kinds, SIZES, RATES, strict=True):
        expected = alone(kind, rows, rate)
        if kind["optimizer"] == "adamw":
            assert torch.equal(start.vectors, expected)
        else:
            assert torch.allclose(start.vectors, expected, rtol=1e-5, atol=1e-6)


def test_the_average_has_the_weights_of_its_decay() -> None:
    """Against the weighted sum over all vectors in float64, beside starts with other decays and with none."""
    decays = (0.9, 0.0, 0.5, 0.999)
    these = [Start(0, drawn(rows, rows), TrainConfig(), 1.0, decay) for rows, decay in zip(SIZES, decays, strict=True)]
    history = [[start.vectors.double()] for start in these]
    for step in range(STEPS):
        update(these, step)
        for start, vectors in zip(these, history, strict=True):
            vectors.append(start.vectors.double())
    for start, decay, vectors in zip(these, decays, history, strict=True):
        weights = [1.0]
        for number in range(1, STEPS + 1):
            keep = min(decay, (1 + number) / (10 + number))
            weights = [*(weight * keep for weight in weights), 1 - keep]
        expected = sum(weight * each for weight, each in zip(weights, vectors, strict=True))
        assert abs(sum(weights) - 1) < 1e-12
        assert torch.allclose(start.average.double(), expected, atol=1e-6)
        assert torch.equal(start.average, start.vectors) == (decay == 0)


@pytest.mark.parametrize("decay", [0.0, 0.9])
@pytest.mark.parametrize("kind", KINDS)
def test_it_continues_from_a_checkpoint(kind: dict[str, Any], decay: float, tmp_path: Any) -> None:
    whole, part, again = (Start(0, drawn(20, 20), TrainConfig(**kind), 1.0, decay) for _ in range(3))
    for step in range(STEPS):
        update([whole], step, (20,), (0.1,))
    for step in range(3):
        update([part], step, (20,), (0.1,))
    checkpoint.save(str(tmp_path), 3, *part.state())
    saved = checkpoint.newest(str(tmp_path))
    assert saved is not None
    again.restore(*saved)
    for step in range(3, STEPS):
        update([again], step, (20,), (0.1,))
    assert torch.equal(whole.vectors, again.vectors) and torch.equal(whole.average, again.average)
    assert torch.equal(again.average, again.vectors) == (decay == 0)


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_of_earlier_versions_are_continued(kind: dict[str, Any]) -> None:
    """They hold the states of torch's and transformers' optimisers."""
    config = TrainConfig(**kind)
    vectors = torch.nn.Parameter(drawn(7, 7))
    options: Any = {"scale_parameter": False, "relative_step": False, "warmup_init": False, "decay_rate": -0.8}
    optimizer: Any = (
        torch.optim.AdamW([vectors], lr=0.1, weight_decay=config.weight_decay)
        if config.optimizer == "adamw"
        else Adafactor([vectors], lr=0.1, weight_decay=config.weight_decay, **options)
    )
    start = Start(0, drawn(7, 7), config)
    for step in range(4):
        if step == 2:
            state = optimizer.state[vectors]
            tensors = {f"optimizer.{key}": value for key, value in state.items() if isinstance(value, Tensor)}
            numbers = {key: value for key, value in state.items() if not isinstance(value, Tensor)}
            start.restore({"vectors": vectors.detach(), **tensors}, {"optimizer": numbers, "loss": 0.0})
        if step >= 2:
            together = Together([start])
            together.update([drawn(step, 7)], together.numbers([start.updates + 1], [0.1]))
        vectors.grad = drawn(step, 7)
        optimizer.step()
    assert torch.allclose(start.vectors, vectors.detach(), rtol=1e-5, atol=1e-6)
