"""/openapi.json against invention: no request about files, jobs, batches or administration is a 5xx, and every answer is one
that is described. The routes that answer questions are asked in `test_http_api`."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import toy_rows
from invention import invent
from jobs_world import client_of, served, trained
from serving_world import serving
from test_batches import content_of, request_line
from test_http_api import ADMIN, fill_storage
from tuning_world import World

from ptuning.model.base import Base
from ptuning.model.prompted_model import PromptedModel

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

PATHS = ("/v1/files", "/v1/fine_tuning/jobs", "/v1/batches", "/v1/admin/")
EXAMPLES = int(os.environ.get("PTUNING_EXAMPLES", "12")) // 2
"""Requests per operation that have its shape, and as many that have not; `make test-all` has 25."""
OPERATIONS = 24
QUICK = {"n_epochs": 1, "learning_rate_multiplier": 1.0}


@pytest.fixture(scope="module")
def world(
    tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path, base: Base, model: PromptedModel
) -> Iterator[SimpleNamespace]:
    folder = tmp_path_factory.mktemp("openapi") / "runs"
    fill_storage(folder, tiny_base_folder)
    jobs = World(folder, base, model, jobs_per_key=10_000)
    with served(folder, tiny_base_folder, jobs=jobs, batches=True) as world, trained(jobs):
        yield world


def reached(states: Callable[[], list[str]], wanted: list[str], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while (found := states()) != wanted:
        assert time.monotonic() < until, found
        time.sleep(0.1)


def begin(world: SimpleNamespace) -> Callable[[], Mapping[str, Sequence[str]]]:
    """Make files, jobs and batches in many states. Returns what gives the values that a request about them may contain."""
    client = client_of(world, ADMIN)
    jobs = client.fine_tuning.jobs
    rows = [{"prompt": f"Text: {row['text']}\nKind:", "completion": f" {row['label']}"} for row in toy_rows(64, 0)]
    wrong = [{"prompt": "Text:", "completion": " x" * 500}]  # too long

    def upload(purpose: Any, *lines: Mapping[str, Any]) -> str:
        return client.files.create(file=(f"{purpose}.jsonl", content_of(*map(dict, lines))), purpose=purpose).id

    base = client.models.list().data[0].id
    train, questions = upload("fine-tune", *rows), upload("batch", request_line())
    done = jobs.create(model=base, training_file=train, suffix="kinds", hyperparameters=QUICK, metadata={"team": "a"})
    jobs.create(model=base, training_file=upload("fine-tune", *wrong))
    paused, cancelled = (jobs.create(model=base, training_file=train) for _ in range(2))
    jobs.pause(paused.id)
    jobs.cancel(cancelled.id)
    for lines in (questions, upload("batch", {"custom_id": 5})):
        client.batches.create(input_file_id=lines, endpoint="/v1/chat/completions", completion_window="24h")
    reached(lambda: [job.status for job in jobs.list()], ["cancelled", "paused", "failed", "succeeded"])
    reached(lambda: [batch.status for batch in client.batches.list()], ["failed", "completed"])

    def there(kind: str) -> list[str]:
        names = os.listdir(world.storage / "tuning" / kind)
        return sorted(name for name in names if name not in (train, questions))

    def known() -> Mapping[str, Sequence[str]]:
        files = there("files") or [upload("fine-tune", *rows)]  # all were deleted
        made, batches = there("jobs"), there("batches")
        names = ["fruits", "fruits:1", "fruits:2", "kinds", "kinds:1", "writer:1", "stranger:1"]
        return {
            "file_id": files,
            "job_id": made,
            "batch_id": batches,
            "after": [*files, *made, *batches],
            "training_file": [train, questions],
            "validation_file": [train],
            "input_file_id": [questions, train],
            "model": [base, jobs.retrieve(done.id).fine_tuned_model or "", *names],
            "name": names,
            "suffix": ["kinds", "fruits"],
        }

    return known


def all_hold(world: SimpleNamespace) -> Counter[tuple[str, int]]:
    known = begin(world)
    told = invent(world.url, ADMIN, EXAMPLES, lambda path: path.startswith(PATHS), known)
    print(json.dumps({f"{operation} {status}": times for (operation, status), times in sorted(told.items())}, indent=1))
    with client_of(world, ADMIN) as client:
        failed = [job.error for job in client.fine_tuning.jobs.list(limit=1000) if job.error]
    assert not [error for error in failed if error.code == "server_error"], "what cannot be trained is refused before"
    return told


def test_every_answer_is_described(world: SimpleNamespace) -> None:
    told = all_hold(world)
    every, good = {operation for operation, _ in told}, {operation for operation, status in told if status == 200}
    assert len(every) == OPERATIONS
    there = {operation for operation in every if operation.startswith("GET") and "searches/" not in operation}
    assert there <= good, "what is there was not asked"


@pytest.fixture
def cluster(tmp_path: Path, tiny_base_folder: Path) -> Iterator[SimpleNamespace]:
    """`ptuning serve` with a tuning service."""
    tables = {"tuning": {"workers": 1, "slots": 4, "trials": 1, "jobs_per_key": 10_000}, "train": {"steps": 20}}
    with serving(tmp_path, tiny_base_folder, replicas=1, tables=tables) as world:
        world.storage = tmp_path / "runs"
        yield world


@pytest.mark.cluster
@pytest.mark.nightly
@pytest.mark.timeout(1200)
def test_every_answer_of_a_cluster_is_described(cluster: SimpleNamespace) -> None:
    assert len({operation for operation, _ in all_hold(cluster)}) == OPERATIONS
