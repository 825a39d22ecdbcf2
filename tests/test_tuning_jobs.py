"""Tuning jobs: their states, quotas and names, packing, and what happens when processes die. Real training, without Ray."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import toy_rows
from tuning_world import Killed, World

from ptuning.model.base import Base
from ptuning.model.prompted_model import PromptedModel
from ptuning.registry.names import find_tuned
from ptuning.tuning.request import JobRefused
from ptuning.tuning.service import TooManyJobs, UnknownJob

pytestmark = [
    # MLflow 3.17 uses SQLAlchemy's noload, deprecated in 2.1 (store/tracking/sqlalchemy_store.py).
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


@pytest.fixture
def world(tmp_path: Path, base: Base, model: PromptedModel) -> Callable[..., World]:
    return lambda name="runs", **tuning: World(tmp_path / name, base, model, **tuning)


def test_a_job_from_its_file_to_its_soft_prompt(world: Any) -> None:
    there = world()
    file = there.upload(toy_rows(64, 0))
    job = there.create(file, suffix="kinds", metadata={"team": "a"})
    assert there.job(job)["status"] in ("validating_files", "queued")
    there.work()
    done = there.job(job)
    assert (done["status"], done["error"], done["soft_prompt"]) == ("succeeded", None, "kinds:1")
    assert done["fine_tuned_model"] == f"ft:{done['model']}:ptuning:kinds:{job[6:14]}"
    assert done["hyperparameters"] == {"batch_size": 8, "learning_rate_multiplier": 1.0, "n_epochs": 3}
    assert done["trained_tokens"] > 20 * 8 and done["finished_at"] >= done["created_at"]
    assert there.service.list("local", None, 20, {"team": "a"}, False)["data"] == [done]
    assert not there.service.list("local", None, 20, {"team": "b"}, False)["data"]

    version = find_tuned(there.registry, done["fine_tuned_model"])
    assert str(version) == "kinds:1" and version.tag("content_hash") == there.hash(job)
    checkpoints = there.service.checkpoints(None, job, None, 10)["data"]
    assert checkpoints and len(checkpoints) <= 3
    for checkpoint in checkpoints:
        name = checkpoint["fine_tuned_model_checkpoint"]
        assert name == f"{done['fine_tuned_model']}:ckpt-step-{checkpoint['step_number']}"
        assert find_tuned(there.registry, name).name == f"kinds-{job[6:14]}-checkpoints"
        assert checkpoint["metrics"]["full_valid_loss"] > 0

    said = there.messages(job)
    order = ["Created", "Validating", "Files validated", "Fine-tuning job started", "New fine-tuned model", "The job has succ"]
    places = [next(place for place, message in enumerate(said) if message.startswith(begin)) for begin in order]
    assert places == sorted(places)
    [result] = done["result_files"]
    with there.jobs.files.open(result, "local") as stream:
        rows = list(csv.DictReader(io.StringIO(stream.read().decode())))
    assert [int(row["step"]) for row in rows] == list(range(1, 21)) and all(float(row["train_loss"]) > 0 for row in rows)
    assert [int(row["step"]) for row in rows if row["full_valid_loss"]] == [5, 10, 15, 20]


def test_law_4_a_job_beside_others_is_the_job_alone(world: Any) -> None:
    alone, packed = world("alone"), world("packed")
    settings = [{"seed": seed, "hyperparameters": {"prompt_length": 2 + seed}} for seed in range(3)]
    rows = [toy_rows(40 + 8 * seed, seed) for seed in range(3)]
    together = [packed.create(packed.upload(some), **given) for some, given in zip(rows, settings, strict=True)]
    packed.work()
    for some, given, job in zip(rows, settings, together, strict=True):
        own = alone.create(alone.upload(some), **given)
        alone.work()
        metrics, others = (each.jobs.records[which].trials[0].measured for each, which in ((alone, own), (packed, job)))
        assert metrics == pytest.approx(others, rel=1e-5)


def test_auto_is_a_small_search_and_the_best_is_kept(world: Any) -> None:
    there = world(trials=3)
    method = {"template": {"input": "Text: {text}\nKind:", "target": " {label}"}, "hyperparameters": {}}
    job = there.create(there.upload(toy_rows(64, 0)), supervised=method)
    there.work()
    record = there.jobs.records[job]
    assert record.status == "succeeded" and len(record.trials) == 3
    assert [trial.multiplier for trial in record.trials] == [0.4309, 2.0, 9.283]  # 0.02154, 0.1 and 0.4642, of 0.05
    best = max(record.trials, key=lambda trial: (trial.measured["validation_accuracy"], -trial.measured["validation_loss"]))
    assert find_tuned(there.registry, record.served_as).tag("content_hash") == best.content_hash
    assert record.hyperparameters["learning_rate_multiplier"] == best.multiplier


def test_a_loss_that_is_not_finite_ends_its_own_job_only(world: Any) -> None:
    there = world()
    file = there.upload(toy_rows(64, 0))
    good, bad = there.create(file), there.create(file, suffix="bad")

    def poison() -> None:
        for slot in there.pack.slots:
            if slot.name.startswith(bad) and slot.step == 3:
                slot.vectors.data[0, 0] = math.nan

    there.work(poison)
    assert there.job(good)["status"] == "succeeded"
    found = there.job(bad)
    assert (found["status"], found["fine_tuned_model"]) == ("failed", None)
    assert found["error"]["code"] == "training_failed" and "lower" in found["error"]["message"]
    assert not there.registry.versions("bad")


def test_cancel_pause_and_resume(world: Any) -> None:
    whole = world("whole")
    expected = whole.create(whole.upload(toy_rows(64, 0)))
    whole.work()

    there = world("stopped")
    file = there.upload(toy_rows(64, 0))
    paused, cancelled = there.create(file), there.create(file, suffix="never")
    seen: list[int] = []

    def at_step_7() -> None:
        record = there.jobs.records[paused]
        if record.trials and record.trials[0].step == 7 and not seen:
            seen.append(7)
            assert there.service.pause(None, paused)["status"] == "paused"
            assert there.service.cancel(None, cancelled)["status"] == "cancelled"

    there.work(at_step_7)
    assert there.job(paused)["status"] == "paused" and there.job(cancelled)["finished_at"]
    with pytest.raises(JobRefused, match="already paused"):
        there.service.pause(None, paused)
    with pytest.raises(JobRefused, match="already cancelled"):
        there.service.cancel(None, cancelled)
    with pytest.raises(JobRefused, match="only a paused one"):
        there.service.resume(None, cancelled)
    assert there.service.resume(None, paused)["status"] == "queued"
    there.work()
    assert there.job(paused)["status"] == "succeeded" and there.hash(paused) == whole.hash(expected)
    again = [event.step for event in there.heard if event.run.startswith(paused) and event.kind == "step"]
    assert again == list(range(1, 21)), "it was paused at its 7th step, and repeats none"


@pytest.mark.parametrize("owner_too", [False, True], ids=["worker", "owner and worker"])
def test_law_5_a_kill_at_any_step_changes_nothing(world: Any, owner_too: bool) -> None:
    whole = world("whole")
    rows = [toy_rows(64, seed) for seed in range(2)]
    expected = [whole.create(whole.upload(some), seed=seed) for seed, some in enumerate(rows)]
    whole.work()

    there = world("killed")
    jobs = [there.create(there.upload(some), seed=seed) for seed, some in enumerate(rows)]
    kills = [2, 8, 13, 19]

    def hook() -> None:
        record = there.jobs.records[jobs[0]]
        if kills and record.trials and record.trials[0].step >= kills[0]:
            kills.pop(0)
            raise Killed

    while not there.ended():
        try:
            there.work(hook)
        except Killed:
            if owner_too:
                there.begin()
    assert not kills
    assert [there.hash(job) for job in jobs] == [whole.hash(job) for job in expected]
    for job in jobs:
        losses = there.jobs.store.progress(job).curves[0]
        assert [int(step) for step, _ in losses] == list(range(1, 21)), "no step is lost or told twice"
        assert len(there.registry.versions(there.jobs.records[job].result_name)) == 1


def test_a_job_that_kills_its_workers_fails_and_the_others_end(world: Any) -> None:
    there = world()
    jobs = [there.create(there.upload(toy_rows(64, seed)), seed=seed) for seed in range(3)]
    bad = jobs[1]

    def hook() -> None:
        if any(slot.name.startswith(bad) and slot.step == 4 for slot in there.pack.slots):
            broken = {"kind": "broken", "run": "tuning", "step": 0, "details": {"workers": ["a worker died"]}}
            there.dispatcher.put([broken])
            raise Killed

    kills = 0
    while not there.ended():
        try:
            there.work(hook)
        except Killed:
            kills += 1
            assert kills < 12
    assert [there.job(job)["status"] for job in jobs] == ["succeeded", "failed", "succeeded"]
    assert "its workers failed at step 5, every time" in there.job(bad)["error"]["message"]
    assert there.dispatcher._most == math.inf, "they train together again"
    whole = world("whole")
    for seed in (0, 2):
        expected = whole.create(whole.upload(toy_rows(64, seed)), seed=seed)
        whole.work()
        metrics, others = (each.jobs.records[job].trials[0].measured for each, job in ((whole, expected), (there, jobs[seed])))
        assert metrics == pytest.approx(others, rel=1e-5)


def test_an_owner_sees_its_own_jobs_and_the_quota_is_its_own(world: Any) -> None:
    there = world(jobs_per_key=2)
    file = there.upload(toy_rows(40, 0), "a" * 16)
    first = there.create(file, "a" * 16, suffix="mine")
    there.create(file, "a" * 16)
    with pytest.raises(TooManyJobs, match="2 jobs that have not ended"):
        there.create(file, "a" * 16)
    other = there.upload(toy_rows(40, 0), "b" * 16)
    with pytest.raises(JobRefused, match="training_file: there is no such file"):
        there.create(file, "b" * 16)
    with pytest.raises(JobRefused, match="the name mine belongs to others"):
        there.create(other, "b" * 16, suffix="mine")
    there.create(other, "b" * 16, suffix="yours")
    with pytest.raises(UnknownJob):
        there.service.get("b" * 16, first)
    assert len(there.service.list("b" * 16, None, 20, None, False)["data"]) == 1
    assert len(there.service.list(None, None, 20, None, False)["data"]) == 3
    there.work()
    with pytest.raises(JobRefused, match="the name mine belongs to others"):
        there.create(other, "b" * 16, suffix="mine")
    assert there.service.list(None, None, 2, None, False)["has_more"]


def test_a_job_begins_with_the_result_of_another(world: Any) -> None:
    there = world()
    file = there.upload(toy_rows(64, 0))
    first = there.create(file, suffix="kinds", hyperparameters={"prompt_length": 3})
    there.work()
    second = there.create(file, suffix="kinds", model=there.job(first)["fine_tuned_model"])
    there.work()
    version = find_tuned(there.registry, there.job(second)["fine_tuned_model"])
    assert str(version) == "kinds:2" and version.tag("parent") == there.hash(first) and version.tag("length") == "3"
    with pytest.raises(JobRefused, match="no such base or soft prompt"):
        there.create(file, model="nothing:7")


@pytest.mark.parametrize(
    ("rows", "given", "words"),
    [
        ([{"text": "a", "label": "fruit"}] * 9 + [{"text": "b"}], {}, "label"),
        (toy_rows(20, 0), {"supervised": {"template": {"input": "{missing}", "target": " {label}"}}}, "missing"),
        (toy_rows(20, 0), {"hyperparameters": {"prompt_length": 127}}, "method.supervised.hyperparameters.prompt_length"),
    ],
    ids=["a row without a label", "a field that no row has", "too long"],
)
def test_wrong_rows_fail_the_job_with_a_sentence(world: Any, rows: Any, given: dict[str, Any], words: str) -> None:
    there = world()
    job = there.create(there.upload(rows), **given)
    there.work()
    found = there.job(job)
    assert found["status"] == "failed" and words in found["error"]["message"]
    assert str(there.server.compute.storage) not in str(found)
    assert found["error"]["param"] in ("training_file", "method.supervised.hyperparameters.prompt_length")
