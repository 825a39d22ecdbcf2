"""What the benchmark's figures rest on: its FLOP formula, and its seconds per step."""

from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ptuning.model import PromptedModel

pytestmark = pytest.mark.fast


@pytest.fixture(autouse=True)
def jobs(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "jobs")


def test_the_formula_counts_what_a_step_computes():
    from benchmarks.steps import flops, our_step, random_llama, random_rows, random_vectors

    step = our_step(PromptedModel(random_llama(torch.float32, 4000)), random_vectors(20), random_rows([16] * 2))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        step()
    assert counter.get_total_flops() == flops(2, 16, 20, 4000)


def test_a_step_s_time_counts_neither_the_start_nor_pauses():
    from benchmarks.measuring import typical

    ends, now = [], 0
    for number in range(40):
        now += 5000 if number < 3 else 700 if number % 10 == 0 else 60 + number % 2
        ends.append(now)
    assert typical(ends) == pytest.approx(0.0605, abs=2e-4)
