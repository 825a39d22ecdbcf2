"""Jobs: what travels and what does not, and the whole way over HTTP to a real cluster of two nodes that asks for a token."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import REPOSITORY, set_traps, sprung, toy_rows
from test_soft_prompt import make
from test_tracking import free_port
from typer.testing import CliRunner

from ptuning.cli.app import app
from ptuning.cluster import job_files, job_package
from ptuning.cluster.job_files import JobPackage
from ptuning.cluster.local_paths import absolute
from ptuning.config import read_experiment
from ptuning.data.readers import Columns
from ptuning.data.sources import read_source
from ptuning.errors import UserError
from ptuning.model import soft_prompt
from ptuning.model.base import find_base
from ptuning.paths import locate
from ptuning.settings.model import ModelConfig
from ptuning.training.run_setup import pin_parent

Write = Callable[..., Path]
fast = pytest.mark.fast


def tables(base: Path, storage: str = "/shared/runs") -> dict[str, Any]:
    return {
        "name": "toy",
        "model": {"path": str(base)},
        "prompt": {"length": 4},
        "data": {
            **{split: f"data/{split}.jsonl" for split in ("train", "validation", "test")},
            "input": "Text: {text}\nKind:",
            "target": " {label}",
            "labels": ["fruit", "tool"],
        },
        "train": {"learning_rate": 0.05, "steps": 20, "evaluate_every": 10, "batch_size": 8},
        "compute": {"storage": storage},
    }


def fill(folder: Path) -> None:
    """The data of the toy task, below a folder."""
    (folder / "data").mkdir()
    for seed, (split, n) in enumerate({"train": 64, "validation": 32, "test": 32}.items()):
        lines = [json.dumps(row) + "\n" for row in toy_rows(n, seed)]
        (folder / "data" / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")


# What travels.


@pytest.fixture
def desk(tmp_path: Path, tiny_base_folder: Path, write_toml: Write, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A folder as people have them, with more in it than a job needs, and `collect` of an experiment in it."""
    monkeypatch.chdir(tmp_path)
    fill(tmp_path)
    for private in (".env", ".git/config", "runs/old/checkpoint", "big.bin", "ptuning/__init__.py"):
        (tmp_path / private).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / private).write_text("PASSWORD=hunter2")
    base = tmp_path / "base"
    shutil.copytree(tiny_base_folder, base)
    (base / ".cache").mkdir()
    (base / "pytorch_model.bin").write_bytes(b"pickle")
    experiment = tables(Path("base"))

    def collect(*overrides: str, kind: Any = "train", **options: Any) -> JobPackage:
        chosen: dict[str, Any] = {"shared": (), "env": (), "here": {}} | options
        return job_package.build_package(kind, str(write_toml(experiment)), overrides, **chosen)

    return SimpleNamespace(folder=tmp_path, base=base, experiment=experiment, collect=collect)


