"""Plots of a run as PNG bytes. The only module that imports matplotlib.

Uses `Figure` objects with the Agg canvas, never pyplot, whose global state is not thread-safe and needs a display.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

DPI = 100
SMOOTHED = 30
"""A line with more points than this is drawn pale, with its moving average on top."""
MOST_TOKENS = 32
"""Maximum virtual tokens in one plot of nearest words."""
COLOURS = ("#1f6fb4", "#d1602b", "#2f8f4e", "#8a4fb0", "#b0902f", "#4a4a4a")


def curves(
    history: Mapping[str, Sequence[tuple[float, float]]], title: str, ylabel: str, xlabel: str = "step", stairs: bool = False
) -> bytes:
    """Metrics over steps, one line each: (step, value) points. Long lines are smoothed, short ones show every point.

    `stairs`: each value holds until the next point, as for the best value so far; never smoothed.
    """
    figure = Figure(figsize=(10, 5.6), dpi=DPI, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1))
    axes = figure.add_subplot()
    for index, (name, points) in enumerate(history.items()):
        colour = COLOURS[index % len(COLOURS)]
        steps = np.array([step for step, _ in points])
        values = np.array([value if math.isfinite(value) else math.nan for _, value in points], dtype=float)
        if stairs:
            axes.plot(steps, values, color=colour, linewidth=2, drawstyle="steps-post", label=name)
        elif len(points) > SMOOTHED:
            axes.plot(steps, values, color=colour, alpha=0.25, linewidth=1)
            axes.plot(steps, _moving_average(values), color=colour, linewidth=2, label=f"{name} (smoothed)")
        else:
            axes.plot(steps, values, color=colour, linewidth=1.5, marker="o", markersize=5, label=name)
    axes.set_title(title, fontsize=14)
    axes.set_xlabel(xlabel, fontsize=12)
    axes.set_ylabel(ylabel, fontsize=12)
    axes.tick_params(labelsize=11)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.grid(color="#dddddd", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    if any(history.values()):
        axes.legend(fontsize=11, frameon=False)
    else:
        axes.text(0.5, 0.5, "no points", transform=axes.transAxes, ha="center", fontsize=14, color="#777777")
    return _png(figure)


def landscape(points: Sequence[tuple[int, float, float, str]], metric: str, title: str) -> bytes:
    """The search space: (length, learning rate, value, init) of each trial as a dot whose colour is the value."""
    figure = Figure(figsize=(9, 5.6), dpi=DPI, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1))
    axes = figure.add_subplot()
    lengths = sorted({length for length, *_ in points})
    values = [value for _, _, value, _ in points]
    for marker, init in zip("osD^v", sorted({init for *_, init in points}), strict=False):
        chosen = [point for point in points if point[3] == init]
        axes.scatter([], [], c="#bbbbbb", s=170, marker=marker, edgecolors="#333333", linewidths=0.6, label=init)
        dots = axes.scatter(
            [rate for _, rate, _, _ in chosen],
            [lengths.index(length) for length, *_ in chosen],
            c=[value for _, _, value, _ in chosen],
            cmap="viridis_r" if metric == "loss" else "viridis",
            vmin=min(values),
            vmax=max(values),
            s=170,
            marker=marker,
            edgecolors="#333333",
            linewidths=0.6,
        )
    axes.set_xscale("log")
    axes.set_yticks(range(len(lengths)), [str(length) for length in lengths])
    axes.set_ylim(-0.6, max(len(lengths), 1) - 0.4)
    axes.set_xlabel("learning rate", fontsize=12)
    axes.set_ylabel("length", fontsize=12)
    axes.set_title(title, fontsize=14)
    axes.grid(color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    if points:
        figure.legend(title="init", fontsize=11, loc="outside lower center", ncols=5)
        figure.colorbar(dots, shrink=0.8).set_label(f"validation {metric}", fontsize=12)
    return _png(figure)


def confusion(matrix: Sequence[Sequence[int]], labels: Sequence[str]) -> bytes:
    """A confusion matrix `[true][predicted]`: counts as numbers, colour as the share of the true label.

    Raises:
        ValueError: the shape of the matrix does not match the number of labels.
    """
    counts = np.array(matrix, dtype=int)
    if counts.shape != (len(labels), len(labels)):
        raise ValueError(f"a matrix of {counts.shape} does not fit {len(labels)} labels")
    many = len(labels)
    names = [_plain(label, 24) for label in labels]
    # Up to some 20 labels the numbers fit into the cells; with more, the plot grows until the names are readable.
    side = min(max(0.75 * many, 4.0), 7.5) if many <= 20 else 0.2 * many + 4
    size = 12 if many <= 10 else 9 if many <= 20 else 8
    figure = Figure(figsize=(side + 2.5, side + 1.5), dpi=DPI, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1))
    axes = figure.add_subplot()
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    turn = 90 if many > 7 else 30 if max(map(len, names)) > 8 else 0
    axes.set_xticks(range(many), names, rotation=turn, ha="right" if turn == 30 else "center")
    axes.set_yticks(range(many), names)
    axes.tick_params(labelsize=size, length=0)
    axes.set_xlabel("predicted", fontsize=13)
    axes.set_ylabel("true", fontsize=13)
    axes.set_title(f"{int(np.trace(counts))} of {int(counts.sum())} right", fontsize=14)
    digits = len(str(counts.max(initial=0)))
    for row, column in zip(*np.nonzero(counts), strict=True):
        colour = "white" if shares[row, column] > 0.6 else "#1a1a1a"
        text = axes.text(column, row, str(counts[row, column]), ha="center", va="center", color=colour)
        text.set_fontsize(size if many <= 20 else 9 - min(digits, 4))
        text.set_in_layout(False)  # thousands of texts inside the axes, which do not affect the layout
    figure.colorbar(image, shrink=0.6, aspect=30).set_label("share of the true label", fontsize=12)
    return _png(figure)


def reliability(bins: Sequence[Mapping[str, Any]], ece: float, title: str) -> bytes:
    """Reliability diagram: accuracy over confidence. On the diagonal the probabilities are calibrated.

    `bins`: `confidence`, `accuracy` and `rows` of each (Guo et al. 2017, figure 1); the area of a dot is its share of the rows.
    """
    figure = Figure(figsize=(6, 5.6), dpi=DPI, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1))
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=14)
    axes.plot([0, 1], [0, 1], color="#999999", linewidth=1, linestyle="--")
    rows = np.array([each["rows"] for each in bins], dtype=float)
    confidence, accuracy = ([each[key] for each in bins] for key in ("confidence", "accuracy"))
    axes.plot(confidence, accuracy, color="#1f77b4", linewidth=1.5)
    axes.scatter(confidence, accuracy, s=30 + 400 * rows / max(rows.sum(), 1), color="#1f77b4", alpha=0.7, zorder=3)
    axes.set(xlim=(0, 1.02), ylim=(0, 1.02))
    axes.set_xlabel("probability of the predicted label", fontsize=12)
    axes.set_ylabel("share that is right", fontsize=12)
    axes.text(0.04, 0.94, f"expected calibration error {ece:.3f}", fontsize=12)
    return _png(figure)


def neighbours(words: Sequence[Sequence[tuple[str, float]]], title: str) -> bytes:
    """The words nearest to each virtual token with their cosines, nearest first. Too many tokens: only those nearest to
    words."""
    nearest = sorted(range(len(words)), key=lambda place: -words[place][0][1])
    places = sorted(nearest[:MOST_TOKENS])
    cosines = np.array([[cosine for _, cosine in words[place]] for place in places])
    many, columns = cosines.shape
    figure = Figure(
        figsize=(2.4 * columns + 2.2, 0.3 * many + 1.7), dpi=DPI, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1)
    )
    axes = figure.add_subplot()
    image = axes.imshow(cosines, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for row, place in enumerate(places):
        for column, (word, cosine) in enumerate(words[place]):
            colour = "white" if cosine > 0.6 else "#1a1a1a"
            cell = f"{_plain(repr(word), 20)}  {cosine:.2f}"
            axes.text(column, row, cell, ha="center", va="center", color=colour, fontsize=11)
    axes.set_xticks(range(columns), ["nearest", "second", "third", *(f"{each}th" for each in range(4, columns + 1))][:columns])
    axes.set_yticks(range(many), [str(place) for place in places])
    axes.tick_params(labelsize=11, length=0)
    axes.set_ylabel("virtual token", fontsize=12)
    shown = "virtual tokens" if many == len(words) else f"{many} of {len(words)} virtual tokens"
    axes.set_title(f"{title}: the words nearest to its {shown}", fontsize=14)
    figure.colorbar(image, shrink=min(1.0, 6 / many), aspect=20).set_label("cosine", fontsize=12)
    return _png(figure)


@cache
def _drawable() -> frozenset[int]:
    """The characters of the font."""
    return frozenset(get_font(findfont(FontProperties())).get_charmap())


def _plain(text: str, most: int) -> str:
    """Untrusted text in a form that matplotlib can show: no formulas, only characters with a glyph, limited length."""
    half = (most - 1) // 2  # labels often differ only at their ends
    text = text if len(text) <= most else f"{text[: most - 1 - half]}…{text[-half:]}"
    known = "".join(each if ord(each) in _drawable() else each.encode("unicode_escape").decode() for each in text)
    return known.replace("$", r"\$")


def _moving_average(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Moving average over a twentieth of the points; NaN is skipped."""
    finite = np.isfinite(values)
    total = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    number = np.concatenate([[0], np.cumsum(finite)])
    half, index = max(1, len(values) // 40), np.arange(len(values))
    start, end = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    found = number[end] - number[start]
    return np.where(found > 0, (total[end] - total[start]) / np.maximum(found, 1), np.nan)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()
