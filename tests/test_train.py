"""The loop, without Ray: on one worker, plain base. Laws 2, 4 and 5 of the design, and what a slot promises."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from conftest import weights_hash
from hypothesis import strategies as st
from support.training import Killed, Run, experiment

from ptuning import storage
from ptuning.config import parse_experiment
from ptuning.data.task import load_task
from ptuning.model import soft_prompt
from ptuning.model.base import Base
from ptuning.model.packing import Objective, pack_targets
from ptuning.model.prompted_model import PromptedModel
from ptuning.searching.space import best_result
from ptuning.settings.training import TrainConfig
from ptuning.training import checkpoint
from ptuning.training import evaluate as evaluation
from ptuning.training import loop as training
from ptuning.training import slot as training_slot
from ptuning.training.distributed import Workers
from ptuning.training.evaluate import generate_rows, label_scores
from ptuning.training.loop import train
from ptuning.training.messages import Command, Event, StartRun, StopRun
from ptuning.training.slot import Slot, learning_rate

pytestmark = pytest.mark.fast


EXAMPLES = int(os.environ.get("PTUNING_STAYS", "6"))
"""Random joins and leaves of law 4; `make test-all` has 12."""


STORED = pytest.mark.parametrize("base", [None, "int8"], indirect=True, ids=["plain", "int8"])
"""The base as it is, and stored in 8 bits."""


@pytest.fixture
def run(model: PromptedModel, base: Base, tmp_path: Path) -> Iterator[Any]:
    def make(folder: str = "runs", places: int = 1) -> Run:
        return Run(model, base, tmp_path / folder, places)

    yield make


def test_a_soft_prompt_learns_the_toy_task(run: Any, toy_task: SimpleNamespace) -> None:
    done = run()(experiment(toy_task, prompt__length=10, train__steps=60, train__learning_rate=0.3, train__evaluate_every=20))
    [finished] = done.of("finished")
    assert finished.values["test_accuracy"] > 0.9
    assert [event.step for event in done.of("evaluation")] == [20, 40, 60]
    losses = [event.values["loss"] for event in done.of("step")]
    assert len(losses) == 60 and losses[-1] < losses[0] / 2
    card = done.result("toy").card
    assert card.metrics == finished.values and card.length == 10 and card.template.labels == ("fruit", "tool")
    assert (card.dtype, card.training_pass, card.base_notes) == ("float32", "shared-prefix", ())


@pytest.mark.parametrize(
    ("target", "given", "weight"),
    [
        (" {label}", {}, 0.3),
        (" it is a {label}", {}, 0.0),
        (" {label}", {"text_weight": 0}, 0.0),
        (" it is a {label}", {"text_weight": 0.1}, 0.1),
        (" {label}", {"objective": "text"}, 0.0),
    ],
)
def test_labels_of_one_token_are_learned_as_text_too_and_the_card_says_so(
    run: Any, toy_task: SimpleNamespace, base: Base, target: str, given: dict[str, Any], weight: float
) -> None:
    tried = experiment(
        toy_task, data__target=target, train__steps=2, **{f"train__{key}": value for key, value in given.items()}
    )
    longest = max(map(len, load_task(tried, base).encoder.label_ids))
    assert (longest == 2) == (target == " {label}")
    card = run()(tried).result("toy").card
    assert card.experiment is not None
    train = card.experiment["train"]
    assert (train["objective"], train["text_weight"]) == (given.get("objective", "choice"), weight)
    assert parse_experiment(card.experiment).train.resolved_text_weight(longest) == weight, "a card can be trained again"
    public = card.public().experiment
    assert public is not None and public["train"]["text_weight"] == weight


@STORED
def test_law_2_only_the_soft_prompt_moves(run: Any, toy_task: SimpleNamespace, model: PromptedModel) -> None:
    before = weights_hash(model.base)
    done = run()(experiment(toy_task))
    assert weights_hash(model.base) == before
    assert all(parameter.grad is None for parameter in model.base.parameters())
    assert len(done.of("step")) == 20


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, Any]:
    """Vectors, metrics and curve of runs that were not killed; filled by the first test with these changes."""
    return {}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"train__optimizer": "adafactor"},
        {"train__objective": "text"},
        {"train__text_weight": 0},
        {"train__text_weight": 0.1, "train__class_weights": "balanced"},
        {"data__teacher": "sort "},
        {"data__teacher": "sort ", "data__labels": None, "data__target": "", "data__teacher_tokens": 3},
        {"train__starts": 5},  # of which 3, 2 and 1 are left after steps 2, 3 and 4
        {"train__starts": 3, "data__validation": None, "train__optimizer": "adafactor"},
    ],
    ids=["default", "adafactor", "text", "choice alone", "both", "distill", "text of a teacher", "starts", "starts alone"],
)
@pytest.mark.parametrize("killed_at", [1, 7, 20, *(pytest.param(step, marks=pytest.mark.nightly) for step in (3, 10, 13))])
def test_law_5_killed_and_resumed_is_bit_identical(
    run: Any, toy_task: SimpleNamespace, undisturbed: dict[str, Any], killed_at: int, changes: dict[str, Any]
) -> None:
    every = 1 if "train__starts" in changes else 5
    task = experiment(toy_task, **{"train__checkpoint_every": every, **changes})
    if str(changes) not in undisturbed:
        done = run("whole")(task)
        curve = {event.step: event.values["loss"] for event in done.of("step")}
        undisturbed[str(changes)] = done.result("toy").vectors, done.of("finished")[0].values, curve
    vectors, values, whole = undisturbed[str(changes)]
    interrupted = run("interrupted")
    with pytest.raises(Killed):
        interrupted(task, stop_after=killed_at)
    resumed = run("interrupted")(task)
    assert torch.equal(vectors, resumed.result("toy").vectors)
    assert values == resumed.of("finished")[0].values
    # It repeats at most one checkpoint interval, and no point of the curve is lost.
    first = resumed.of("start")[0].step
    assert killed_at - first <= 5
    curve = {event.step: event.values["loss"] for event in interrupted.of("step") + resumed.of("step")}
    assert curve == whole


@pytest.mark.parametrize("base", ["int8", "fp8"], indirect=True)
def test_law_5_over_a_base_stored_in_8_bits(run: Any, toy_task: SimpleNamespace) -> None:
    task = experiment(toy_task, train__checkpoint_every=5)
    whole = run("whole")(task)
    with pytest.raises(Killed):
        run("interrupted")(task, stop_after=7)
    resumed = run("interrupted")(task)
    assert torch.equal(whole.result("toy").vectors, resumed.result("toy").vectors)
    assert whole.of("finished")[0].values == resumed.of("finished")[0].values


def test_law_5_killed_while_finishing(run: Any, toy_task: SimpleNamespace) -> None:
    whole = run("whole")(experiment(toy_task))
    interrupted = run("interrupted")

    def kill(event: Event) -> None:
        if event.kind == "finished":
            raise Killed

    interrupted.on_event = kill
    with pytest.raises(Killed):
        interrupted(experiment(toy_task))
    resumed = run("interrupted")(experiment(toy_task))
    assert resumed.of("start")[0].step == 20 and resumed.of("finished")[0].step == 20
    assert resumed.of("finished")[0].values == whole.of("finished")[0].values
    assert torch.equal(whole.result("toy").vectors, resumed.result("toy").vectors)


def test_events_of_a_killed_driver_are_reported_again(run: Any, toy_task: SimpleNamespace) -> None:
    """What was not on its disk stands in the checkpoint, however often it dies."""
    task = experiment(toy_task, train__checkpoint_every=5)
    for killed_after in (7, 12, 17):
        with pytest.raises(Killed):
            run()(task, stop_after=killed_after)
    resumed = run()(task)
    assert [event.step for event in resumed.of("step")] == list(range(1, 21))


def test_events_that_the_driver_has_recorded_are_not_kept(run: Any, toy_task: SimpleNamespace) -> None:
    times: dict[int, float] = {}
    killed = run()
    killed.on_event = lambda event: times.setdefault(event.step, time.monotonic())
    killed.pack.recorded_until = lambda: times[4]  # between the telling of the fourth step and of the fifth
    with pytest.raises(Killed):
        killed(experiment(toy_task, train__checkpoint_every=5), stop_after=12)
    again = run()(experiment(toy_task, train__checkpoint_every=5))
    assert [event.step for event in again.of("step")] == list(range(5, 21))


@STORED
def test_law_4_packing_changes_nothing(run: Any, toy_task: SimpleNamespace) -> None:
    trials = [
        experiment(
            toy_task,
            name=f"t{index}",
            prompt__length=length,
            prompt__init=init,
            train__learning_rate=rate,
            train__seed=index,
            train__steps=steps,
            train__optimizer=optimizer,
            **more,
        )
        for index, (length, init, rate, steps, optimizer, more) in enumerate(
            [
                (4, "vocabulary", 0.05, 25, "adamw", {}),
                (1, "random", 0.01, 10, "adamw", {"train__objective": "text"}),
                (9, "labels", 0.3, 17, "adafactor", {"train__text_weight": 0.5}),
                (3, "vocabulary", 0.05, 15, "adamw", {"train__text_weight": 0}),
                (6, "vocabulary", 0.1, 25, "adamw", {"train__starts": 4}),
                (2, "random", 0.02, 5, "adamw", {"train__class_weights": "balanced"}),
            ]
        )
    ]
    packed = run("packed", places=3)(*trials)  # two join when others leave
    for trial in trials:
        alone = run("alone")(trial).result(trial.name).vectors
        together = packed.result(trial.name).vectors
        assert float((alone - together).norm() / alone.norm()) < 1e-5, trial.name


@pytest.fixture(scope="module")
def trained_alone() -> dict[str, torch.Tensor]:
    """Filled by the first example of the property."""
    return {}


@hypothesis.settings(max_examples=EXAMPLES, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(st.lists(st.tuples(st.integers(0, 12), st.integers(1, 30)), min_size=5, max_size=5))
def test_law_4_whoever_joins_and_leaves(
    run: Any, toy_task: SimpleNamespace, trained_alone: dict[str, torch.Tensor], stays: list[tuple[int, int]]
) -> None:
    """Five trials, each joining at some step; those that would stay longer than their 15 steps are trained to the end."""
    lengths, rates = (3, 1, 8, 5, 2), (0.05, 0.01, 0.3, 0.1, 0.02)
    trials = [
        experiment(
            toy_task,
            name=f"t{number}",
            prompt__length=length,
            train__learning_rate=rate,
            train__steps=15,
            train__seed=number,
            data__validation=None,
            data__test=None,
        )
        for number, (length, rate) in enumerate(zip(lengths, rates, strict=True))
    ]
    if not trained_alone:
        trained_alone |= {trial.name: run("alone")(trial).result(trial.name).vectors for trial in trials}
    folder = f"packed-{abs(hash(tuple(stays)))}"
    packed = run(folder, places=5)
    packed.pack.has_news = lambda: True
    clock = itertools.count()

    def source(free: int) -> list[Command] | None:
        now = next(clock)
        orders: list[Command] = [StopRun(f"t{n}", "finish") for n, (join, stay) in enumerate(stays) if join + stay == now]
        orders += [StartRun(trials[n], str(packed.folder / f"t{n}")) for n, (join, _) in enumerate(stays) if join == now]
        return orders if now <= 42 else None

    train(packed.pack, source, packed.events.append)
    for number, (_, stay) in enumerate(stays):
        [finished] = packed.of("finished", f"t{number}")
        assert finished.step == min(stay, 15)
        if stay >= 15:
            alone, together = trained_alone[f"t{number}"], packed.result(f"t{number}").vectors
            assert float((alone - together).norm() / alone.norm()) < 1e-5


def test_slots_that_share_their_rows_are_evaluated_together(
    run: Any, toy_task: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    together: list[int] = []
    original = training.evaluate

    def counting(model: Any, prompts: Any, split: Any, *rest: Any) -> Any:
        together.append(len(prompts))
        return original(model, prompts, split, *rest)

    trials = [experiment(toy_task, name=f"t{number}", train__seed=number, data__test=None) for number in range(3)]
    packed = run(places=3)
    task = packed.pack.load_task(trials[0])
    packed.pack.load_task = lambda experiment: task
    monkeypatch.setattr(training, "evaluate", counting)
    packed(*trials)
    assert together == [3, 3]
    alone = run("alone")(trials[1])
    for one, two in zip(packed.of("evaluation", "t1"), alone.of("evaluation", "t1"), strict=True):
        assert one.values == pytest.approx(two.values, rel=1e-5)


def test_a_run_whose_end_was_interrupted_only_ends(
    run: Any, toy_task: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between its last checkpoint and its soft prompt: it makes no step more."""
    task = experiment(toy_task)
    whole = run("whole")(task)

    def killed(*arguments: Any) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(training, "finish", killed)
        with pytest.raises(Killed):
            run("interrupted")(task)
    resumed = run("interrupted")(task)
    assert torch.equal(whole.result("toy").vectors, resumed.result("toy").vectors)
    assert [event.step for event in resumed.of("step")] == [] or max(event.step for event in resumed.of("step")) == 20


