"""Pictures: real PNGs that show something."""

from __future__ import annotations

import io
import math
import sys

import numpy as np
import pytest
from PIL import Image

from ptuning.figures import confusion, curves

pytestmark = pytest.mark.fast


def pixels(png: bytes) -> np.ndarray:
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def test_curves_show_every_line() -> None:
    training = [(step, 3 * math.exp(-step / 80) + 0.1 * math.sin(step)) for step in range(1, 401)]
    validation = [(step, 3 * math.exp(-step / 80)) for step in range(50, 401, 50)]
    one = pixels(curves({"train/loss": training}, "sms-spam", "loss"))
    both = pixels(curves({"train/loss": training, "validation/loss": validation}, "sms-spam", "loss"))
    assert one.shape == both.shape == (560, 1000, 3)
    orange = np.array([0xD1, 0x60, 0x2B])
    assert not (one == orange).all(axis=-1).any()
    assert (both == orange).all(axis=-1).sum() > 300
    assert both.std() > 10
    assert "matplotlib.pyplot" not in sys.modules


@pytest.mark.parametrize(
    "history",
    [
        {},
        {"loss": []},
        {"loss": [(1, 0.5)]},
        {"loss": [(step, math.nan) for step in range(100)]},
        {"loss": [(step, math.inf if step % 7 == 0 else 1.0) for step in range(100)]},
    ],
)
def test_curves_of_little_or_strange_data(history: dict[str, list[tuple[int, float]]]) -> None:
    assert pixels(curves(history, "title", "loss")).std() > 3


def test_smoothing_follows_the_mean() -> None:
    from ptuning.figures import _moving_average

    assert _moving_average(np.full(100, 2.0)).tolist() == [2.0] * 100
    assert _moving_average(np.arange(100.0))[50] == 50
    assert _moving_average(np.array([1.0, math.nan, 3.0] * 20))[30] == 2


@pytest.mark.parametrize("count", [2, 7, 20, 77])
def test_confusion_is_readable(count: int) -> None:
    matrix = [[30 if row == column else (row * column) % 3 for column in range(count)] for row in range(count)]
    picture = pixels(confusion(matrix, [f"card_payment_fee_charged_{label}" for label in range(count)]))
    height, width, _ = picture.shape
    assert picture.std() > 10
    assert 400 <= height <= 2400 and 400 <= width <= 2400
    assert min(height, width) / count > 20, "room for a label of 8 points"


def test_confusion_of_nothing_and_of_the_wrong_size() -> None:
    assert pixels(confusion([[0, 0], [0, 0]], ["ham", "spam"])).std() > 3
    with pytest.raises(ValueError, match="does not fit 3 labels"):
        confusion([[1, 2], [3, 4]], ["a", "b", "c"])
