"""What is tried, in which order, and what a resumed search knows: ledger, space, sampler and scheduler, without a cluster."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import REPOSITORY
from ray.tune.search import Searcher

from ptuning.config import Experiment, ExperimentError, parse_experiment
from ptuning.searching import report, space
from ptuning.searching.searcher import OptunaSearcher, make_scheduler
from ptuning.searching.trial_store import TrialRecord, TrialStore

pytestmark = pytest.mark.fast


def experiment(toy_task: SimpleNamespace, **search: Any) -> Experiment:
    return parse_experiment(toy_task.experiment | {"search": {"trials": 5, "length": [2, 4]} | search})


def chooser(task: Experiment, folder: Path) -> tuple[OptunaSearcher, TrialStore, list[str]]:
    ledger = TrialStore(str(folder))
    announced: list[str] = []
    found = OptunaSearcher(
        task, task.model_dump(mode="json"), str(folder), ledger, lambda trial, entry: announced.append(entry.run)
    )
    return found, ledger, announced


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ({"trials": 0}, "search.trials: input should be greater than 0 (got 0); change the value"),
        ({"length": []}, "search.length: is empty; list at least one value"),
        (
            {"learning_rate": [0.1, 0.01]},
            "search.learning_rate: [0.1, 0.01] is not a valid range; write [low, high] with 0 < low <= high",
        ),
        (
            {"scheduler": "hyperband"},
            "search.scheduler: input should be 'asha', 'fifo' or 'pbt' (got 'hyperband'); change the value",
        ),
        (
            {"space": {"train.warmpu": [0, 0.5]}},
            "search.space: 'train.warmpu' is not a searchable setting; did you mean train.warmup?",
        ),
        (
            {"space": {"train.warmup": [0.5, 0.1]}},
            'search.space: "train.warmup" = [0.5, 0.1] is not a valid range; write [low, high] with low ',
        ),
        (
            {"space": {"train.warmup": [0.1, 2.0]}},
            'search.space: "train.warmup": input should be less than 1 (got 2); change the range',
        ),
        (
            {"init": ["text"]},
            'search.init: "text" needs prompt.init_text; set it with prompt.init = "text", or remove the value',
        ),
        ({"scheduler": "pbt", "trials": 1}, "search.trials: pbt needs a population of at least 2; raise it or choose another "),
    ],
)
def test_bad_input_is_one_sentence(toy_task: SimpleNamespace, search: dict[str, Any], message: str) -> None:
    with pytest.raises(ExperimentError) as refused:
        space.check(experiment(toy_task, **search))
    assert str(refused.value).removeprefix("experiment: ").startswith(message)


def test_labels_need_labels_in_the_search_too(toy_task: SimpleNamespace) -> None:
    toy_task.experiment["data"].pop("labels")
    with pytest.raises(ExperimentError, match='prompt.init: "labels" needs data.labels'):
        space.check(experiment(toy_task, init=["labels"]))


def test_a_trial_never_sees_the_test_rows(toy_task: SimpleNamespace) -> None:
    task = experiment(toy_task)
    tables = space.trial_tables(
        task.model_dump(mode="json"), "t0", {"prompt.length": 3, "prompt.init": "random", "train.learning_rate": 0.5}
    )
    trial = parse_experiment(tables)
    assert trial.data.test is None and trial.prompt.length == 3 and trial.train.learning_rate == 0.5 and trial.name == "t0"


def test_every_trial_is_on_disk_before_tune_hears_of_it(toy_task: SimpleNamespace, tmp_path: Path) -> None:
    task = experiment(toy_task, space={"train.warmup": [0.0, 0.5], "train.batch_size": [4, 8]})
    found, _, announced = chooser(task, tmp_path / "s")
    for number in range(5):
        values = found.suggest(f"tune{number}")
        last = list(TrialStore(str(tmp_path / "s")).entries.values())[-1]
        assert last.values == values and last.status == "running" and announced[-1] == last.run == f"t{number:03d}"
        assert 0 <= values["train.warmup"] <= 0.5 and values["train.batch_size"] in range(4, 9)
    assert found.suggest("tune5") is None, "one may be added while others train"
    for number in range(5):
        found.on_trial_complete(f"tune{number}", {"step": 20, "score": 0.5})
    assert found.suggest("tune5") == Searcher.FINISHED
    assert len({entry.key for entry in TrialStore(str(tmp_path / "s")).trials()}) == 5


def test_kinds_are_chosen_if_they_are_listed(toy_task: SimpleNamespace, tmp_path: Path) -> None:
    both = experiment(toy_task, kind=["embedding", "kv"])
    space.check(both)
    found, _, _ = chooser(both, tmp_path / "both")
    chosen = [found.suggest(f"tune{number}") for number in range(5)]
    assert {values["prompt.kind"] for values in chosen} == {"embedding", "kv"} == {*space.kinds(both)}
    trial = parse_experiment(space.trial_tables(both.model_dump(mode="json"), "t0", {"prompt.kind": "kv"}))
    assert trial.prompt.kind == "kv"
    alone = chooser(experiment(toy_task), tmp_path / "one")[0].suggest("tune0")
    assert "prompt.kind" not in alone and space.kinds(experiment(toy_task)) == ("embedding",)


def test_the_same_seed_tries_the_same(toy_task: SimpleNamespace, tmp_path: Path) -> None:
    tried = [
        [chooser(experiment(toy_task, seed=seed), tmp_path / name)[0].suggest("x")]
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    assert tried[0] == tried[1] != tried[2]


def test_a_resumed_search_hands_out_what_was_under_way_and_repeats_nothing(toy_task: SimpleNamespace, tmp_path: Path) -> None:
    task = experiment(toy_task)
    first, ledger, _ = chooser(task, tmp_path)
    values = [first.suggest(f"tune{number}") for number in range(3)]
    result = {"step": 20, "values": {"accuracy": 0.5, "loss": 1.0}, "time_ms": 1}

    def end(entry: TrialRecord) -> None:
        entry.status, entry.results = "finished", [result]

    ledger.change("t001", end)
    ledger.flush()
    second, _, announced = chooser(task, tmp_path)
    assert [second.suggest("a"), second.suggest("b")] == [values[0], values[2]] and announced == ["t000", "t002"]
    rest = [second.suggest("c"), second.suggest("d"), second.suggest("e")]
    assert rest[2] is None and all(each not in values for each in rest[:2])
    for trial, score in (("a", 0.1), ("b", 0.2), ("c", 0.3)):
        second.on_trial_complete(trial, {"step": 20, "score": score})
    second.on_trial_complete("d", error=True)
    assert second.suggest("e") == Searcher.FINISHED


def test_an_exhausted_space_ends_the_search(toy_task: SimpleNamespace, tmp_path: Path) -> None:
    for algorithm in ("random", "grid"):
        task = experiment(toy_task, length=[2, 4], init=["random"], learning_rate=[0.1, 0.1], algorithm=algorithm)
        found, ledger, _ = chooser(task, tmp_path / algorithm)
        answers = [found.suggest(str(number)) for number in range(3)]
        assert answers[2] is None and len(ledger.trials()) == 2
        for number in range(2):
            found.on_trial_complete(str(number), error=True)
        assert found.suggest("2") == Searcher.FINISHED


def test_a_grid_covers_the_range(toy_task: SimpleNamespace) -> None:
    axes = space.grid(experiment(toy_task, trials=12, learning_rate=[0.01, 1.0]))
    assert axes["train.learning_rate"] == pytest.approx([0.01, 0.1, 1.0])
    assert axes["prompt.length"] == [2, 4] and axes["prompt.init"] == ["random", "vocabulary"]


def test_a_resumed_asha_stops_whom_it_would_have_stopped(toy_task: SimpleNamespace, tmp_path: Path) -> None:
    task = experiment(toy_task)
    ledger = TrialStore(str(tmp_path))
    for number, accuracy in enumerate((0.6, 0.7, 0.8)):
        results = [{"step": 10, "values": {"accuracy": accuracy, "loss": 1.0}, "time_ms": number}]
        ledger.add(TrialRecord(f"t{number}", str(number), {"prompt.length": 2}, "f", status="stopped", results=results))
    scheduler = make_scheduler(task, ledger)
    for score, decision in ((0.5, "STOP"), (0.9, "CONTINUE")):
        trial: Any = SimpleNamespace(trial_id=str(score))
        scheduler.on_trial_add(None, trial)  # type: ignore[arg-type]
        assert scheduler.on_trial_result(None, trial, {"step": 10, "score": score}) == decision  # type: ignore[arg-type]


def test_prefer_short_is_worth_so_much_per_halving(toy_task: SimpleNamespace) -> None:
    task = experiment(toy_task, prefer_short=0.01)
    metrics = {"accuracy": 0.9, "loss": 1.0}
    assert space.score(task, metrics, 8) == pytest.approx(space.score(task, metrics, 16) + 0.01)


def test_leaderboard_budget_and_correlation(toy_task: SimpleNamespace) -> None:
    task = experiment(toy_task)

    def entry(run: str, *curve: float, status: Any = "finished") -> TrialRecord:
        results = [
            {"step": 10 * (n + 1), "values": {"accuracy": value, "loss": 1 - value}, "time_ms": 1000 * n}
            for n, value in enumerate(curve)
        ]
        return TrialRecord(run, run, {"prompt.length": 4}, "f", status=status, step=10 * len(curve), results=results)

    entries = [entry("a", 0.5, 0.7), entry("b", 0.6, 0.9), entry("c", 0.7, 0.8), entry("d", status="failed")]
    columns, rows = report.table(task, entries)
    assert [row[columns.index("trial")] for row in rows] == ["b", "c", "a", "d"]
    assert [row["best"] for row in report.budget_curve(task, entries)] == [0.5, 0.6, 0.7, 0.7, 0.9, 0.9]
    assert report.budget_curve(task, entries)[-1]["trial_steps"] == 60
    assert report.early_late(task, entries) == {10: (pytest.approx(0.5), 3)}


@pytest.mark.parametrize("module", ["searching.trial", "searching.dispatcher"])
def test_trials_never_see_torch(module: str) -> None:
    heavy = "{'torch', 'transformers', 'mlflow', 'deepspeed'}"
    code = f"import sys, ptuning.{module}; print(*sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert done.stdout.split() == []


def test_words_are_choices(toy_task: SimpleNamespace, tmp_path: Path) -> None:
    words = {"train.optimizer": ["adamw", "adafactor"], "train": {"schedule": ["linear", "cosine"]}}
    task = experiment(toy_task, space=words, trials=8, algorithm="grid", length=[2], init=["random"])
    assert space.choices(task)["train.optimizer"] == ("adamw", "adafactor") and space.ranges(task) == {
        "train.learning_rate": (0.01, 1.0)
    }
    searcher, ledger, _ = chooser(task, tmp_path)
    for number in range(8):
        searcher.suggest(str(number))
    drawn = {(entry.values["train.optimizer"], entry.values["train.schedule"]) for entry in ledger.trials()}
    assert len(drawn) == 4
    plain = task.model_dump(mode="json")
    assert parse_experiment(space.trial_tables(plain, "t", ledger.trials()[0].values)).train.optimizer in ("adamw", "adafactor")
    space.check(task)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["adamw"], "\"train.optimizer\" = ['adamw'] is not a choice; list two or more different words"),
        (["adamw", "sgd"], "\"train.optimizer\": input should be 'adamw' or 'adafactor' (got 'sgd'); change it"),
    ],
)
def test_sentences_about_words(toy_task: SimpleNamespace, words: list[str], message: str) -> None:
    with pytest.raises(ExperimentError, match=re.escape(f"search.space: {message}")):
        experiment(toy_task, space={"train.optimizer": words})