def test_a_slot_that_diverges_stops_alone(run: Any, toy_task: SimpleNamespace) -> None:
    bad, good = (experiment(toy_task, name=name) for name in ("bad", "good"))
    packed = run(places=2)

    def poison(event: Event) -> None:
        if event.run == "bad" and event.kind == "step" and event.step == 3:
            packed.pack.slots[0].vectors.data[0, 0] = math.nan

    packed.on_event = poison
    done = packed(bad, good)
    [failed] = done.of("failed")
    assert failed.run == "bad" and failed.step == 3
    rate = learning_rate(bad.train, 3)
    assert failed.message == (
        f"bad: loss nan at step 4 (learning rate {rate:g}); lower train.learning_rate, or check the rows of this step"
    )
    assert not storage.exists(str(done.folder / "bad"), "soft_prompt")
    alone = run("alone")(good).result("good").vectors
    assert float((alone - done.result("good").vectors).norm() / alone.norm()) < 1e-5


@pytest.mark.parametrize("cause", ["rows", "learning rate", "start"])
def test_whatever_makes_a_slot_diverge_it_stops_alone(
    run: Any, toy_task: SimpleNamespace, base: Base, model: PromptedModel, cause: str
) -> None:
    """Rows with a token whose embedding is broken, a learning rate beyond all measure, a start out of range."""
    changes: dict[str, Any] = {"name": "bad"}
    if cause == "rows":
        rows = [json.loads(line) for line in toy_task.train.read_text().splitlines()]
        rows[40]["text"] += " \u00fe"
        poisoned = toy_task.folder / "poisoned.jsonl"
        poisoned.write_text("".join(json.dumps(row) + "\n" for row in rows))
        changes["data__train"] = str(poisoned)
    elif cause == "learning rate":
        changes |= {"train__learning_rate": 1e30, "train__clip": 0.0, "train__warmup": 0.0}
    else:
        source = torch.zeros(4, base.width)
        source[0, 0] = 3e38  # finite in the file, not in the first layer
        card = soft_prompt.Card(name="x", base="x", length=4, width=base.width, content_hash=soft_prompt.content_hash(source))
        soft_prompt.SoftPrompt(source, card).save(str(toy_task.folder / "poison"))
        changes |= {"prompt__init": "soft-prompt", "prompt__init_from": str(toy_task.folder / "poison")}
    good = experiment(toy_task, name="good")
    alone = run("alone")(good).result("good").vectors
    broken = base.tokenizer("\u00fe", add_special_tokens=False)["input_ids"][-1]

    def poison(module: Any, inputs: Any, rows: torch.Tensor) -> torch.Tensor:
        return rows.masked_fill((inputs[0] == broken)[..., None], math.inf)

    embeddings = model.base.get_input_embeddings()
    with embeddings.register_forward_hook(poison) if cause == "rows" else contextlib.nullcontext():
        done = run("together", places=2)(experiment(toy_task, **changes), good)
    if cause == "learning rate":  # the base's norms swallow it: useless, but finite
        assert all(math.isfinite(event.values["loss"]) for event in done.of("step")) and not done.of("failed")
    else:
        [failed] = done.of("failed")
        assert failed.run == "bad" and "lower train.learning_rate, or check the rows of this step" in failed.message
        assert not storage.exists(str(done.folder / "bad"), "soft_prompt")
    assert float((alone - done.result("good").vectors).norm() / alone.norm()) < 1e-5


