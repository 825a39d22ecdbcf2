"""A cluster without workers whose autoscaler starts nodes: every command waits for them, and they end again.

Nodes are raylets on this machine, by Ray's fake provider, with Ray's own autoscaler (version 2) behind it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import requests
from conftest import toy_rows
from test_tracking import free_port

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.nightly]

Write = Callable[..., Path]

HEAD = "f" * 51 + "00000"
"""The id that the fake provider expects of the head node."""
NODES, CPUS = 2, 2
"""Nodes that the autoscaler may start, and CPUs of each."""


@pytest.fixture(scope="module")
def growing() -> Iterator[SimpleNamespace]:
    """A head node without CPUs, and its autoscaler."""
    port = free_port()
    address = f"127.0.0.1:{port}"
    with tempfile.TemporaryDirectory(prefix="pt-") as folder:  # short: sockets lie in it
        config = Path(folder, "autoscaler.json")
        config.write_text(json.dumps(autoscaler_config(address)), encoding="utf-8")
        variables = {"RAY_AUTH_MODE": "disabled", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0", "RAY_raylet_start_wait_time_s": "120"}
        variables |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1"}  # loopback only
        own = {"AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1", "RAY_enable_autoscaler_v2": "1"}
        own |= {"RAY_CLOUD_INSTANCE_ID": HEAD, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD}
        plain = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        ray_command = str(Path(sys.executable).with_name("ray"))
        command = [ray_command, "start", "--head", f"--port={port}", "--node-ip-address=127.0.0.1", "--num-cpus=0", "--block"]
        command += [f"--autoscaling-config={config}", f"--temp-dir={folder}/ray", "--include-dashboard=false"]
        with Path(folder, "head.log").open("wb") as log:
            head = subprocess.Popen(command, env=plain | variables | own, stdout=log, stderr=subprocess.STDOUT)
        try:
            yield SimpleNamespace(address=address, environment=plain | variables, ready=wait_until_ready(address, variables))
        finally:
            for each in [*psutil.Process(head.pid).children(recursive=True), psutil.Process(head.pid)]:
                each.kill()
            head.wait(30)


def autoscaler_config(address: str) -> dict[str, Any]:
    # The type `fake_multinode` reads a file that Ray's wheels lack (2.60).
    provider = {"type": "external", "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"}
    provider |= {"head_node_id": HEAD, "launch_multiple": True, "gcs_address": address, "disable_node_updaters": True}
    empty = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
    types = {
        "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "worker": {
            "resources": {"CPU": CPUS, "object_store_memory": 100_000_000},
            "node_config": {},
            "min_workers": 0,
            "max_workers": NODES,
        },
    }
    return {
        "cluster_name": "growing",
        "max_workers": NODES,
        "idle_timeout_minutes": 0.1,
        "provider": provider,
        "auth": {},
        "available_node_types": types,
        "head_node_type": "ray.head.default",
        "upscaling_speed": 1,
        **{f"{each}_commands": [] for each in empty},
        **dict.fromkeys(("cluster_synced_files", "rsync_exclude", "rsync_filter"), []),
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        "docker": {},
    }


def wait_until_ready(address: str, variables: dict[str, str]) -> bool:
    command = [sys.executable, "-c", f"import ray; ray.init('{address}', log_to_driver=False); print(ray.cluster_resources())"]
    for _ in range(20):
        done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, timeout=90)
        if not done.returncode:
            return True
        time.sleep(2)
    raise AssertionError(done.stderr)


def cpus(growing: SimpleNamespace) -> float:
    """CPUs of the cluster, asked by a process that ends."""
    code = f"import ray; ray.init('{growing.address}', log_to_driver=False); print(ray.cluster_resources().get('CPU', 0))"
    done = subprocess.run([sys.executable, "-c", code], env=growing.environment, capture_output=True, text=True, timeout=90)
    return float(done.stdout)


def nodes_end(growing: SimpleNamespace) -> bool:
    until = time.monotonic() + 120
    while cpus(growing) and time.monotonic() < until:
        time.sleep(2)
    return not cpus(growing)


def run(growing: SimpleNamespace, *arguments: str, seconds: float = 300) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ptuning", *arguments]
    return subprocess.run(command, env=growing.environment, capture_output=True, text=True, timeout=seconds)


def test_train_predict_search_from_nothing(growing: SimpleNamespace, toy_task: SimpleNamespace, write_toml: Write) -> None:
    tables = toy_task.experiment
    tables["compute"] |= {"address": growing.address, "workers": 2}
    tables["search"] = {"trials": 2, "finalists": 1, "seeds": 1, "length": [4]}
    file = str(write_toml(tables))
    runs = tables["compute"]["storage"]

    assert cpus(growing) == 0
    trained = run(growing, "train", file, "--register", "toy", "--json")
    assert trained.returncode == 0, trained.stderr
    assert "waiting for 2 CPU, at most 900 s (compute.wait_s): the cluster has 0" in trained.stderr
    assert json.loads(trained.stdout.splitlines()[-1])["steps"] == 20
    assert nodes_end(growing)

    table = toy_task.folder / "rows.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in toy_rows(20, 5)), encoding="utf-8")
    output = toy_task.folder / "out.jsonl"
    more = ["--storage", runs, "--address", growing.address, "--json"]
    predicted = run(growing, "predict", "toy", str(table), "-o", str(output), *more)
    assert predicted.returncode == 0, predicted.stderr
    assert "waiting for 1 CPU" in predicted.stderr and len(output.read_text(encoding="utf-8").splitlines()) == 20
    assert nodes_end(growing)

    searched = run(growing, "search", file, "name=searched", "compute.workers=1", "--json")
    assert searched.returncode == 0, searched.stderr
    assert "waiting for 1 CPU" in searched.stderr
    assert nodes_end(growing)


def test_serve_from_nothing_and_to_nothing(growing: SimpleNamespace, toy_task: SimpleNamespace, write_toml: Write) -> None:
    port = free_port()
    tables = toy_task.experiment
    tables["compute"] |= {"address": growing.address}
    tables["serve"] = {"replicas": [0, 1], "idle_s": 2, "port": port}
    command = [sys.executable, "-m", "ptuning", "serve", str(write_toml(tables)), "--insecure"]
    server = subprocess.Popen(command, env=growing.environment, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    try:
        lines = iter(server.stderr.readline, "")
        seen = []
        for line in lines:
            seen.append(line)
            if "0 replicas, the next request starts one" in line:
                break
        assert any("waiting for 1 CPU" in line for line in seen) and any("serving at" in line for line in seen), seen
        assert nodes_end(growing), "without requests there is neither a replica nor a node"
        body = {"model": tables["model"]["path"].rsplit("/", 1)[-1], "prompt": "a", "max_tokens": 2}
        answer = requests.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=150)
        assert answer.status_code == 200, answer.text  # it was held until the first replica was there
    finally:
        server.terminate()
        server.communicate(timeout=120)
    assert server.returncode == 0


REFUSED = """
import sys, time, ray
from ptuning.cluster import resources
from ptuning.errors import UserError
ray.init(sys.argv[1], log_to_driver=False)
for many, wait_s in ((5, 60), (4, 0.1)):
    began = time.monotonic()
    try:
        resources.await_resources(many, {"CPU": 1}, f"compute.workers: {many} workers", {"CPU": "use fewer"}, wait_s, print)
    except UserError as error:
        print("REFUSED", time.monotonic() - began < 5, error)
"""


def test_more_than_can_ever_be_is_refused_at_once(growing: SimpleNamespace) -> None:
    """In a process of its own: this one may be connected to the cluster of other tests."""
    command = [sys.executable, "-c", REFUSED, growing.address]
    done = subprocess.run(command, env=growing.environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    first, second = [line for line in done.stdout.splitlines() if line.startswith("REFUSED")]
    assert "REFUSED True" in first and "5 workers with 1 CPU each need 5, more than the cluster's autoscaler can start" in first
    assert re.search(r"4 workers with 1 CPU each need 4, the cluster has \d after 0.1 s; see why with", second)


def test_workers_are_added_when_nodes_come(growing: SimpleNamespace, toy_task: SimpleNamespace, write_toml: Write) -> None:
    tables = toy_task.experiment
    tables["train"] |= {"steps": 4000, "evaluate_every": 4000, "checkpoint_every": 20}
    tables["compute"] |= {"address": growing.address, "workers": [1, 2], "cpus_per_worker": 2}
    done = run(growing, "train", str(write_toml(tables)), seconds=600)
    assert done.returncode == 0, done.stderr
    assert re.search(r"2 workers", done.stderr), done.stderr
