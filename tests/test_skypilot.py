"""cluster/skypilot.yaml: its fields, its ports beside those of SkyPilot's own Ray, and its script, run as two nodes."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import REPOSITORY
from test_cluster import check_command, shell
from test_tracking import free_port

FILE = REPOSITORY / "cluster" / "skypilot.yaml"
TASK: dict[str, Any] = yaml.safe_load(FILE.read_text(encoding="utf-8"))
PORTS = {name: TASK["envs"][f"PTUNING_{name}_PORT"] for name in ("RAY", "DASHBOARD", "AGENT")}

FIELDS: dict[str, Any] = {
    "name": str,
    "num_nodes": int,
    "resources": {
        "accelerators": str,
        "disk_size": int,
        "autostop": {"idle_minutes": int, "down": bool},
    },
    "workdir": str,
    "file_mounts": dict,
    "envs": dict,
    "setup": str,
    "run": str,
}
"""Those of its task schema (SkyPilot 0.14.1, `sky/utils/schemas.py`) that the file uses. Maps contain strings only."""

THEIRS = {"6380", "8266", "52365"}
"""Ports of SkyPilot's own Ray: `sky/skylet/constants.py`, and the agent's default."""


def unlike(value: Any, kind: Any, path: str = "") -> Iterator[str]:
    """Fields that are not in the table, or of another type."""
    if isinstance(kind, dict):
        for name, each in value.items():
            if name in kind:
                yield from unlike(each, kind[name], f"{path}.{name}")
            else:
                yield f"{path}.{name}: unknown"
    elif type(value) is not kind or (kind is dict and not all(isinstance(each, str) for each in value.values())):
        yield f"{path}: {value!r}"


@pytest.mark.fast
def test_it_has_the_fields_of_a_task() -> None:
    assert list(unlike(TASK, FIELDS)) == []
    assert list(unlike(TASK | {"num_node": 2}, FIELDS)) == [".num_node: unknown"]
    assert list(unlike(TASK | {"envs": {"PORT": 6379}}, FIELDS)) == [".envs: {'PORT': 6379}"]


@pytest.mark.fast
def test_skypilot_takes_it() -> None:
    """SkyPilot 0.14 needs an older click than constraints.txt names, so this is for an environment of its own."""
    schemas = pytest.importorskip("sky.utils.schemas", reason="skypilot is not installed")
    import jsonschema

    jsonschema.validate(TASK, schemas.get_task_schema())
    jsonschema.validate(TASK["resources"], schemas.get_resources_schema())


@pytest.mark.fast
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning:mlflow.*", "ignore:.*type hint:UserWarning")
def test_its_commands_are_understood_and_leave_the_other_ray_alone() -> None:
    assert not THEIRS & set(PORTS.values()) and len(set(PORTS.values())) == 3
    script = re.sub(r"<< 'PYTHON'.*?\nPYTHON\n", "\n", TASK["run"], flags=re.DOTALL)
    starts = [words for line in re.findall(r"ray start .*?--block", script, re.DOTALL) for words in shell(line)]
    assert len(starts) == 2
    for words in starts:
        check_command(words)
        assert "--dashboard-agent-listen-port=1" in words and "--block" in words
    assert "ray stop" not in script and "auto" not in script and "pkill" not in script
    assert "--dashboard-host=127.0.0.1" in script and "RAY_AUTH_MODE=token" in script
    check_command(["ptuning", *TASK["envs"]["COMMAND"].split()])
    assert "uv pip install -c constraints.txt ." in TASK["setup"]


@pytest.mark.fast
@pytest.mark.parametrize("part", ["setup", "run"])
def test_its_scripts_parse(part: str, tmp_path: Path) -> None:
    file = tmp_path / part
    file.write_text(f"#!/usr/bin/env bash\n{TASK[part]}", encoding="utf-8")
    subprocess.run(["bash", "-n", file], check=True)
    if shutil.which("shellcheck"):
        # The command is several words; the activation script is not there yet.
        done = subprocess.run(["shellcheck", "-e", "SC2086,SC1090,SC1091", file], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_two_nodes_run_the_command_and_end(tmp_path: Path) -> None:
    """The script of the file, started as SkyPilot does. The run needs both nodes; the head ends with the command's code."""
    activate = tmp_path / "ptuning" / "bin" / "activate"
    activate.parent.mkdir(parents=True)
    activate.write_text(f"export PATH={Path(sys.executable).parent}:$PATH\n", encoding="utf-8")
    (tmp_path / ".ptuning").mkdir()
    (tmp_path / ".ptuning" / "ray_token").write_text("a" * 64, encoding="utf-8")
    (tmp_path / "jobs").symlink_to(REPOSITORY / "jobs")
    short = tempfile.mkdtemp(prefix="sky-", dir="/tmp")  # it contains sockets
    cpus = len(os.sched_getaffinity(0))
    command = (
        f"train jobs/sentiment.toml train.steps=2 train.evaluate_every=2 compute.workers={2 * cpus} train.batch_size={2 * cpus}"
    )
    shared = {"PTUNING_RAY_PORT": str(free_port()), "PTUNING_DASHBOARD_PORT": str(free_port()), "COMMAND": command}
    nodes = [node(rank, tmp_path, shared | {"RAY_TMPDIR": short}) for rank in (0, 1)]
    try:
        ended = [each.wait(timeout=800) for each in nodes]
    finally:
        for each in nodes:
            if each.poll() is None:
                os.killpg(each.pid, signal.SIGKILL)
        shutil.rmtree(short, ignore_errors=True)
    said = (tmp_path / "0.log").read_text(encoding="utf-8")
    assert ended == [0, 0] and "sentiment: test accuracy" in said, said


def node(rank: int, home: Path, more: dict[str, str]) -> subprocess.Popen[bytes]:
    """One of SkyPilot's nodes: the script, with the variables that it sets."""
    environment = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "RAY_AUTH_MODE")}
    environment |= more | {
        "HOME": str(home),
        "PTUNING_AGENT_PORT": str(free_port()),
        "SKYPILOT_NODE_RANK": str(rank),
        "SKYPILOT_NODE_IPS": "127.0.0.1\n127.0.0.1",
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NUM_GPUS_PER_NODE": "0",
    }
    with (home / f"{rank}.log").open("wb") as log:
        return subprocess.Popen(
            ["bash", "-c", TASK["run"]], cwd=home, env=environment, stdout=log, stderr=log, start_new_session=True
        )
