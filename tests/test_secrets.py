"""No password leaves the commands: everything that they write, log, answer or send is searched for those that they were given.

Real commands with a password in every address and variable that can have one, on a real MLflow server and a real S3 server.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import REPOSITORY, worker_killed
from pyarrow import fs
from test_storage_s3 import bucket  # noqa: F401
from test_tracking import free_port, migrated, server

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    # MLflow 3.17 uses SQLAlchemy's noload, deprecated in 2.1 (store/tracking/sqlalchemy_store.py).
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

PASSWORDS = ("tracking-hunter-1", "tracking-hunter-2")
STORE = "store/hunter+3"
"""With the characters that the keys of S3 have, which an address must escape."""
VARIABLES = {
    "AWS_SECRET_ACCESS_KEY": "aws-hunter-4",
    "AWS_SESSION_TOKEN": "",
    "HF_TOKEN": "hf_hunter-5",
    "MLFLOW_TRACKING_PASSWORD": "mlflow-hunter-6",
    "OPENAI_API_KEY": "sk-hunter-7",
    "PTUNING_API_KEY": "key-hunter-8-key",
    "PTUNING_API_KEYS": "key-hunter-8-key,key-hunter-9-key admin",
    "RAY_AUTH_TOKEN": "10ab" * 16,
}
SECRETS = {
    *PASSWORDS,
    *(STORE, STORE.replace("/", "%2F"), STORE.replace("/", "%2F").replace("+", "%2B")),
    *(each for value in VARIABLES.values() for each in value.replace(" admin", "").split(",") if each),
    *(base64.b64encode(f"me:{each}".encode()).decode() for each in PASSWORDS),
}


@pytest.fixture
def desk(tmp_path: Path, bucket: str, toy_task: SimpleNamespace, write_toml: Callable[..., Path]) -> Iterator[SimpleNamespace]:  # noqa: F811
    """`run` of a command with all these secrets around it, and what was said by all of them."""
    home, sessions = tmp_path / "home", Path(tempfile.mkdtemp(prefix="pt-"))  # short: sockets lie in it
    home.mkdir()
    shutil.copy(migrated(), tmp_path / "server.db")
    said: list[str] = []
    wrong: list[Any] = []
    environment = os.environ | VARIABLES | {"HOME": str(home), "RAY_TMPDIR": str(sessions), "PYTHONPATH": str(REPOSITORY)}
    environment |= {"AWS_ACCESS_KEY_ID": "AKIAOTHER", "MLFLOW_TRACKING_USERNAME": "me"}

    def start(*arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "ptuning", *arguments]
        return subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def run(code: int, *arguments: str) -> str:
        process = start(*arguments)
        output, _ = process.communicate(timeout=600)
        said.append(output)
        if process.returncode != code:
            wrong.append((arguments, process.returncode, output))
        return output

    tables = toy_task.experiment | {"train": toy_task.experiment["train"] | {"steps": 4, "evaluate_every": 2}}

    def write(name: str, uri: str, storage: str | None = None, **more: Any) -> str:
        compute = {"storage": storage or str(tmp_path / "runs"), "cpus_per_worker": 1.0}
        return str(write_toml({**tables, "name": name, "tracking": {"uri": uri}, "compute": compute, **more}, f"{name}.toml"))

    try:
        with server(tmp_path, free_port()) as uri:
            yield SimpleNamespace(
                run=run, start=start, wrong=wrong, write=write, said=said, bucket=bucket, folder=tmp_path, sessions=sessions,
                uri=lambda number: uri.replace("//", f"//me:{PASSWORDS[number]}@"),
            )  # fmt: skip
    finally:
        shutil.rmtree(sessions, ignore_errors=True)


def found_in(desk: SimpleNamespace) -> dict[str, set[str]]:
    """Where which secret was found, besides in the files that hold the experiments."""
    texts = {f"output {number}": text.encode() for number, text in enumerate(desk.said)}
    for root in (desk.folder, desk.sessions):
        for path in root.rglob("*"):
            if path.is_file() and path.suffix != ".toml":
                texts[str(path)] = path.read_bytes()
    address = os.environ["AWS_ENDPOINT_URL"].removeprefix("http://")
    system = fs.S3FileSystem(endpoint_override=address, scheme="http")
    for info in system.get_file_info(fs.FileSelector("tests", recursive=True)):
        if info.is_file:
            texts[f"s3://{info.path}"] = system.open_input_file(info.path).read()
    assert sum(name.startswith("s3://") for name in texts) > 5 and sum("/session_" in name for name in texts) > 20
    found = {name: {secret for secret in SECRETS if secret.encode() in text} for name, text in texts.items()}
    return {name: secrets for name, secrets in found.items() if secrets}


@pytest.mark.nightly
def test_no_secret_is_written_logged_or_answered(desk: SimpleNamespace) -> None:
    far = desk.bucket.replace("//", f"//AKIAHUNTER:{STORE.replace('/', '%2F').replace('+', '%2B')}@") + "/runs"
    trained = desk.write("far", desk.uri(0), far)
    summary = json.loads(desk.run(0, "train", trained, "--register", "far", "--json").splitlines()[-1])
    assert summary["soft_prompt"] == f"{desk.bucket}/runs/far/soft_prompt" and summary["run_id"] and not summary["unsent"]
    # Another password is the same run; what was finished is only registered.
    again = desk.write("far", desk.uri(1), far)
    assert json.loads(desk.run(0, "train", again, "--resume", "--register", "other", "--json").splitlines()[-1]) == summary | {
        "registered": "other:1"
    }

    search = {"trials": 2, "length": [4], "init": ["random"], "slots": 2, "finalists": 1, "seeds": 1}
    near = desk.write("near", desk.uri(0), search=search, serve={"cache_mb": 4, "running": 4})
    desk.run(0, "search", near, "--json")

    # MLflow does not answer, and the run fails.
    lost = desk.write("lost", f"http://me:{PASSWORDS[0]}@127.0.0.1:9")
    with worker_killed(lambda: any((desk.folder / "runs" / "lost").rglob("step-*"))):
        said = desk.run(1, "train", lost, "train.steps=3000", "train.checkpoint_every=2", "compute.max_failures=0")
    assert "http://***@127.0.0.1:9" in said

    tracking = ("--tracking", desk.uri(0))
    for arguments in (
        ("list",), ("show", "near", "--json"), ("export", "near", "plain"), ("export", "near", "merged", "--format", "merged"),
    ):  # fmt: skip
        desk.run(0, "prompts", *arguments, *tracking)
    desk.run(2, "prompts", "show", "nobody", *tracking)
    desk.run(2, "prompts", "list", "--tracking", f"http://me:{PASSWORDS[0]}@127.0.0.1:9")
    assert "***@127.0.0.1" in desk.run(0, "config", near) and "***@tests/runs" in desk.run(0, "config", trained)
    desk.run(2, "train", near, f"tracking.uri={desk.uri(1)}")
    desk.run(2, "submit", "train", near, "--address", "http://127.0.0.1:9", "--dry-run", "--shared", str(desk.folder))
    desk.run(0, "doctor", near)
    _serve(desk, near)
    assert found_in(desk) == {} and desk.wrong == []


def _serve(desk: SimpleNamespace, experiment: str) -> None:
    port = free_port()
    process = desk.start("serve", experiment, f"serve.port={port}")
    url, key, admin = f"http://127.0.0.1:{port}", *VARIABLES["PTUNING_API_KEYS"].removesuffix(" admin").split(",")
    try:
        deadline = time.monotonic() + 120
        while _answer(f"{url}/readyz", None).count('"ready":true') == 0:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.5)
        for path in (
            "/v1/models",
            "/v1/models/near",
            "/v1/models/Near",
            "/metrics",
            "/v1/nowhere",
            "/openapi.json",
            "/-/routes",
        ):
            desk.said += [_answer(url + path, each) for each in (key, admin, None)]
        assert "near:1" in desk.said[-21]
        desk.said.append(_answer(f"{url}/v1/admin/reload", admin, b""))
        desk.run(0, "ask", "near", "the old hammer", "--url", f"{url}/v1", "--json")
        desk.run(2, "ask", "Near", "the old hammer", "--url", f"{url}/v1")
    finally:
        process.send_signal(signal.SIGINT)
        desk.said.append(process.communicate(timeout=200)[0])


def _answer(url: str, key: str | None, body: bytes | None = None) -> str:
    """Headers and body."""
    asked = urllib.request.Request(url, body, {"authorization": f"Bearer {key}"} if key else {})
    try:
        with urllib.request.urlopen(asked, timeout=30) as response:
            return f"{response.headers}{response.read().decode()}"
    except urllib.error.HTTPError as error:
        return f"{error.headers}{error.read().decode()}"
    except OSError:
        return ""