def test_micro_batches_give_the_same_training(run: Any, toy_task: SimpleNamespace) -> None:
    whole = run("whole")(experiment(toy_task))
    parts = run("parts")(experiment(toy_task, train__micro_batch_size=3))
    difference = whole.result("toy").vectors - parts.result("toy").vectors
    assert float(difference.norm() / whole.result("toy").vectors.norm()) < 1e-5


def test_the_best_step_is_kept_and_patience_stops(run: Any, toy_task: SimpleNamespace) -> None:
    # Validation rows with the labels exchanged: the better the training, the worse they look.
    text = toy_task.validation.read_text()
    toy_task.validation.write_text(text.replace('tool"', "?").replace('fruit"', 'tool"').replace("?", 'fruit"'))
    done = run()(
        experiment(
            toy_task, prompt__length=10, train__steps=200, train__evaluate_every=5, train__patience=3, train__learning_rate=0.3
        )
    )
    [finished] = done.of("finished")
    ranked = max(done.of("evaluation"), key=lambda event: (event.values["accuracy"], -event.values["loss"]))
    assert finished.best_step == ranked.step
    assert finished.step == ranked.step + 15 < 200
    saved = checkpoint.newest(training_slot.checkpoints(str(done.folder / "toy")))
    assert saved is not None and torch.equal(saved[0]["best_vectors"], done.result("toy").vectors)
    assert not torch.equal(saved[0]["start0.vectors"], done.result("toy").vectors)


