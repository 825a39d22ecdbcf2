"""How the rows of a step are divided among workers and passes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptuning.training.passes import divide

pytestmark = pytest.mark.fast


@given(
    sizes=st.lists(st.integers(1, 20), min_size=1, max_size=9), workers=st.integers(1, 5), most=st.none() | st.integers(1, 30)
)
def test_every_row_is_computed_once(sizes: list[int], workers: int, most: int | None) -> None:
    batches = [np.arange(size) + 100 * start for start, size in enumerate(sizes)]
    passes = [divide(batches, most, rank, workers) for rank in range(workers)]
    assert len({len(own) for own in passes}) == 1  # a partitioned base needs all workers in every pass
    rows = [int(row) for own in passes for each in own for part in each for row in part.rows]
    assert sorted(rows) == sorted(int(row) for batch in batches for row in batch)
    for each in (each for own in passes for each in own):
        assert all(int(row) // 100 == part.start for part in each for row in part.rows)
        assert sorted({part.start for part in each}) == [part.start for part in each]  # in order, each once
        assert most is None or sum(len(part.rows) for part in each) <= most


def test_workers_take_whole_soft_prompts() -> None:
    batches = [np.arange(8)] * 5
    for rank in (0, 1):
        [own] = divide(batches, None, rank, 2)
        assert [(part.start, len(part.rows)) for part in own] == [(2 * rank, 8), (2 * rank + 1, 8), (4, 4)]
    [own] = divide(batches[:1], None, 1, 2)  # fewer than workers: rows
    assert [(part.start, len(part.rows)) for part in own] == [(0, 4)]


def test_passes_take_whole_soft_prompts_too() -> None:
    def shapes(slots: int, rows: int, most: int) -> list[list[tuple[int, int]]]:
        return [[(part.start, len(part.rows)) for part in each] for each in divide([np.arange(rows)] * slots, most, 0, 1)]

    assert shapes(4, 8, 8) == [[(0, 8)], [(1, 8)], [(2, 8)], [(3, 8)]]
    assert shapes(4, 8, 16) == [[(0, 8), (1, 8)], [(2, 8), (3, 8)]]
    assert shapes(1, 9, 5) == [[(0, 5)], [(0, 4)]]
