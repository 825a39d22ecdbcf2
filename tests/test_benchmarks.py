"""The measuring itself, where a mistake would make wrong figures and no error: searches replayed on a table, PEFT's peers."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from conftest import REPOSITORY
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ptuning.cluster.local_paths import absolute
from ptuning.config import read_experiment
from ptuning.data.task import load_task
from ptuning.model.base import find_base
from ptuning.model.packing import pack_targets
from ptuning.model.prompted_model import PromptedModel
from ptuning.searching import space
from ptuning.settings.template import fill

pytestmark = pytest.mark.fast

STEPS, EVERY = 90, 10


@pytest.fixture
def experiment():
    overrides = ["search.trials=48", f"train.steps={STEPS}", f"train.evaluate_every={EVERY}"]
    return absolute(read_experiment(REPOSITORY / "jobs" / "sentiment.toml", overrides))


@pytest.fixture
def made(experiment) -> dict[str, Any]:
    """A table in which every configuration has another end, and the order at the first evaluation is the order at the end."""
    from benchmarks.budget import key_of

    axes = space.grid(experiment)
    points = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    curves = {
        key_of(point): [[step, (number + step / STEPS) / 100, 0.0] for step in range(EVERY, STEPS + 1, EVERY)]
        for number, point in enumerate(points)
    }
    return {"axes": axes, "steps": STEPS, "every": EVERY, "metric": "accuracy", "curves": curves, "speed": {"slots": 8}}


@pytest.mark.parametrize("name", ["grid", "random"])
def test_searches_that_stop_nothing_see_the_whole_table(experiment, made, name):
    from benchmarks.budget import METHODS, replay

    best = max(value for curve in made["curves"].values() for _, value, _ in curve)
    for seed in range(2):
        path = replay(experiment, made, METHODS[name], seed)
        spent, evaluations, found = zip(*path, strict=True)
        assert spent[-1] == 48 * STEPS
        assert spent == tuple(EVERY * number for number in evaluations)
        assert list(found) == sorted(found) and found[-1] == best
    assert replay(experiment, made, METHODS[name], 0) != path


@pytest.mark.parametrize("name", ["ASHA", "ASHA, packed"])
def test_asha_finds_the_best_of_an_orderly_table_with_less(experiment, made, name):
    from benchmarks.budget import METHODS, replay

    best = max(value for curve in made["curves"].values() for _, value, _ in curve)
    spent, _, found = replay(experiment, made, METHODS[name], 0)[-1]
    assert found == best
    assert spent < 0.7 * 48 * STEPS


def test_a_configuration_that_diverged_costs_a_step_and_no_more(experiment, made):
    from benchmarks.budget import METHODS, replay

    for key in list(made["curves"])[::2]:
        made["curves"][key] = []
    spent, evaluations, _ = replay(experiment, made, METHODS["grid"], 0)[-1]
    assert evaluations == 24 * STEPS // EVERY
    assert 24 * STEPS <= spent <= 24 * (STEPS + EVERY)


def test_the_peers_of_all_weights_train_on_the_loss_that_transformers_computes(experiment):
    from benchmarks.peers import agree

    base = find_base(experiment.model)
    model = PromptedModel(base.load(torch.float32))
    model.base.requires_grad_(True)
    ids = [[5, 9, 33, 7, 60], [8, 21, 4]]
    rows = [(source, [17, 3]) for source in ids]
    parameters = list(model.base.parameters())

    def loss(rows):
        return model([torch.zeros(0, base.width)], pack_targets([0], [rows])).mean()

    agree(base, parameters, loss, rows)
    with pytest.raises(AssertionError, match="differ"):
        agree(base, parameters, lambda rows: loss(rows[:1]), rows)


def test_batches_of_the_peers_see_every_row_once_an_epoch():
    from benchmarks.peers import shuffled

    batches = shuffled(10, 4, seed=0)
    rows = [int(row) for _ in range(5) for row in next(batches)]
    assert sorted(rows[:10]) == sorted(rows[10:]) == list(range(10))
    assert rows[:10] != rows[10:]


@pytest.mark.parametrize("shared", [1, 2], ids=["", "grouped"])
@pytest.mark.parametrize("slots", [1, 3])
def test_the_formula_counts_what_a_step_computes(shared: int, slots: int) -> None:
    from benchmarks.steps import Size, flops, our_step, random_llama, random_rows, random_vectors

    size = Size(3, 64, 160, 4, 4 // shared, 4000)
    model = PromptedModel(random_llama(torch.float32, size))
    step = our_step(model, random_vectors(20, size.width), random_rows([16] * 2), slots)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        step()
    assert counter.get_total_flops() == slots * flops(2, 16, 20, size)


def test_a_step_s_time_counts_neither_the_start_nor_pauses() -> None:
    from benchmarks.measuring import typical

    ends, now = [], 0
    for number in range(40):
        now += 5000 if number < 3 else 700 if number % 10 == 0 else 60 + number % 2
        ends.append(now)
    assert typical(ends) == pytest.approx(0.0605, abs=2e-4)


def test_a_part_of_the_rows_comes_from_all_over_the_file_with_its_own_fields(experiment) -> None:
    from benchmarks.text_prompts import cut, fields_of

    whole = load_task(experiment, find_base(experiment.model)).validation
    assert whole is not None
    part = cut(whole, 60)
    known = fields_of(part, experiment)
    assert [fill(experiment.data.input, row) for row in known] == part.rows["text"][:]
    places = [whole.rows["text"][:].index(text) for text in part.rows["text"][:]]
    assert len(part) == len(set(places)) == 60 and places[0] == 0 and places[-1] > 0.9 * len(whole)
    assert part.lengths.tolist() == whole.lengths[places].tolist()
    assert cut(whole, None) is cut(whole, len(whole)) is whole