def test_without_validation_the_last_step_is_kept(run: Any, toy_task: SimpleNamespace) -> None:
    done = run()(experiment(toy_task, data__validation=None))
    [finished] = done.of("finished")
    assert finished.best_step == 20 and not done.of("evaluation")
    assert {name.split("_")[0] for name in finished.values} == {"test"}
    saved = checkpoint.newest(training_slot.checkpoints(str(done.folder / "toy")))
    assert saved is not None and torch.equal(saved[0]["start0.average"], done.result("toy").vectors)
    assert not torch.equal(saved[0]["start0.vectors"], done.result("toy").vectors)


def test_without_an_average_the_vectors_themselves_are_kept(run: Any, toy_task: SimpleNamespace) -> None:
    done = run()(experiment(toy_task, data__validation=None, train__average_decay=0.0))
    saved = checkpoint.newest(training_slot.checkpoints(str(done.folder / "toy")))
    assert saved is not None and torch.equal(saved[0]["start0.vectors"], done.result("toy").vectors)
    assert "start0.average" not in saved[0] and done.result("toy").card.experiment["train"]["average_decay"] == 0


def test_the_test_split_is_read_once(run: Any, toy_task: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    original = training.evaluate

    def counting(model: Any, prompts: Any, split: Any, *rest: Any) -> Any:
        read.append(split.name)
        return original(model, prompts, split, *rest)

    monkeypatch.setattr(training, "evaluate", counting)
    run()(experiment(toy_task))
    assert read == ["validation", "validation", "test"]


@pytest.mark.parametrize("init", ["random", "vocabulary", "labels", "text"])
def test_initial_vectors_are_deterministic_in_the_seed(run: Any, toy_task: SimpleNamespace, base: Base, init: str) -> None:
    pack = run().pack
    text = {"prompt__init_text": "fruit or tool"} if init == "text" else {}

    def vectors(seed: int, kind: str) -> torch.Tensor:
        task = experiment(toy_task, prompt__init=init, prompt__kind=kind, train__seed=seed, prompt__length=7, **text)
        return training_slot.initial_vectors(task, load_task(task, base), base, pack.embed, pack.prefix)[0]

    for kind, shape in (("embedding", (7, base.width)), ("kv", (7, 2, 2, 2, 8))):
        assert torch.equal(vectors(0, kind), vectors(0, kind)) and vectors(0, kind).shape == shape
        assert torch.equal(vectors(0, kind), vectors(1, kind)) == (init == "text")


def test_a_soft_prompt_starts_from_another_one(run: Any, toy_task: SimpleNamespace) -> None:
    done = run()(experiment(toy_task))
    folder = str(done.folder / "toy" / "soft_prompt")
    for length in (3, 6):
        task = experiment(
            toy_task,
            name=f"child{length}",
            prompt__init="soft-prompt",
            prompt__init_from=folder,
            prompt__length=length,
            train__steps=1,
            train__learning_rate=1e-9,
        )
        child = run("children")(task).result(task.name)
        assert child.card.parent == done.result("toy").card.content_hash
        rows = min(3, length)
        assert torch.allclose(child.vectors[:rows], done.result("toy").vectors[:rows], atol=1e-6)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.875, 0.125]),
        ("cosine", [0.5, 1.0, 1.0, 0.5 + 0.5 * math.cos(math.pi / 8), 0.5 - 0.5 * math.cos(math.pi / 8)]),
    ],
)
def test_schedules(schedule: Any, expected: list[float]) -> None:
    config = TrainConfig(learning_rate=1.0, schedule=schedule, steps=10, warmup=0.2)
    rates = [learning_rate(config, step) for step in (0, 1, 2, 3, 9)]
    assert rates == pytest.approx(expected)


