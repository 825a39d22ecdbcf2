"""Divides the rows of a step: among the workers, and of a worker among passes.

A worker takes whole soft prompts where there are at least as many as workers: then a soft prompt itself is computed by one
worker instead of all, and its gradient is exactly that of a run with one worker. What is left over is divided by rows. Passes
that are limited (`train.micro_batch_size`) are also divided by soft prompts first: every pass computes its soft prompts again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ptuning.data.batch_sampler import shard

Rows = NDArray[np.int64]


class Part(NamedTuple):
    """Rows of one start in a pass; none in a pass that only the other workers need."""

    start: int
    rows: Rows


def divide(batches: Sequence[Rows], most: int | None, rank: int, size: int) -> list[list[Part]]:
    """The passes of worker `rank` of `size`. `batches`: the global batch of every start; `most`: rows of a pass, None: any.

    Every worker makes the same number of passes, as a partitioned base needs.
    """
    passes = [_passes(_own(batches, rank, size), most) for rank in range(size)]
    longest = max(map(len, passes))
    empty = [Part(0, np.empty(0, dtype=np.int64))]
    return [*passes[rank], *[empty] * (longest - len(passes[rank]))]


def _own(batches: Sequence[Rows], rank: int, size: int) -> list[Part]:
    """Whole starts, as many for every worker, and rows of the others."""
    whole = len(batches) // size
    mine = [Part(start, batches[start]) for start in range(rank * whole, (rank + 1) * whole)]
    return mine + [Part(start, shard(batches[start], rank, size)) for start in range(whole * size, len(batches))]


def _passes(parts: Sequence[Part], most: int | None) -> list[list[Part]]:
    """Parts in passes of at most `most` rows: whole ones as long as they fit, larger ones in pieces of equal size."""
    if most is None:
        return [list(parts)]
    passes: list[list[Part]] = []
    room = 0
    for start, rows in parts:
        for piece in np.array_split(rows, max(1, math.ceil(len(rows) / most))):
            if not passes or len(piece) > room:
                passes.append([])
                room = most
            passes[-1].append(Part(start, piece))
            room -= len(piece)
    return passes
