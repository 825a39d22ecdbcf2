"""Which rows make up the batch of a step: a function of (lengths, batch size, seed, step) alone.

No state is carried from step to step, so a run resumes at any step, and the number of workers never enters: a worker
takes its share of the global batch. Only the rows' lengths are needed, not the rows.

Rows of one length are not brought together. Rows that are alike in length are alike in label, so grouping makes batches of one
kind: it cost 0.08 of the accuracy on snips (BENCHMARKS.md), and saves little where rows lie unpadded.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class BatchSampler:
    """An endless order of batches, all of the same size.

    The stream of rows is one random permutation after the other, so after every epoch's worth of rows each was seen
    once more. A batch is the next piece of it, short rows first.
    """

    def __init__(self, lengths: NDArray[np.integer], batch_size: int, seed: int) -> None:
        """`lengths` [rows], at least one."""
        assert len(lengths) and batch_size > 0
        self.lengths = lengths
        self.batch_size = batch_size
        self.seed = seed
        self._latest_epoch: tuple[int, NDArray[np.int64]] | None = None

    def batch(self, step: int) -> NDArray[np.int64]:
        """[batch_size] indices of the rows of a step, from 0, short rows first."""
        rows = self._stream(step * self.batch_size, self.batch_size)
        return rows[np.argsort(self.lengths[rows], kind="stable")]

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
            self._latest_epoch = epoch, np.argsort(self._random(epoch, len(self.lengths)), kind="stable")
        return self._latest_epoch[1]

    def _random(self, epoch: int, size: int) -> NDArray[np.uint64]:
        """Raw random numbers: their stream never changes with numpy, as Generator.permutation may (NEP 19)."""
        seeds = np.random.SeedSequence([self.seed, epoch])
        return np.asarray(np.random.PCG64(seeds).random_raw(size), dtype=np.uint64)


def shard(batch: NDArray[np.int64], rank: int, world: int) -> NDArray[np.int64]:
    """The rows of a batch that worker `rank` of `world` computes.

    Rows are dealt to and fro (0 1 2 2 1 0 0 1 ...), the longest first: shares differ by at most one row, and by at most
    the longest row's tokens.
    """
    place = np.arange(len(batch))[::-1]  # a batch is sorted, short rows first
    turn, seat = np.divmod(place, world)
    return batch[np.where(turn % 2 == 0, seat, world - 1 - seat) == rank]