def test_clipping_is_by_the_slots_own_norm(run: Any, toy_task: SimpleNamespace) -> None:
    """The norm that is reported is that before clipping; the step is the same for any neighbour."""
    found = []
    for neighbour in (False, True):
        pack, events = run(places=2).pack, []
        for name, limit in [("other", 0)][: int(neighbour)] + [("clipped", 1e-3)]:
            pack.attach(StartRun(experiment(toy_task, name=name, train__clip=limit), "unused"))
        slot = pack.slots[-1]
        training.step(pack, events.append)
        # After one update, the first moment is a tenth of the gradient.
        assert float(slot.starts[0].moments["exp_avg"].norm()) == pytest.approx(1e-4, rel=1e-5)
        assert events[-1].values["gradient_norm"] > 1e-2
        found.append(slot.vectors.clone())
        if neighbour:
            assert float(pack.slots[0].starts[0].moments["exp_avg"].norm()) == pytest.approx(
                events[0].values["gradient_norm"] / 10, rel=1e-5
            )
    assert torch.allclose(*found, atol=1e-7)


def test_several_starts_end_as_the_best_of_them(run: Any, toy_task: SimpleNamespace) -> None:
    """The start that is kept is the one that leads when a round ends, and it trains as it would have trained alone."""
    task = experiment(toy_task, train__starts=4, train__steps=40, train__evaluate_every=20, prompt__init="random")
    done = run("several")(task)
    judged = [event for event in done.of("evaluation") if "start_0_loss" in event.values or event.step <= 8]
    assert [event.step for event in judged] == [4, 8]
    losses = {key: value for key, value in judged[0].values.items() if key.startswith("start_")}
    assert len(losses) == 4 and len({*losses.values()}) == 4
    left = [key for key in judged[1].values if key.startswith("start_")]
    assert sorted(left) == sorted(sorted(losses, key=losses.__getitem__)[:2])
    winner = int(min(left, key=judged[1].values.__getitem__).split("_")[1])
    assert judged[1].values["loss"] == min(judged[1].values[key] for key in left)

    alone = run("alone")
    slot = alone.pack.attach(StartRun(task, str(alone.folder / "start")))
    slot.starts = [slot.starts[winner]]
    train(alone.pack, lambda free: None, alone.events.append)
    assert torch.allclose(alone.result("start").vectors, done.result("toy").vectors, atol=1e-5)


