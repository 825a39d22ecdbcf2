"""Which rows make up the batch of a step: a function of (lengths, batch size, seed, step) alone.

No state is carried from step to step, so a run resumes at any step, and the number of workers never enters: a worker
takes its share of the global batch. Only the rows' lengths are needed, not the rows.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

WINDOW = 50
"""Batches among which rows are grouped by length."""
_EPOCH, _TIES, _BATCHES = range(3)  # what a random stream is for


class BatchOrder:
    """An endless order of batches, all of the same size, grouped by length.

    The stream of rows is one random permutation after the other, so after every epoch's worth of rows each was seen
    once more. The stream is cut into windows of up to 50 batches, never longer than an epoch (sorting would put several
    copies of a row into one batch). In a window rows are sorted by length, cut into batches, and the batches shuffled.
    """

    def __init__(self, lengths: NDArray[np.integer], batch_size: int, seed: int) -> None:
        """`lengths` [rows], at least one."""
        assert len(lengths) and batch_size > 0
        self.lengths = lengths
        self.batch_size = batch_size
        self.seed = seed
        self.window = max(1, min(WINDOW, len(lengths) // batch_size))
        """Batches in a window."""
        self._latest_window: tuple[int, NDArray[np.int64]] | None = None
        self._latest_epoch: tuple[int, NDArray[np.int64]] | None = None

    def batch(self, step: int) -> NDArray[np.int64]:
        """[batch_size] indices of the rows of a step, from 0, short rows first."""
        number, place = divmod(step, self.window)
        if self._latest_window is None or self._latest_window[0] != number:
            self._latest_window = number, self._build_window(number)
        return self._latest_window[1][place]

    def _build_window(self, number: int) -> NDArray[np.int64]:
        """[window, batch_size] rows of a window's batches."""
        size = self.window * self.batch_size
        rows = self._stream(number * size, size)
        order = np.lexsort((self._random(_TIES, number, size), self.lengths[rows]))
        batches = rows[order].reshape(self.window, self.batch_size)
        return batches[np.argsort(self._random(_BATCHES, number, self.window), kind="stable")]

    def _stream(self, start: int, size: int) -> NDArray[np.int64]:
        """[size] rows of the stream from place `start` on."""
        count = len(self.lengths)
        parts = []
        while size:
            epoch, place = divmod(start, count)
            part = self._permutation(epoch)[place : place + size]
            parts.append(part)
            start, size = start + len(part), size - len(part)
        return np.concatenate(parts)

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        if self._latest_epoch is None or self._latest_epoch[0] != epoch:
            self._latest_epoch = epoch, np.argsort(self._random(_EPOCH, epoch, len(self.lengths)), kind="stable")
        return self._latest_epoch[1]

    def _random(self, purpose: int, number: int, size: int) -> NDArray[np.uint64]:
        """Raw random numbers: their stream never changes with numpy, as Generator.permutation may (NEP 19)."""
        seeds = np.random.SeedSequence([self.seed, purpose, number])
        return np.asarray(np.random.PCG64(seeds).random_raw(size), dtype=np.uint64)


def share(batch: NDArray[np.int64], rank: int, world: int) -> NDArray[np.int64]:
    """The rows of a batch that worker `rank` of `world` computes.

    Rows are dealt to and fro (0 1 2 2 1 0 0 1 ...), the longest first: shares differ by at most one row, and by at most
    the longest row's tokens.
    """
    place = np.arange(len(batch))[::-1]  # a batch is sorted, short rows first
    turn, seat = np.divmod(place, world)
    return batch[np.where(turn % 2 == 0, seat, world - 1 - seat) == rank]