@fast
def test_exactly_what_the_experiment_names_travels(desk: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> None:
    packed = tmp_path_factory.mktemp("packed")
    shipped: JobPackage = desk.collect("train.steps=7")
    shipped.pack(packed)
    found = {str(path.relative_to(packed)): path for path in packed.rglob("*") if path.is_file()}
    assert found.keys() == shipped.contents.keys()
    assert {path.stat().st_size for path in found.values()} == set(shipped.contents.values())
    folders = {name.split("/")[1].rpartition("-")[0] for name in found if "/" in name}
    assert folders == {"base", "train", "validation", "test"} and "experiment.toml" in found
    assert not any(word in name for name in found for word in (".bin", ".env", ".git", "runs", ".cache", "__init__"))
    replaced = dict(override.split("=", 1) for override in shipped.overrides)
    assert list(replaced) == ["train.steps", "data.train", "data.validation", "data.test", "model.path"]
    for key in ("data.train", "model.path"):
        assert (packed / "shipped" / replaced[key].removeprefix("shipped:")).exists()
    assert shipped.notes == ["compute.storage: every node must have /shared/runs"]


@fast
def test_names_follow_the_content(desk: SimpleNamespace) -> None:
    """A run that is resumed finds the same names, wherever the files lie by then; other rows are other names."""
    before = desk.collect().overrides
    moved = desk.folder / "elsewhere"
    moved.mkdir()
    (desk.folder / "data").rename(moved / "data")
    for split in ("train", "validation", "test"):
        desk.experiment["data"][split] = f"elsewhere/data/{split}.jsonl"
    assert desk.collect().overrides == before
    with (moved / "data" / "train.jsonl").open("a") as file:
        file.write('{"text": "saw", "label": "tool"}\n')
    after = desk.collect().overrides
    assert after[0] != before[0] and after[1:] == before[1:]


@fast
def test_what_has_travelled_is_found_from_any_folder(desk: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = desk.collect()
    job = desk.folder / "job"
    job.mkdir()
    shipped.pack(job)
    source = dict(override.split("=", 1) for override in shipped.overrides)["data.train"]
    with pytest.raises(UserError, match=f"{source}: no such file"):
        read_source(source, Columns.of(["text"]))
    monkeypatch.syspath_prepend(str(job))
    assert len(read_source(source, Columns.of(["text"])).rows) == 64
    assert locate("plain/path") == Path("plain/path")


@fast
@pytest.mark.parametrize(
    ("written", "overrides"),
    [
        ("parts", 1),
        ("parts/*.jsonl", 1),
        (["parts/a.jsonl", "parts/b.jsonl.gz", "hub:org/name:train"], 2),
        (["parts/*.gz", "parts/a.jsonl"], 2),
    ],
)
def test_folders_patterns_and_lists_travel(
    desk: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, written: Any, overrides: int
) -> None:
    parts = desk.folder / "parts"
    parts.mkdir()
    (parts / "a.jsonl").write_text((desk.folder / "data" / "train.jsonl").read_text())
    (parts / "b.jsonl.gz").write_bytes(gzip.compress((desk.folder / "data" / "test.jsonl").read_bytes()))
    (parts / ".env").write_text("PASSWORD=hunter2")
    desk.experiment["data"]["train"] = written
    shipped = desk.collect()
    job = desk.folder / "job"
    job.mkdir()
    shipped.pack(job)
    assert not any(".env" in name for name in shipped.contents)
    read = read_experiment(next(job.glob("*.toml")), shipped.overrides).data.train
    sources = [read] if isinstance(read, str) else [each for each in read if not each.startswith("hub:")]
    assert len(sources) == overrides and all(each.startswith("shipped:") for each in sources)
    columns = Columns.of(["text", "label"])
    before = written if isinstance(written, str) else [each for each in written if not each.startswith("hub:")]
    expected = read_source(before, columns).fingerprint
    parts.rename(desk.folder / "elsewhere")
    monkeypatch.syspath_prepend(str(job))
    assert read_source(sources, columns).fingerprint == expected


@fast
def test_data_beside_the_experiment_travels(desk: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = desk.collect("train.steps=7").overrides
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    desk.experiment["model"]["path"] = str(desk.base)
    assert desk.collect("train.steps=7").overrides == before


@fast
def test_shared_patterns_stay_where_they_are(desk: SimpleNamespace) -> None:
    shipped = desk.collect("data.train=data/tr*.jsonl", shared=[str(desk.folder)])
    assert f"data.train={desk.folder}/data/tr*.jsonl" in shipped.overrides and not shipped.files


@fast
def test_a_soft_prompt_and_a_base_travel(desk: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    make(torch.randn(4, 32)).save(str(desk.folder / "parent"), layers=2, heads=4)
    shipped = desk.collect("prompt.init=soft-prompt", "prompt.init_from=parent")
    job = desk.folder / "job"
    job.mkdir()
    shipped.pack(job)
    monkeypatch.syspath_prepend(str(job))
    travelled = absolute(read_experiment(job / "experiment.toml", shipped.overrides))
    assert pin_parent(travelled, "/shared/runs/toy") == travelled, "a folder, no name in the registry"
    assert soft_prompt.load(str(travelled.prompt.init_from)).vectors.shape == (4, 32)
    here, there = find_base(ModelConfig(path=str(desk.base))), find_base(travelled.model)
    assert there.fingerprint == here.fingerprint and there.folder.is_relative_to(job)


@fast
@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "data.train=missing.jsonl",
            "data.train: missing.jsonl is not in {folder}; correct the path, or give an absolute one of",
        ),
        ("data.train=data", "data: contains files of several splits (test, train, validation); "),
        ("model.path=no/such/base", "model.path: no/such/base is not in {folder}; correct the path"),
        ("model.path=data", "model.path: data contains none of *.json, *.safetensors"),
        (
            "compute.storage=runs",
            "compute.storage: runs is a folder of this machine; give one that every node of the cluster can access",
        ),
        ("compute.storage=~/runs", "compute.storage: ~/runs is a folder of this machine; give one"),
        ("compute.storage=s3://b/runs", "compute.storage: s3://b/runs cannot hold the tracking store; set tracking.uri to an"),
        ("tracking.uri=http://me:hunter2@host", "override tracking.uri=http://***@host: contains a password"),
        (
            "tracking.uri=sqlite:///here.db",
            "tracking.uri: sqlite:///here.db is on this machine only; give the address of an MLflow server",
        ),
        (
            "data.input=http://me:hunter2@host {text}",
            "override data.input=http://***@host {{text}}: contains a password",
        ),
    ],
)
def test_what_the_cluster_cannot_have_is_refused(desk: SimpleNamespace, override: str, message: str) -> None:
    with pytest.raises(UserError) as refused:
        desk.collect(override)
    assert str(refused.value).startswith(message.format(folder=desk.folder)), str(refused.value)
    assert "hunter2" not in str(refused.value)


@fast
def test_large_files_are_refused_and_shared_ones_stay(desk: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    with (desk.base / "model.safetensors").open("ab") as weights:
        weights.truncate(job_files.LIMIT + 1)  # takes no space
    with pytest.raises(UserError) as refused:
        desk.collect()
    assert str(refused.value).startswith("model.path: base (100 MB), with the other files 100 MB, is too large to upload")
    assert str(refused.value).endswith(f"or add --shared {desk.folder} if the nodes mount it")
    shared = desk.collect("compute.storage=runs", shared=["."])
    assert list(shared.contents) == ["experiment.toml"] and not shared.notes
    assert f"model.path={desk.base}" in shared.overrides and f"compute.storage={desk.folder}/runs" in shared.overrides
    theirs = desk.collect("model.path=/models/llama", "data.train=/rows/train.jsonl")
    assert theirs.notes[:2] == [
        "data.train: every node must have /rows/train.jsonl",
        "model.path: every node must have /models/llama",
    ]


@fast
def test_an_id_of_the_hub_and_names_of_the_registry_need_nothing(desk: SimpleNamespace) -> None:
    assert "model.path" not in " ".join(desk.collect("model.path=gpt2").overrides[1:])
    hub = desk.collect(
        "model.path=org/model", "data.train=hub:org/rows:train", "prompt.init=soft-prompt", "prompt.init_from=toy@champion"
    )
    assert not any(override.startswith(("model.path=shipped", "prompt.init_from=shipped")) for override in hub.overrides)
    assert desk.collect("compute.address=10.0.0.1:6379").overrides[-1] == "compute.address=auto"


@fast
def test_secrets_never_travel(desk: SimpleNamespace) -> None:
    here = {
        "HF_TOKEN": "hf_hunter2",
        "AWS_SECRET_ACCESS_KEY": "hunter2",
        "MLFLOW_TRACKING_PASSWORD": "hunter2",
        "MLFLOW_TRACKING_URI": "http://mlflow:5000",
        "RAY_AUTH_TOKEN": "hunter2",
        "AWS_ENDPOINT_URL": "http://store:9000",
        "HF_HOME": "/home/me/.cache",
        "SSH_AUTH_SOCK": "/hunter2",
    }
    shipped = desk.collect("model.path=org/model", "compute.storage=s3://bucket/runs", here=here)
    assert shipped.env == job_package.ALWAYS | {"AWS_ENDPOINT_URL": "http://store:9000"}
    assert "tracking.uri=http://mlflow:5000" in shipped.overrides
    assert shipped.notes == [
        "secrets are not uploaded; set them in the environment of the cluster's nodes: HF_TOKEN, AWS_SECRET_ACCESS_KEY, "
        "MLFLOW_TRACKING_PASSWORD"
    ]
    assert "hunter2" not in str(shipped)
    assert desk.collect(shared=["/home/me"], here=here).env["HF_HOME"] == "/home/me/.cache"
    for name in ("HF_TOKEN", "MY_API_KEY=x", "DB_PASSWORD=x", "GOOGLE_APPLICATION_CREDENTIALS=x", "KEY=x", "BASIC_AUTH=x"):
        with pytest.raises(UserError, match="looks like a secret"):
            desk.collect(env=[name], here=here)
    with pytest.raises(UserError, match=r"AWS_ENDPOINT_URL: http://\*\*\*@store contains a password"):
        desk.collect(here={"AWS_ENDPOINT_URL": "http://me:hunter2@store"})
    with pytest.raises(UserError, match="--env: NOWHERE is not set here; set it, or write --env NOWHERE=VALUE"):
        desk.collect(env=["NOWHERE"])
    assert desk.collect(env=["MONKEYS=1", "OMP_NUM_THREADS"], here={"OMP_NUM_THREADS": "2"}).env["OMP_NUM_THREADS"] == "2"


@fast
@pytest.mark.parametrize(
    ("table", "key", "value", "fix"),
    [
        ("tracking", "uri", "http://me:hunter2@host", "its password as MLFLOW_TRACKING_PASSWORD"),
        ("compute", "storage", "s3://AKIA:hun/ter2@bucket/runs", "its keys as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
        ("compute", "address", "http://me:hunter2@head:8265", "as a variable of the service"),
        ("data", "train", "https://host/rows.jsonl?token=hunter2", "as a variable of the service"),
        ("prompt", "init_from", "s3://AKIA:hunter2@bucket/prompt", "as a variable of the service"),
    ],
)
def test_a_file_with_a_password_does_not_travel(desk: SimpleNamespace, table: str, key: str, value: str, fix: str) -> None:
    desk.experiment.setdefault(table, {})[key] = value
    if key == "init_from":
        desk.experiment["prompt"]["init"] = "soft-prompt"
    with pytest.raises(
        UserError, match=rf"^{table}\.{key}: .* contains a password, which everyone who sees the job could read"
    ) as refused:
        desk.collect()
    assert fix in str(refused.value) and "ter2" not in str(refused.value)


@fast
def test_api_keys_never_travel(desk: SimpleNamespace) -> None:
    (desk.folder / "keys").write_text("hunter2hunter2hunter2\n")
    with pytest.raises(UserError, match="serve.keys: keys is not uploaded, since others could read it; give a file that"):
        desk.collect("serve.keys=keys", kind="serve")
    served = desk.collect("serve.keys=/etc/keys", kind="serve", here={"PTUNING_API_KEYS": "hunter2"})
    assert "serve.keys: every node must have /etc/keys" in served.notes and "hunter2" not in str(served)
    assert not any(override.startswith("data.") for override in served.overrides), "who serves reads no rows"


@fast
def test_nothing_that_travels_can_be_imported(desk: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Ray has every process of a job import from its working directory."""
    packed = tmp_path_factory.mktemp("packed")
    shutil.copy(desk.folder / "data" / "train.jsonl", desk.folder / "queue.py")
    desk.experiment["data"]["train"] = "queue.py"
    desk.collect().pack(packed)
    (desk.folder / "experiment.toml").rename(desk.folder / "secrets.py")
    shipped = job_package.build_package("train", "secrets.py", ["data.train=data/train.jsonl"], shared=[], env=[], here={})
    shipped.pack(packed)
    assert "secrets.py.toml" in shipped.contents and shipped.env["PYTHONSAFEPATH"] == "1"
    assert {path.name for path in packed.iterdir()} == {"experiment.toml", "secrets.py.toml", "shipped"}


@fast
def test_dry_run_shows_all_and_sends_nothing(desk: SimpleNamespace, write_toml: Write) -> None:
    nobody = f"http://127.0.0.1:{free_port()}"
    command = ["submit", "train", str(write_toml(desk.experiment)), "train.steps=7", "--address", nobody, "--resume"]
    done = CliRunner().invoke(app, [*command, "--dry-run", "--json"])
    shown = json.loads(done.stdout)
    assert done.exit_code == 0 and shown["entrypoint"].startswith("python -m ptuning train experiment.toml train.steps=7 ")
    assert shown["entrypoint"].endswith(" --resume --json")
    assert shown["metadata"] == {"ptuning": "train", "experiment": "toy"} and shown["env"]["RAY_JOB_STOP_SIGNAL"] == "SIGINT"
    assert shown["files"]["ptuning/"] > 1_000_000 and shown["files"]["experiment.toml"] > 100
    assert (
        "ptuning/" not in json.loads(CliRunner().invoke(app, [*command, "--dry-run", "--json", "--installed"]).stdout)["files"]
    )
    words = CliRunner().invoke(app, [*command, "--dry-run"]).stdout
    assert "entrypoint  python -m ptuning train" in words and "env         RAY_JOB_STOP_WAIT_TIME_S=60" in words
    assert "note        compute.storage: every node must have /shared/runs" in words
    sent = CliRunner().invoke(app, command)
    assert sent.exit_code == 1 and f"ptuning: {nobody}: no response (connection refused); check the address" in sent.stderr


@fast
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["train", "--address", "ray://head:10001"],
            "--address: ray://head:10001 is not the address of a Ray dashboard; write http",
        ),
        (["train", "--insecure"], "--insecure: is nothing for train; leave it out"),
        (["serve", "--resume"], "--resume: is nothing for serve; leave it out"),
        (["train", "--register", "a/b"], "--register: 'a/b' is not a valid name; use at most 64 letters"),
        (["train", "train.stops=1"], "train.stops: unknown key; did you mean train.steps?"),
    ],
)
def test_wrong_commands_are_one_sentence(desk: SimpleNamespace, write_toml: Write, arguments: list[str], message: str) -> None:
    what, *rest = arguments
    done = CliRunner().invoke(app, ["submit", what, str(write_toml(desk.experiment)), "--address", "http://127.0.0.1:1", *rest])
    assert done.exit_code == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr


@fast
def test_exit_codes_and_reasons() -> None:
    from ray.job_submission import JobDetails, JobStatus, JobType

    from ptuning.cluster.jobs import exit_code, failure

    def ended(status: str, code: int | None = None, message: str | None = None) -> JobDetails:
        return JobDetails(
            type=JobType.SUBMISSION, status=JobStatus(status), entrypoint="x", driver_exit_code=code, message=message
        )

    cases = [
        ("SUCCEEDED", 0, 0),
        ("FAILED", 2, 2),
        ("FAILED", 1, 1),
        ("FAILED", -9, 137),
        ("FAILED", None, 1),
        ("STOPPED", None, 130),
    ]
    assert [exit_code(ended(status, code)) for status, code, _ in cases] == [wanted for *_, wanted in cases]
    assert failure(ended("FAILED", -9)) == "failed with exit code 137"
    assert failure(ended("FAILED", None, "Traceback\n  no space left")) == "could not be started: no space left"


@fast
def test_the_result_is_the_last_line_and_only_there() -> None:
    from ptuning.cluster.jobs import Log

    said: list[str] = []
    log = Log(said.append)
    for part in ("one\ntw", 'o\n{"no": "result"}\nthree\n', '{"name": "toy",', ' "steps": 3}\n'):
        log(part)
    assert said == ["one", "two", '{"no": "result"}', "three"]
    assert log.result() == {"name": "toy", "steps": 3} and log.length == 59
    unfinished = Log(said.append)
    unfinished("{broken\n")
    assert unfinished.result() is None and said[-1] == "{broken"


# The whole way.


def free_pair() -> int:
    """A port that is free, as the next one is, below those that the system gives to whoever asks: a head takes them late."""
    for port in range(20000 + os.getpid() % 5000, 32000, 7):
        with contextlib.suppress(OSError), socket.socket() as one, socket.socket() as two:
            one.bind(("", port))
            two.bind(("", port + 1))
            return port
    raise AssertionError("no two free ports")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path) -> Iterator[SimpleNamespace]:
    """Two nodes by `up-local.sh`, a folder that stands for a shared one, and a client whose package says that it travelled."""
    state = Path(tempfile.mkdtemp(prefix="pt-")) / "c"  # short: sockets lie in it
    folder = tmp_path_factory.mktemp("laptop")
    package = folder / "site" / "ptuning"
    shutil.copytree(REPOSITORY / "ptuning", package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "__init__.py").write_text(
        'import os, sys\n"RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ and print("this package travelled", file=sys.stderr)\n'
    )
    desk = folder / "desk"
    set_traps(desk)
    fill(desk)
    port, dashboard = free_pair(), free_port()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTHONPATH"))} | {
        "PTUNING_CLUSTER": str(state),
        "PTUNING_CLUSTER_PORT": str(port),
        "PTUNING_DASHBOARD_PORT": str(dashboard),
        "PTUNING_PYTHON": sys.executable,
    }
    script = str(REPOSITORY / "cluster" / "up-local.sh")
    subprocess.run([script, "up"], env=environment, cwd=desk, check=True, timeout=150)
    try:
        client = environment | {
            "PYTHONPATH": str(package.parent),
            "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
            "RAY_ADDRESS": "127.0.0.1:1",  # of another cluster: not to be believed
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(state / "token"),
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
        }
        yield SimpleNamespace(desk=desk, shared=folder / "shared", client=client, base=tiny_base_folder)
        assert sprung(desk) == []
    finally:
        subprocess.run([script, "down"], env=environment, check=True, timeout=60)
        shutil.rmtree(state.parent)


def run(cluster: SimpleNamespace, *arguments: str, **environment: str | None) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in (cluster.client | environment).items() if value is not None}
    command = [sys.executable, "-m", "ptuning", *arguments]
    return subprocess.run(command, env=env, cwd=cluster.desk, capture_output=True, text=True, timeout=300)


def write(cluster: SimpleNamespace, write_toml: Write, **changes: Any) -> str:
    experiment = tables(cluster.base, str(cluster.shared))
    for key, value in changes.items():
        experiment[key] = experiment[key] | value if isinstance(value, dict) else value
    return str(write_toml(experiment))


@pytest.mark.cluster
@pytest.mark.slow
def test_without_the_token_401_with_a_wrong_one_403(cluster: SimpleNamespace) -> None:
    address = cluster.client["RAY_API_SERVER_ADDRESS"]
    nothing = run(cluster, "jobs", "list", RAY_AUTH_MODE=None, RAY_AUTH_TOKEN_PATH=None)
    assert nothing.returncode == 2 and nothing.stderr == (
        f"ptuning: {address}: requires a token (401); set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to its file\n"
    )
    wrong = run(cluster, "jobs", "list", RAY_AUTH_TOKEN_PATH=None, RAY_AUTH_MODE=None, RAY_AUTH_TOKEN=secrets.token_hex(16))
    assert wrong.returncode == 2 and wrong.stderr == (
        f"ptuning: {address}: refuses the token (403); use the one that the cluster was started with, in "
        "RAY_AUTH_TOKEN_PATH or RAY_AUTH_TOKEN\n"
    )
    assert json.loads(run(cluster, "jobs", "list", "--json", RAY_AUTH_MODE=None).stdout) == {"jobs": []}


def start(cluster: SimpleNamespace, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "ptuning", *arguments]
    nothing: Any = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
    return subprocess.Popen(command, env=cluster.client, cwd=cluster.desk, stderr=subprocess.PIPE, text=True, **nothing)


def read_until(process: subprocess.Popen[str], words: str) -> str:
    assert process.stderr is not None
    for line in process.stderr:
        if words in line:
            return line
    raise AssertionError(f"it has ended without saying {words!r}")


@pytest.mark.cluster
@pytest.mark.slow
def test_a_submitted_run_says_what_it_says_here(cluster: SimpleNamespace, write_toml: Write) -> None:
    experiment = write(cluster, write_toml, name="small", train={"steps": 10, "evaluate_every": 10})
    done = run(cluster, "submit", "train", experiment, "--register=small", "--json")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)  # nothing else is said on stdout
    assert (summary["name"], summary["steps"], summary["registered"]) == ("small", 10, "small:1")
    assert (cluster.shared / "small" / "soft_prompt" / "card.json").exists()
    assert "this package travelled" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.nightly
@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_train_detach_kill_find_stop_resume(cluster: SimpleNamespace, write_toml: Write) -> None:
    experiment = write(cluster, write_toml, compute={"workers": 2}, train={"steps": 300, "evaluate_every": 300})
    client = start(cluster, "submit", "train", experiment, "train.checkpoint_every=10")
    job = read_until(client, "job toy-").split()[1]
    client.kill()
    client.communicate()

    jobs = json.loads(run(cluster, "jobs", "list", "--json").stdout)["jobs"]
    (found,) = [each for each in jobs if each["experiment"] == "toy"]
    assert (found["job"], found["what"], found["experiment"]) == (job, "train", "toy") and found["exit_code"] is None
    again = run(cluster, "submit", "train", experiment, "--resume")
    assert again.returncode == 2 and f"toy: job {job} of this name is " in again.stderr
    assert again.stderr.endswith(f"ptuning jobs logs {job} --follow, or choose another name with name=toy-2\n")
    follower = start(cluster, "jobs", "logs", job, "--follow")
    read_until(follower, "Running entrypoint")
    follower.send_signal(signal.SIGINT)
    assert f"{job} goes on; follow it with: ptuning jobs logs {job} --follow" in follower.communicate(timeout=30)[1]
    assert follower.returncode == 130

    deadline = time.monotonic() + 120
    while not list(cluster.shared.glob("toy/checkpoints/step-*/manifest.json")):
        assert time.monotonic() < deadline, run(cluster, "jobs", "logs", job).stdout
        time.sleep(0.1)
    stopped = run(cluster, "jobs", "stop", job)
    assert stopped.returncode == 0 and stopped.stdout == f"{job}: stopped\n", stopped
    followed = run(cluster, "jobs", "logs", job, "--follow")
    assert followed.returncode == 130 and f"ptuning: {job} was stopped" in followed.stderr
    said = "stopped; continue with: ptuning train experiment.toml train.checkpoint_every=10 "
    assert said in followed.stderr, "in order, not killed"

    # The rows travel again and have the same names: this is the same run.
    done = run(cluster, "submit", "train", experiment, "train.checkpoint_every=10", "--resume", "--register=toy", "--json")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)  # nothing else is said on stdout
    assert summary["name"] == "toy" and summary["steps"] == 300 and summary["registered"] == "toy:1"
    assert (cluster.shared / "toy" / "soft_prompt" / "card.json").exists()
    line = next(line for line in done.stderr.splitlines() if line.startswith("resumed at step "))
    assert int(line.split()[3]) >= 10 and line.endswith(" of 300")
    assert "this package travelled" in done.stderr and "base loaded by 2 workers" in done.stderr
    assert "Traceback" not in done.stderr


class Asking:
    """Somebody who asks without end, from a thread."""

    def __init__(self, port: int) -> None:
        self.answered, self.failed = 0, list[str]()
        self._url, self._stopped = f"http://127.0.0.1:{port}/v1/classify", threading.Event()
        self._thread = threading.Thread(target=self._ask)

    def __enter__(self) -> Asking:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def _ask(self) -> None:
        body = json.dumps({"model": "toy", "input": ["the old hammer"]}).encode()
        request = urllib.request.Request(self._url, body, {"Content-Type": "application/json"})
        while not self._stopped.wait(0.05):
            try:
                with urllib.request.urlopen(request, timeout=20) as answer:
                    self.answered += len(json.load(answer)["data"])
            except OSError as error:
                self.failed.append(str(error))


@pytest.mark.nightly
@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_is_served_lives_on_until_it_is_stopped(cluster: SimpleNamespace, write_toml: Write) -> None:
    """Serves what the test before has registered; then other settings replace it, and wrong ones do not."""
    port, experiment = free_port(), write(cluster, write_toml)
    served = run(cluster, "submit", "serve", experiment, f"serve.port={port}", "--json")
    assert served.returncode == 0, served.stderr
    names = json.loads(served.stdout)["served"]
    assert "toy" in names and any(name.startswith(cluster.base.name) for name in names)
    answer = run(cluster, "ask", "toy", "the old hammer", "--url", f"http://127.0.0.1:{port}/v1")
    assert answer.stdout.strip() in ("fruit", "tool"), answer.stderr

    with Asking(port) as asking:
        replaced = run(cluster, "submit", "serve", experiment, f"serve.port={port}", "serve.waiting=9")
        assert replaced.returncode == 0, replaced.stderr
        wrong = run(cluster, "submit", "serve", experiment, f"serve.port={port}", "serve.cache_mb=1000000000")
    said = "ptuning: the server did not start: serve.cache_mb: 1000000000 MB for keys and values exceed the "
    assert wrong.returncode == 2 and said in wrong.stderr and "Traceback" not in wrong.stderr
    assert not asking.failed and asking.answered > 20, asking.failed
    elsewhere = run(cluster, "submit", "serve", experiment, f"serve.port={free_port()}")
    assert (
        elsewhere.returncode == 2
        and f"Ray Serve already runs on this cluster and listens at 127.0.0.1:{port};" in elsewhere.stderr
    )

    job = json.loads(run(cluster, "jobs", "list", "--json").stdout)["jobs"][1]
    assert job["what"] == "serve" and job["status"] == "succeeded"
    stopped = run(cluster, "jobs", "stop", job["job"])
    assert stopped.returncode == 0 and stopped.stdout == f"{job['job']}: what it served has ended\n", stopped
    asked = run(cluster, "ask", "toy", "the old hammer", "--url", f"http://127.0.0.1:{port}/v1")
    assert asked.returncode != 0 and asked.stdout == ""


@pytest.mark.nightly
@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_search_is_a_job_too(cluster: SimpleNamespace, write_toml: Write) -> None:
    space = ["search.trials=3", "search.slots=2", "search.length=[2,4]"]
    done = run(cluster, "submit", "search", write(cluster, write_toml, name="found"), *space, "train.steps=10", "--json")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["trials"] == {"finished": 3} and "test_accuracy" in summary["metrics"] and "Traceback" not in done.stderr
    assert (cluster.shared / "found" / "soft_prompt" / "card.json").exists()


@pytest.mark.nightly
@pytest.mark.cluster
@pytest.mark.slow
def test_the_doctor_goes_to_the_cluster(cluster: SimpleNamespace, write_toml: Write) -> None:
    """As a job: nobody needs the cluster's own port. It sees whether nodes share the storage, and the base that came along."""
    address = cluster.client["RAY_API_SERVER_ADDRESS"]
    done = run(cluster, "doctor", write(cluster, write_toml), "--address", address, "--json")
    assert done.returncode == 0, done.stderr
    findings = json.loads(done.stdout)["findings"]
    by_what: dict[str, list[dict[str, str]]] = {}
    for finding in findings:
        by_what.setdefault(finding["what"], []).append(finding)
    assert [len(by_what[what]) for what in ("base", "clock", "storage", "mlflow")] == [2, 2, 2, 2]
    assert by_what["shared storage"][0]["state"] == by_what["ray auth"][0]["state"] == "ok"
    assert "2 nodes" in by_what["ray"][0]["text"]
    bare = run(cluster, "doctor", "--address", address)
    assert bare.returncode == 0 and "2 nodes" in bare.stdout, bare.stderr
    nobody = run(cluster, "doctor", "--address", f"http://127.0.0.1:{free_port()}")
    assert nobody.returncode == 1 and "no response" in nobody.stderr


@pytest.mark.nightly
@pytest.mark.cluster
@pytest.mark.slow
def test_a_failing_job_gives_its_exit_code(cluster: SimpleNamespace, write_toml: Write) -> None:
    """A search that is refused by the cluster's machine, not here."""
    experiment = write(cluster, write_toml, name="failing", data={"labels": ["fruit", "spanner"]})
    started = run(cluster, "submit", "search", experiment, "search.trials=3", "--no-wait")
    job = started.stdout.strip()
    assert started.returncode == 0 and job.startswith("failing-")
    done = run(cluster, "jobs", "logs", job, "--follow")
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
    assert "'tool'" in done.stderr and done.stderr.endswith(f"ptuning: {job} failed with exit code 2\n")
    assert run(cluster, "jobs", "logs", job[:-1]).stderr.endswith(f"; did you mean {job}?\n")
    nothing = run(cluster, "jobs", "stop", "nobody")
    assert nothing.returncode == 2 and "nobody: there is no such job on" in nothing.stderr
