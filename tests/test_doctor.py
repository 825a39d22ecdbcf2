"""The doctor on real machines: this one by the command itself, and a Ray cluster of two nodes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import REPOSITORY

from ptuning.cluster import doctor, node_checks
from ptuning.cluster.local_paths import absolute
from ptuning.cluster.node_checks import check_node
from ptuning.config import parse_experiment
from ptuning.errors import UserError

Write = Callable[..., Path]


def everything(*arguments: str, cwd: Path = REPOSITORY) -> list[dict[str, Any]]:
    """All that the command finds."""
    done = subprocess.run(
        [sys.executable, "-m", "ptuning", "doctor", *arguments, "--json"], capture_output=True, text=True, cwd=cwd, timeout=200
    )
    assert "Traceback" not in done.stderr, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["ok"] == (done.returncode == 0)
    return list(found["findings"])


def command(*arguments: str, cwd: Path = REPOSITORY) -> tuple[bool, dict[str, dict[str, Any]]]:
    """Whether nothing is wrong, and what is found of what."""
    findings = everything(*arguments, cwd=cwd)
    return all(finding["state"] != "wrong" for finding in findings), {finding["what"]: finding for finding in findings}


def closed_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def found_in(tables: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What is found here, in this process."""
    findings = check_node(absolute(parse_experiment(tables)).model_dump(mode="json"))["findings"]
    return {finding["what"]: finding for finding in findings}


@pytest.mark.cluster
def test_this_machine_is_fine(toy_task: SimpleNamespace, write_toml: Write, tmp_path: Path) -> None:
    fine, found = command(str(write_toml(toy_task.experiment)), cwd=tmp_path)
    assert fine
    assert {"python", "packages", "compiler", "gpus", "memory", "storage", "mlflow", "base", "ray auth"} <= set(found)
    assert all(finding["state"] != "wrong" for finding in found.values())
    assert found["base"]["state"] == found["storage"]["state"] == found["ray auth"]["state"] == "ok"
    assert not (tmp_path / "runs").exists()  # it looks, it leaves nothing


@pytest.mark.cluster
def test_everything_wrong_has_a_line_and_a_fix(toy_task: SimpleNamespace, write_toml: Write, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    tables = toy_task.experiment
    tables["compute"]["storage"] = f"{tmp_path}/file/runs"
    tables["tracking"] = {"uri": f"http://127.0.0.1:{closed_port()}"}
    tables["model"]["path"] = f"{tmp_path}/no-base"
    fine, found = command(str(write_toml(tables)))
    assert not fine
    wrong = {what for what, finding in found.items() if finding["state"] == "wrong"}
    assert wrong == {"storage", "mlflow", "base"}
    assert f"({tmp_path}/file is a file)" in found["storage"]["text"] and found["storage"]["fix"] == "choose another folder"
    assert "does not respond" in found["mlflow"]["text"] and "start the server" in found["mlflow"]["fix"]
    assert "is neither an existing folder nor" in found["base"]["text"] and found["base"]["fix"] == "correct the path"


@pytest.mark.fast
def test_a_package_that_is_too_old_or_missing_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    # What is installed is what it is: the requirement is changed instead.
    monkeypatch.setattr(
        metadata, "requires", lambda name: ["numpy>=1.26", "torch>=99", "nowhere-to-be-found", "peft; extra == 'x'"]
    )
    [finding] = node_checks.versions()
    assert finding.state == "wrong" and finding.fix == "pip install -c constraints.txt ptuning"
    assert finding.text == f"torch {metadata.version('torch')} is not >=99, nowhere-to-be-found is missing"


@pytest.mark.fast
def test_versions_that_were_not_tested_are_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [finding.state for finding in node_checks.versions()] == ["ok"]
    monkeypatch.setattr(node_checks, "pins", lambda: {"numpy": "0.1"})
    [finding] = node_checks.versions()
    assert finding.state == "warn" and finding.text.startswith("numpy ") and "(tested: 0.1)" in finding.text


@pytest.mark.fast
def test_the_tested_versions_are_those_of_the_constraints() -> None:
    pins = node_checks.pins()
    assert pins["ray"] == metadata.version("ray") and len(pins) > 100


@pytest.mark.fast
def test_nobody_at_the_address_is_an_error_of_the_user() -> None:
    with pytest.raises(UserError, match="--address: no response from 127.0.0.1:.*; start the cluster, or correct it"):
        doctor.examine(None, f"127.0.0.1:{closed_port()}")


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[str]:
    from ray.cluster_utils import Cluster

    before = dict(os.environ)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        yield cluster.address
    finally:
        cluster.shutdown()
        os.environ.clear()
        os.environ.update(before)


@pytest.mark.cluster
@pytest.mark.nightly
@pytest.mark.slow
def test_every_node_of_a_cluster_is_looked_at(
    two_nodes: str, toy_task: SimpleNamespace, write_toml: Write, tmp_path: Path
) -> None:
    findings = everything(str(write_toml(toy_task.experiment)), "--address", two_nodes)
    nodes = {finding["where"] for finding in findings} - {"cluster"}
    assert len(nodes) == 2
    assert [finding["text"] for finding in findings if finding["state"] == "wrong"] == []
    for what in ("python", "packages", "memory", "clock", "storage", "mlflow", "base"):
        assert sum(finding["what"] == what and finding["where"] in nodes for finding in findings) == 2
    [ray_line] = [finding for finding in findings if finding["what"] == "ray"]
    assert "2 nodes, 2 CPU" in ray_line["text"]
    [network] = [finding for finding in findings if finding["what"] == "network"]
    assert "GB/s per worker in an all-gather of 2 processes on 2 nodes" in network["text"]
    [shared] = [finding for finding in findings if finding["what"] == "shared storage"]
    assert shared["state"] == "ok" and list((tmp_path / "runs").iterdir()) == []
    # The same with a storage that nobody can write, and a base that nobody has.
    (tmp_path / "file").write_text("")
    toy_task.experiment["compute"]["storage"] = f"{tmp_path}/file/runs"
    toy_task.experiment["model"]["path"] = f"{tmp_path}/no-base"
    findings = everything(str(write_toml(toy_task.experiment)), "--address", two_nodes)
    for what in ("storage", "base"):
        assert sum(finding["what"] == what and finding["state"] == "wrong" for finding in findings) == 2


@pytest.mark.fast
def test_a_folder_that_nodes_do_not_share_is_wrong(toy_task: SimpleNamespace, tmp_path: Path) -> None:
    experiment = parse_experiment(toy_task.experiment)
    folder = Path(experiment.compute.storage) / ".doctor-x"
    folder.mkdir(parents=True)
    (folder / "one").write_text("ok")
    [finding, *_] = doctor._sharing(experiment, ".doctor-x", {"one": {}, "two": {}}, {"one": "10.0.0.1", "two": "10.0.0.2"})
    assert finding.state == "wrong" and "files that 10.0.0.2 wrote to" in finding.text and not folder.exists()


@pytest.mark.fast
def test_nodes_that_differ_are_named() -> None:
    facts = {"one": {"torch": "2.13.0", "base": "aa"}, "two": {"torch": "2.12.0", "base": "aa"}}
    [finding] = doctor._differences(facts, {"one": "10.0.0.1", "two": "10.0.0.2"})
    assert finding.what == "torch" and finding.text == "differs between nodes: 10.0.0.1 2.13.0, 10.0.0.2 2.12.0"
