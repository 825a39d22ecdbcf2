"""`ptuning tune` against a server in this process: the whole story from a file to an answer, and every refusal."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import Result
from conftest import toy_rows
from jobs_world import ANN, BOB, served
from test_http_api import KEY
from tuning_world import World
from typer.testing import CliRunner

from ptuning import storage
from ptuning.cli.app import app
from ptuning.model.base import Base
from ptuning.model.prompted_model import PromptedModel

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

SETTINGS = ["template.input=Text: {text}\nKind:", "template.target= {label}", "learning_rate_multiplier=1.0"]


@pytest.fixture(scope="module")
def world(
    tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path, base: Base, model: PromptedModel
) -> Iterator[SimpleNamespace]:
    folder = tmp_path_factory.mktemp("tune")
    rows = folder / "reviews.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in toy_rows(64, 0)), encoding="utf-8")
    jobs = World(folder / "runs", base, model)
    with served(folder / "runs", tiny_base_folder, jobs=jobs) as world:
        world.rows = str(rows)
        yield world


def run(world: SimpleNamespace, *arguments: str, key: str | None = ANN) -> Result:
    url = [] if "--url" in arguments else ["--url", world.url]
    return CliRunner().invoke(app, ["tune", *arguments, *url], env={"PTUNING_API_KEY": key})


def files(world: SimpleNamespace) -> list[str]:
    return storage.list_names(f"{world.service.storage}/files")


def test_from_a_file_to_an_answer(world: SimpleNamespace) -> None:
    def train() -> None:
        while not world.tuning.jobs.records:
            time.sleep(0.05)
        world.tuning.work()

    training = threading.Thread(target=train)
    training.start()
    done = run(world, world.rows, *SETTINGS, "--suffix", "kinds", "--validation", world.rows, "--seed", "3")
    training.join()
    assert done.exit_code == 0, done.output
    (job,) = world.tuning.jobs.records.values()
    name = done.stdout.strip()
    assert name == world.tuning.job(job.id)["fine_tuned_model"] and name.endswith(f":ptuning:kinds:{job.id[6:14]}")
    said = done.stderr.splitlines()
    assert said[0] == f"job {job.id}" and said[-1] == f'ask it with: ptuning ask {name} "..."' and len(said) > 4
    assert len(said) == len(set(said))  # no event twice
    assert world.tuning.job(job.id)["seed"] == 3 and len(files(world)) >= 2
    world.service.reload()
    told = CliRunner().invoke(app, ["ask", name, "the old saw", "--url", world.url], env={"PTUNING_API_KEY": ANN})
    assert told.exit_code == 0 and told.stdout.strip() == "tool", told.output

    again = run(world, "events", job.id, "--follow", "--json")
    assert again.exit_code == 0 and json.loads(again.stdout.splitlines()[-1])["status"] == "succeeded"
    listed = json.loads(run(world, "list", "--json").stdout)["jobs"]
    assert [each["id"] for each in listed] == [job.id]
    table = run(world, "list").stdout.splitlines()
    assert table[0].split() == ["JOB", "STATUS", "MODEL", "RESULT", "CREATED"] and job.id in table[1] and name in table[1]
    events = json.loads(run(world, "events", job.id, "--json").stdout)["events"]
    assert [each["created_at"] for each in events] == sorted(each["created_at"] for each in events)
    assert len(run(world, "events", job.id).stdout.splitlines()) == len(events)
    assert len(run(world, "events", job.id, "--limit", "2").stdout.splitlines()) == 2
    over = run(world, "cancel", job.id)
    assert over.exit_code == 2 and over.stderr.startswith("ptuning: ") and over.stderr.count("\n") == 1


def test_pause_resume_and_cancel(world: SimpleNamespace) -> None:
    made = run(world, "start", world.rows, *SETTINGS, "--model", world.tuning.service._base, "--no-wait", "--json")
    assert made.exit_code == 0, made.output
    job = json.loads(made.stdout)["id"]
    assert run(world, "pause", job).stdout.strip() == f"{job}: paused"
    assert json.loads(run(world, "resume", job, "--json").stdout)["status"] in ("queued", "running", "validating_files")
    assert run(world, "cancel", job).stdout.strip() == f"{job}: cancelled"
    followed = run(world, "events", job, "--follow")
    assert followed.exit_code == 1 and followed.stderr.splitlines()[-1] == f"ptuning: {job} cancelled"
    assert run(world, "cancel", job, key=BOB).exit_code == 2


def refused(world: SimpleNamespace, words: str, *arguments: str, code: int = 2, key: str | None = ANN) -> None:
    before = files(world)
    done = run(world, *arguments, key=key)
    assert done.exit_code == code and done.stdout == "", done.output
    assert done.stderr.startswith("ptuning: ") and words in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert files(world) == before, "a file stays on the server"


def test_what_is_wrong_is_a_sentence_and_leaves_nothing(world: SimpleNamespace, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "a", "label": "b"}\n{"text": []}\n[]\n')
    refused(world, "bad.jsonl: line 3: is not a JSON object", str(bad))
    refused(world, "nothing.jsonl: no such file", "nothing.jsonl")
    refused(world, f"{tmp_path}: cannot be read", str(tmp_path))
    refused(world, "no such file", world.rows, "--validation", "nothing.jsonl")
    refused(world, "hyperparameters.epochs: is not supported", world.rows, "epochs=3")
    refused(world, "n_epochs: must be", world.rows, "n_epochs=0")
    refused(world, "model", world.rows, *SETTINGS, "--model", "nobody")
    refused(world, "epochs: is not a setting; write KEY=VALUE", world.rows, "epochs")
    refused(world, "template was given another value", world.rows, "template=x", "template.input={text}")
    refused(world, "may ask but not tune", world.rows, key=KEY)
    refused(world, "the API key is missing or unknown", world.rows, key="wrong-key-0123456789")
    refused(world, "no server answers", world.rows, "--url", "http://127.0.0.1:9/v1", code=1)
    refused(world, "no server answers", world.rows, "--model", "x", "--url", "http://127.0.0.1:9/v1", code=1)
    refused(world, "there is no such job", "events", "ftjob-x")
    refused(world, "FILE: is empty", " ")


def test_help_comes_without_a_server(world: SimpleNamespace) -> None:
    for arguments in (["tune", "--help"], ["tune", "start", "--help"], ["tune", "events", "--help"]):
        assert CliRunner().invoke(app, arguments).exit_code == 0
