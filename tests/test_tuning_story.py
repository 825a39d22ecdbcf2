"""The page about tuning, as it stands there, against `ptuning serve` with the built-in base and an empty store; and every call
of the stock client's `fine_tuning` that has a meaning here."""

from __future__ import annotations

import json
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
from conftest import REPOSITORY, title, toml
from openai import OpenAI
from serving_world import Command
from test_docs import only
from test_tracking import free_port

from ptuning.tuning.remote_jobs import ANSWERED_S

pytestmark = [pytest.mark.slow, pytest.mark.cluster]

PAGE = "docs/guides/tuning-service.md"
TASK = REPOSITORY / "ptuning" / "builtin" / "tasks" / "sentiment" / "train.jsonl"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a newcomer stands, with rows as the page shows them."""
    folder = tmp_path_factory.mktemp("story")
    rows = [json.loads(line) for line in TASK.read_text(encoding="utf-8").splitlines()[:300]]
    lines = []
    for row in rows:
        messages = [{"role": "user", "content": row["text"]}, {"role": "assistant", "content": row["label"]}]
        lines.append(json.dumps({"messages": messages}) + "\n")
    (folder / "reviews.jsonl").write_text("".join(lines), encoding="utf-8")
    assert lines[0].strip() == only("text", "messages", PAGE).strip()
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Command]:
    tables = tomllib.loads((REPOSITORY / "jobs" / "sentiment.toml").read_text(encoding="utf-8"))
    tables |= {"tuning": {"workers": 1}, "compute": {"storage": str(folder / "runs")}}
    (folder / "server.toml").write_text(toml(tables), encoding="utf-8")
    command = Command(folder / "server.toml", free_port(), folder)
    try:
        command.wait("serving at")
        yield command
    finally:
        command.stop()
        print(command.said)


@pytest.fixture
def client(server: Command) -> Iterator[OpenAI]:
    with OpenAI(base_url=server.url, api_key="unused", max_retries=5) as client:
        yield client


def test_the_page(server: Command, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(folder)
    script = only("python", "fine_tuning", PAGE).replace("http://127.0.0.1:8000/v1", server.url)
    assert server.url in script
    began = time.monotonic()
    exec(compile(script, PAGE, "exec"), {"__name__": "__main__"})
    said = capsys.readouterr().out.splitlines()
    print(f"{time.monotonic() - began:.0f} s from the file to the answer")
    assert said[0] == "The job has successfully completed" and said[-1] == "Negative"


def test_every_call_of_the_client(client: OpenAI, folder: Path) -> None:
    jobs = client.fine_tuning.jobs
    with (folder / "reviews.jsonl").open("rb") as rows:
        file = client.files.create(file=rows, purpose="fine-tune")
    given: dict[str, Any] = {"learning_rate_multiplier": 1.0, "n_epochs": 40, "batch_size": 4, "prompt_length": 8}
    method: Any = {"type": "supervised", "supervised": {"hyperparameters": given, "labels": ["Negative", "Positive"]}}
    job = jobs.create(model="builtin", training_file=file.id, metadata={"team": "blue"}, seed=3, method=method)
    other = jobs.create(model="builtin", training_file=file.id, hyperparameters={"n_epochs": 1})
    assert job.status == "validating_files" and job.object == "fine_tuning.job" and job.seed == 3
    assert [each.id for each in jobs.list(limit=1)][:2] == [other.id, job.id], "the client asks for the next pages"
    assert [each.id for each in jobs.list(metadata={"team": "blue"})] == [job.id]
    assert job.id not in [each.id for each in jobs.list(extra_query={"metadata": "null"})]

    until(lambda: next(iter(jobs.checkpoints.list(job.id)), None) is not None)
    checkpoint = next(iter(jobs.checkpoints.list(job.id)))
    asked = client.chat.completions.create(
        model=checkpoint.fine_tuned_model_checkpoint, messages=[{"role": "user", "content": "This movie was terrible."}]
    )
    assert asked.choices[0].message.content in ("Negative", "Positive")
    assert checkpoint.metrics.full_valid_loss and checkpoint.metrics.train_loss

    assert jobs.pause(job.id).status == "paused"
    with pytest.raises(openai.BadRequestError, match="already paused"):
        jobs.pause(job.id)
    assert jobs.resume(job.id).status == "queued"
    until(lambda: jobs.retrieve(job.id).status == "running")
    until(lambda: jobs.retrieve(job.id).estimated_finish is not None)
    assert jobs.cancel(job.id).status == "cancelled"
    with pytest.raises(openai.BadRequestError, match="already cancelled"):
        jobs.cancel(job.id)
    until(lambda: jobs.retrieve(other.id).status == "succeeded")
    metrics = [event for event in jobs.list_events(other.id, limit=100) if event.type == "metrics"]
    assert metrics and all({"step", "train_loss"} & set(event.data) for event in metrics)  # type: ignore[arg-type]
    [result] = jobs.retrieve(other.id).result_files
    assert client.files.content(result).text.startswith("step,train_loss,")


@pytest.mark.parametrize(
    ("changes", "param", "words"),
    [
        ({"model": "nothing:3"}, "model", "no such base or soft prompt"),
        ({"training_file": "file-unknown"}, "training_file", "there is no such file"),
        ({"suffix": "a b"}, "suffix", "not a valid name"),
        ({"suffix": "builtin"}, "suffix", "the name of the base"),
        ({"method": {"type": "dpo"}}, "method", "must be 'supervised'"),
        (
            {"method": {"type": "supervised", "supervised": {"hyperparameters": {"lenght": 3}}}},
            "method",
            "hyperparameters.lenght",
        ),
        ({"method": {"type": "supervised", "supervised": {"labels": ["one"]}}}, "method", "labels"),
        ({"metadata": {"k" * 65: "v"}}, "metadata", "metadata"),
        ({"integrations": [{"type": "wandb"}]}, "integrations", "integrations"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_wrong_job_is_refused_in_a_sentence(
    client: OpenAI, folder: Path, changes: dict[str, Any], param: str, words: str
) -> None:
    with (folder / "reviews.jsonl").open("rb") as rows:
        file = client.files.create(file=rows, purpose="fine-tune")
    body = {"model": "builtin", "training_file": file.id} | changes
    with pytest.raises(openai.BadRequestError) as refused:
        client.post("/fine_tuning/jobs", body=body, cast_to=object)
    assert words in refused.value.message and str(refused.value.param).startswith(param)
    with pytest.raises(openai.NotFoundError):
        client.fine_tuning.jobs.retrieve("ftjob-../../secret")


@pytest.mark.nightly
def test_a_service_that_is_frozen_is_told_in_a_sentence(server: Command, client: OpenAI) -> None:
    [owner] = [
        each for each in psutil.Process(server.process.pid).children(recursive=True) if "ray::TuningActor" in title(each)
    ]
    owner.suspend()
    try:
        began, once = time.monotonic(), client.with_options(max_retries=0)
        with pytest.raises(openai.InternalServerError, match="the tuning service does not respond; ask again") as told:
            once.fine_tuning.jobs.list()
        assert told.value.status_code == 503 and told.value.response.headers["retry-after"] == "2"
        assert time.monotonic() - began < 2 * ANSWERED_S
        assert once.files.list() and once.models.list()
    finally:
        owner.resume()
    assert client.fine_tuning.jobs.list()


def until(condition: Any, seconds: float = 180.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.3)
