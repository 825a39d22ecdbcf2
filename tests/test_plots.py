"""Pictures: real PNGs that show something."""

from __future__ import annotations

import io
import math
import sys

import numpy as np
import pytest
from PIL import Image

from ptuning.tracking.plots import MOST_TOKENS, confusion, curves, landscape, neighbours

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
    from ptuning.tracking.plots import _moving_average

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


def test_labels_may_be_anything_that_people_write() -> None:
    """Formulas that are none, characters that the font does not have: no error, no warning, and each label another picture."""
    names = ("$x^$", "垃圾邮件", "垃圾信件", "a\nb", "\x00", "card_payment_fee_charged_twice", "card_payment_fee_charged_once")
    pictures = {confusion([[1, 2], [3, 4]], ["ham", name]) for name in names}
    assert len(pictures) == len(names)


def test_the_best_so_far_goes_in_stairs_and_is_not_smoothed() -> None:
    points = [(step, float(step > 50)) for step in range(100)]
    blue = np.array([0x1F, 0x6F, 0xB4])
    stairs, smooth = ((pixels(curves({"best": points}, "t", "v", stairs=each)) == blue).all(axis=-1) for each in (True, False))
    assert stairs.any(axis=0).sum() == smooth.any(axis=0).sum(), "as wide"
    assert (stairs.sum(axis=0) > 100).sum() in (1, 2), "one upright line"
    assert (smooth.sum(axis=0) > 100).sum() == 0


def test_a_landscape_of_one_trial_and_of_several_starts() -> None:
    points = [(5, 0.001, 0.5, "random"), (20, 0.1, 0.9, "vocabulary"), (20, 0.01, 0.7, "labels")]
    for many in (1, 3):
        assert pixels(landscape(points[:many], "accuracy", "found")).std() > 10


@pytest.mark.parametrize("count", [1, 20, 100])
def test_the_nearest_words_are_shown_for_as_many_tokens_as_can_be_read(count: int) -> None:
    words = [[(" the", 0.9 - place / 200), ("\n", 0.4), (" 好", 0.1)] for place in range(count)]
    picture = pixels(neighbours(words, "sentiment"))
    assert picture.std() > 10 and picture.shape[0] / min(count, MOST_TOKENS) > 25, "room for a line of text"


def test_confusion_of_nothing_and_of_the_wrong_size() -> None:
    assert pixels(confusion([[0, 0], [0, 0]], ["ham", "spam"])).std() > 3
    with pytest.raises(ValueError, match="does not fit 3 labels"):
        confusion([[1, 2], [3, 4]], ["a", "b", "c"])
