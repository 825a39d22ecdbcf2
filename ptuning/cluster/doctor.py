"""`ptuning doctor`: checks this machine, or every node of a Ray cluster with a small task on each."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ptuning import storage
from ptuning.cluster import network_check, node_checks
from ptuning.cluster.connection import join_ray
from ptuning.cluster.local_paths import absolute
from ptuning.cluster.node_checks import Finding
from ptuning.config import Experiment
from ptuning.errors import UserError

ANSWER_S = 120.0
"""Seconds in which a node must respond: a new process first imports torch."""
SKEW_S = 2.0
"""Seconds that clocks may differ: promotions are noticed with this delay anyway, and the driver orders events."""


def examine(experiment: Experiment | None, address: str | None) -> list[Finding]:
    """Check this machine or, with `address`, all nodes of that cluster.

    Raises:
        UserError: there is no cluster at that address.
    """
    written = absolute(experiment) if experiment else None
    tables = written.model_dump(mode="json") if written else None
    if address is None:
        findings = [Finding(**fields) for fields in node_checks.check_node(tables)["findings"]]
        return [replace(finding, where="here") for finding in [*findings, _auth(1)]]
    connected_here = join_ray(address, "--address")
    try:
        return list(_cluster(written, tables))
    finally:
        if connected_here:
            ray.shutdown()


@ray.remote(num_cpus=0, max_retries=0)
def _look(tables: dict[str, Any] | None, probe: str | None) -> dict[str, Any]:
    return node_checks.check_node(tables, probe)


@ray.remote(num_cpus=0, max_retries=0)
def _clock() -> float:
    return time.time()


def _cluster(experiment: Experiment | None, tables: dict[str, Any] | None) -> Iterator[Finding]:
    nodes = sorted((node for node in ray.nodes() if node["Alive"]), key=lambda node: str(node["NodeManagerAddress"]))
    names = _names(nodes)
    resources = ray.cluster_resources()
    shown = ", ".join(f"{resources[kind]:g} {kind}" for kind in ("CPU", "GPU") if resources.get(kind))
    yield Finding("ok", "ray", f"{ray.__version__}, {len(nodes)} node{'s' * (len(nodes) > 1)}, {shown}", where="cluster")
    yield replace(_auth(len(nodes)), where="cluster")
    folder = f".doctor-{uuid.uuid4().hex[:12]}"
    asked = {node["NodeID"]: _on(node, _look).remote(tables, f"{folder}/{node['NodeID']}") for node in nodes}
    facts: dict[str, dict[str, Any]] = {}
    for node, answer in asked.items():
        try:
            found = ray.get(answer, timeout=ANSWER_S)
        except Exception as error:  # any error of a node is a finding
            reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
            yield Finding("wrong", "node", reason, "install the same image or packages on it, or restart it", names[node])
            continue
        facts[node] = found["facts"]
        yield from (replace(Finding(**fields), where=names[node]) for fields in found["findings"])
        yield replace(_skew(node, nodes), where=names[node])
    yield from _differences(facts, names)
    if len(facts) == len(nodes):
        yield from _network(nodes)
    if experiment:
        yield from _sharing(experiment, folder, facts, names)


@ray.remote(num_cpus=0, max_restarts=0)
class _Member:
    """One process of the all-gather that is measured."""

    def place(self) -> str:
        return f"{ray.util.get_node_ip_address()}:{network_check.free_port()}"

    def rate(self, rank: int, size: int, address: str, gpu: bool) -> float:
        network_check.join(rank, size, address, gpu)
        return network_check.all_gather_rate()


def _network(nodes: list[dict[str, Any]]) -> Iterator[Finding]:
    """Measures an all-gather between all GPUs of a cluster or, without GPUs, between its nodes."""
    gpus = {node["NodeID"]: int(node["Resources"].get("GPU", 0)) for node in nodes}
    with_gpus = any(gpus.values())
    busy = ray.available_resources().get("GPU", 0) < sum(gpus.values())
    if with_gpus and busy:
        yield Finding("warn", "network", "not measured, GPUs are in use", "run it again when they are free", "cluster")
        return
    many = {node: number for node, number in gpus.items() if number} if with_gpus else dict.fromkeys(gpus, 1)
    size = sum(many.values())
    if size < 2:
        return
    members = [
        _on({"NodeID": node}, _Member, num_gpus=int(with_gpus)).remote() for node, number in many.items() for _ in range(number)
    ]
    try:
        address = ray.get(members[0].place.remote(), timeout=ANSWER_S)
        answers = [member.rate.remote(rank, size, address, with_gpus) for rank, member in enumerate(members)]
        yield network_check.judge(ray.get(answers, timeout=ANSWER_S), max(many.values()), len(many), with_gpus)
    except Exception as error:  # any error is a finding
        reason = str(error).strip().splitlines()[-1][:200] if str(error).strip() else type(error).__name__
        fix = "open all ports between the nodes, or set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to their network interface"
        yield Finding("wrong", "network", f"workers cannot exchange data ({reason})", fix, "cluster")
    finally:
        for member in members:
            ray.kill(member)


def _on(node: dict[str, Any], what: Any, **options: Any) -> Any:
    return what.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False), **options)


def _names(nodes: list[dict[str, Any]]) -> dict[str, str]:
    """The name of a node: its address; for several nodes on one machine also the start of their id."""
    addresses = [str(node["NodeManagerAddress"]) for node in nodes]
    return {
        node["NodeID"]: address if addresses.count(address) == 1 else f"{address}/{node['NodeID'][:6]}"
        for node, address in zip(nodes, addresses, strict=True)
    }


def _skew(node: str, nodes: list[dict[str, Any]]) -> Finding:
    """Clock difference, measured by a task on a running process; half of the round trip is the uncertainty."""
    [there] = [each for each in nodes if each["NodeID"] == node]
    before = time.time()
    try:
        found = float(ray.get(_on(there, _clock).remote(), timeout=ANSWER_S))
    except Exception as error:
        return Finding("wrong", "clock", f"does not respond ({type(error).__name__})", "restart the node")
    after = time.time()
    skew = found - (before + after) / 2
    certain = max(0.0, abs(skew) - (after - before) / 2)
    text = f"differs by {certain:.1f} s from this machine" if certain > 0.05 else "as on this machine"
    return Finding("warn", "clock", text, "run a time service (chrony)") if certain > SKEW_S else Finding("ok", "clock", text)


def _differences(facts: dict[str, dict[str, Any]], names: dict[str, str]) -> Iterator[Finding]:
    """Checks of what must be equal on all nodes: versions, and the base's files."""
    for fact in sorted({name for each in facts.values() for name in each}):
        values = {node: each.get(fact) for node, each in facts.items()}
        if len(set(values.values())) > 1:
            said = ", ".join(f"{names[node]} {str(value)[:20]}" for node, value in values.items())
            yield Finding("wrong", fact, f"differs between nodes: {said}", "install the same version on all nodes", "cluster")