def test_a_start_that_diverges_leaves_alone(run: Any, toy_task: SimpleNamespace) -> None:
    pack, events = run().pack, []
    slot = pack.attach(StartRun(experiment(toy_task, train__starts=3), "unused"))
    slot.starts[1].vectors.data.fill_(math.nan)
    training.step(pack, events.append)
    assert [start.number for start in slot.starts] == [0, 2] and not [event for event in events if event.kind == "failed"]
    slot.starts[0].vectors.data.fill_(math.nan)
    slot.starts[1].vectors.data.fill_(math.nan)
    training.step(pack, events.append)
    assert events[-1].kind == "failed" and not pack.slots


@pytest.mark.parametrize("init", ["text", "vocabulary"])
def test_every_start_is_another_draw(run: Any, toy_task: SimpleNamespace, init: str) -> None:
    text = {"prompt__init_text": "one two three"} if init == "text" else {}
    pack = run().pack
    slot = pack.attach(StartRun(experiment(toy_task, train__starts=4, prompt__init=init, **text), "unused"))
    for one, other in itertools.combinations(slot.starts, 2):
        assert not torch.equal(one.vectors, other.vectors)
    single = pack.attach(StartRun(experiment(toy_task, prompt__init=init, **text), "unused"))
    assert torch.equal(single.vectors, slot.starts[0].vectors)
    pack.slots.clear()


