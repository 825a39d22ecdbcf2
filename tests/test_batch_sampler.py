"""The order of batches: the same for the same arguments, complete, mixed, and dealt fairly to the workers."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ptuning.data.batch_sampler import BatchSampler, shard

pytestmark = pytest.mark.fast

LENGTHS = np.random.PCG64(0).random_raw(1000) % 300 + 1


def order(rows: int = 1000, batch_size: int = 8, seed: int = 0) -> BatchSampler:
    return BatchSampler(LENGTHS[:rows], batch_size, seed)


def test_a_batch_depends_on_the_step_alone() -> None:
    one, other = order(), order()
    forwards = [one.batch(step).tolist() for step in range(300)]
    backwards = [other.batch(step).tolist() for step in reversed(range(300))]
    assert forwards == backwards[::-1]
    assert order().batch(299).tolist() == forwards[299]
    assert forwards[0] != forwards[125]  # the first batch of the next epoch
    assert order(seed=1).batch(0).tolist() != forwards[0]


def test_the_order_never_changes() -> None:
    # Pinned, because a run resumed after an update must go on with the rows that it would have seen.
    pinned = BatchSampler(np.arange(10) % 3, 4, 7)
    rows = [[6, 3, 9, 4], [0, 7, 2, 8], [3, 1, 1, 5], [7, 4, 2, 8]]
    assert [pinned.batch(step).tolist() for step in range(4)] == rows


@settings(deadline=None)
@given(rows=st.integers(1, 150), batch_size=st.integers(1, 40), seed=st.integers(0, 2**64), steps=st.integers(1, 20))
def test_every_row_is_seen_as_often_as_any_other(rows: int, batch_size: int, seed: int, steps: int) -> None:
    batches = order(rows, batch_size, seed)
    counts = np.zeros(rows, dtype=int)
    for step in range(steps):
        batch = batches.batch(step)
        assert batch.shape == (batch_size,)
        assert (np.diff(batches.lengths[batch].astype(int)) >= 0).all()
        np.add.at(counts, batch, 1)
    assert counts.max() - counts.min() <= 1
    assert counts.sum() == steps * batch_size


@given(rows=st.integers(1, 150), batch_size=st.integers(1, 40))
def test_no_batch_is_full_of_copies(rows: int, batch_size: int) -> None:
    batches = order(rows, batch_size)
    most = max(np.bincount(batches.batch(step)).max() for step in range(20))
    assert most <= -(-batch_size // rows) + 1


def test_every_epoch_has_its_own_order() -> None:
    batches = order(rows=80, batch_size=8)
    epochs = [np.concatenate([batches.batch(step) for step in range(10 * e, 10 * e + 10)]) for e in range(3)]
    for one, other in itertools.combinations(epochs, 2):
        assert sorted(one) == sorted(other) == list(range(80))
        assert one.tolist() != other.tolist()


def test_a_batch_is_a_fair_draw_of_all_lengths() -> None:
    """Rows of one length often share a label: a batch of them would teach that label alone."""
    batches = order(rows=1000, batch_size=8)
    spread = np.mean([np.ptp(batches.lengths[batches.batch(step)].astype(int)) for step in range(125)])
    drawn = np.random.default_rng(0).permutation(1000).reshape(125, 8)
    assert spread == pytest.approx(np.mean([np.ptp(batches.lengths[rows].astype(int)) for rows in drawn]), rel=0.1)


@given(size=st.integers(1, 60), world=st.integers(1, 9), seed=st.integers(0, 1000))
def test_shares_are_fair_and_complete(size: int, world: int, seed: int) -> None:
    batches = order(batch_size=size, seed=seed)
    batch = batches.batch(0)
    shares = [shard(batch, rank, world) for rank in range(world)]
    assert sorted(np.concatenate(shares)) == sorted(batch)
    sizes = [len(rows) for rows in shares]
    assert max(sizes) - min(sizes) <= 1
    tokens = [int(batches.lengths[rows].sum()) for rows in shares]
    assert max(tokens) - min(tokens) <= batches.lengths[batch].max()
    assert shard(batch, 0, 1).tolist() == batch.tolist()


def test_a_step_costs_a_batch_and_not_the_data() -> None:
    batches = BatchSampler(np.resize(LENGTHS, 1_000_000), 64, 0)
    batches.batch(0)
    start = time.monotonic()
    for step in range(250):
        batches.batch(step)
    assert time.monotonic() - start < 1