def _sharing(experiment: Experiment, folder: str, facts: dict[str, Any], names: dict[str, str]) -> Iterator[Finding]:
    """Checks that all nodes share the storage: this machine must see the files that each node wrote."""
    store = experiment.compute.storage
    place = storage.join(store, folder)
    try:
        unseen = [names[node] for node in facts if not storage.exists(place, node)]
        storage.delete_folder(place)
    except (UserError, OSError) as error:
        yield Finding("wrong", "shared storage", str(error), "choose another folder", "cluster")
        return
    if unseen and len(facts) > 1:
        yield Finding(
            "wrong",
            "shared storage",
            f"files that {', '.join(unseen)} wrote to {store} are not visible here",
            "set compute.storage to a shared folder or s3://...",
            "cluster",
        )
    elif len(facts) > 1:
        yield Finding("ok", "shared storage", f"every node sees {store}", where="cluster")
    if len({node_name.split("/")[0] for node_name in names.values()}) > 1 and not (experiment.tracking.uri or "").startswith(
        "http"
    ):
        yield Finding(
            "warn", "mlflow", "a file on one machine", "replicas on other nodes need tracking.uri, an MLflow server", "cluster"
        )


def _auth(nodes: int) -> Finding:
    mode = os.environ.get("RAY_AUTH_MODE", "")
    if mode == "token" or (not mode and nodes == 1):
        return Finding("ok", "ray auth", "token" if mode else "default: clusters on this machine create their own token")
    text = f"RAY_AUTH_MODE is {mode or 'not set'}"
    return Finding(
        "warn", "ray auth", text, "set RAY_AUTH_MODE=token and one token on all nodes; Ray runs any code it receives"
    )