def fewer_tools(toy_task: SimpleNamespace) -> None:
    """Three quarters of the training rows of one label leave."""
    rows = toy_task.train.read_text().splitlines(keepends=True)
    tools = [row for row in rows if '"tool"' in row]
    toy_task.train.write_text("".join(row for row in rows if row not in tools[: 3 * len(tools) // 4]))


def test_balanced_weights_are_scikit_learns(toy_task: SimpleNamespace, base: Base) -> None:
    from sklearn.utils.class_weight import compute_class_weight

    fewer_tools(toy_task)
    task = load_task(experiment(toy_task), base)
    labels = np.asarray(task.train.rows["label"])
    expected = compute_class_weight("balanced", classes=np.array([0, 1]), y=labels)
    assert expected[0] < 0.8 < 1.5 < expected[1]
    assert list(training_slot.balanced_weights(task).values()) == pytest.approx(list(expected))


def test_class_weights_weigh_each_rows_choice(run: Any, toy_task: SimpleNamespace) -> None:
    events: list[Event] = []
    fewer_tools(toy_task)
    for changes in ({}, {"train__class_weights": "balanced"}):
        pack = run().pack
        slot = pack.attach(StartRun(experiment(toy_task, train__batch_size=64, train__text_weight=0, **changes), "unused"))
        rows = slot.order.batch(0)
        labels = [slot.task.train.rows["label"][int(row)] for row in rows]
        plan = pack_targets([4], [[slot.task.train.row(int(row)) for row in rows]], [slot.objective])
        nll = pack.model([slot.vectors], plan).detach()
        weights = torch.tensor(
            [(slot.class_weights or {}).get(tuple(slot.task.encoder.label_ids[label]), 1.0) for label in labels]
        )
        training.step(pack, events.append)
        assert events[-1].values["loss"] == pytest.approx(float((nll * weights).mean()), rel=1e-5)
        pack.slots.clear()
    assert events[0].values["loss"] != pytest.approx(events[1].values["loss"], rel=1e-6)


def test_accuracies_within_a_standard_error_are_compared_by_loss(run: Any, toy_task: SimpleNamespace) -> None:
    pack = run().pack
    slot: Slot = pack.attach(StartRun(experiment(toy_task), "unused"))
    error = math.sqrt(0.8 * 0.2 / len(slot.task.validation))
    assert slot.observe({"accuracy": 0.5, "loss": 0.5})
    assert slot.observe({"accuracy": 0.8, "loss": 1.0}), "much more accurate"
    assert not slot.observe({"accuracy": 0.8, "loss": 1.0})
    assert not slot.observe({"accuracy": 0.8 + error / 10, "loss": 1.1}), "hardly more accurate"
    assert slot.observe({"accuracy": 0.8 - error / 2, "loss": 0.9}), "hardly less accurate"
    slot.restore(*slot.state())
    assert not slot.observe({"accuracy": 0.8 - error * 1.2, "loss": 0.1}), "compared with the highest, not with the last best"
    assert slot.observe({"accuracy": 0.8 + error, "loss": 2.0}), "what was the best is now too far below"
    pack.slots.clear()


def test_a_search_keeps_the_evaluation_that_the_slot_kept(toy_task: SimpleNamespace) -> None:
    results = [
        {"step": step, "values": {"accuracy": accuracy, "loss": loss}, "best": best}
        for step, accuracy, loss, best in ((10, 0.8, 1.0, True), (20, 0.79, 0.5, True), (30, 0.81, 2.0, False))
    ]
    assert best_result(experiment(toy_task), results, 4)["step"] == 20
    assert best_result(experiment(toy_task), results[:1], 4)["step"] == 10
    unmarked = [{key: each[key] for key in ("step", "values")} for each in results]  # as older stores have them
    assert best_result(experiment(toy_task), unmarked, 4)["step"] == 30


def test_law_6_evaluation_scores_the_tokens_that_training_saw(
    toy_task: SimpleNamespace, model: PromptedModel, base: Base
) -> None:
    task = load_task(experiment(toy_task), base)
    vectors = torch.randn(4, base.width, generator=torch.Generator().manual_seed(0))
    scores = label_scores(model, [vectors], task.test, task.encoder, Workers())[0]
    with torch.no_grad():
        for row in range(len(task.test)):
            plan = pack_targets([4], [[task.test.row(row)]], [Objective(task.encoder.label_trie, text=False)])
            trained = -model([vectors], plan).double().sum()
            label = task.test.rows["label"][row]
            assert float(scores[row, label]) == pytest.approx(float(trained), rel=1e-5)


def test_texts_of_several_soft_prompts_are_generated_together(
    toy_task: SimpleNamespace, model: PromptedModel, base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As each of them alone, in one call of `generate`; one that has diverged does not matter to the others."""
    del toy_task.experiment["data"]["labels"]
    task = load_task(experiment(toy_task), base)
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randn(length, base.width, generator=draw) for length in (4, 1, 7)]
    alone = [generate_rows(model, [each], task.test, task.encoder, Workers(), 6)[0] for each in prompts]
    assert len({str(texts) for texts in alone}) == 3
    calls: list[int] = []
    generate = type(model.base).generate

    def counting(base: Any, **options: Any) -> Any:
        calls.append(len(options["input_ids"]))
        return generate(base, **options)

    monkeypatch.setattr(type(model.base), "generate", counting)
    assert generate_rows(model, prompts, task.test, task.encoder, Workers(), 6) == alone
    assert calls == [3 * len(task.test)]
    diverged = [prompts[0], torch.full_like(prompts[1], torch.nan), prompts[2]]
    assert generate_rows(model, diverged, task.test, task.encoder, Workers(), 6)[::2] == alone[::2]
    monkeypatch.setattr(evaluation, "TOKENS", 2 * (int(task.test.lengths.max()) + 6))
    del calls[:]
    assert generate_rows(model, prompts, task.test, task.encoder, Workers(), 6) == alone
    assert max(calls) <= 3 and len(calls) > 20
