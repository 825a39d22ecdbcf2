"""What the manifests in cluster/kuberay mean: who reaches whom, when something runs, and whether a queue has room."""

from __future__ import annotations

import subprocess
import zoneinfo
from typing import Any

import pytest
import yaml
from test_cluster import BUILDER, KUBERAY, builder, documents, jobs, of_kind

pytestmark = pytest.mark.fast

NODES: dict[str, dict[str, str]] = {
    "head": {"ray.io/node-type": "head"},
    "worker": {"ray.io/node-type": "worker"},
    "serving worker": {"ray.io/node-type": "worker", "ray.io/serve": "true"},
    "head of a service": {"ray.io/node-type": "head", "ray.io/serve": "false"},
}
"""The labels that KubeRay gives to the nodes, without `ray.io/is-ray-node`, which all have."""

INSIDE, OPERATOR, OUTSIDE = "a pod of the namespace", "the operator", "a pod of another namespace"


def reached(labels: dict[str, str]) -> set[tuple[str, int | None]]:
    """Who may connect to a pod, and to which port; None is any port."""
    found: set[tuple[str, int | None]] = set()
    for policy in of_kind("NetworkPolicy"):
        wanted = policy["spec"]["podSelector"].get("matchLabels", {})
        if not wanted.items() <= labels.items():
            continue
        for rule in policy["spec"].get("ingress", []):
            ports = [port["port"] for port in rule.get("ports", [])] or [None]
            found |= {(who, port) for source in rule["from"] for who in _who(source) for port in ports}
    return found


def _who(source: dict[str, Any]) -> set[str]:
    pods = source.get("podSelector", {}).get("matchLabels")
    if "namespaceSelector" in source:
        assert source["namespaceSelector"] == {}
        return {INSIDE, OPERATOR, OUTSIDE} if pods is None else {OPERATOR}
    return {INSIDE} if pods is None else {",".join(pods)}


@pytest.mark.parametrize(
    ("node", "ports"),
    [
        ("head", {INSIDE: {8265, 8000}, OPERATOR: {8265, 8000}, OUTSIDE: {8000}}),
        ("head of a service", {INSIDE: {8265, 8000}, OPERATOR: {8265, 8000}, OUTSIDE: {8000}}),
        ("worker", {}),
        ("serving worker", {INSIDE: {8000}, OPERATOR: {8000}, OUTSIDE: {8000}}),
    ],
)
def test_each_group_of_nodes_is_reached_as_it_has_to_be(node: str, ports: dict[str, set[int]]) -> None:
    found = reached(NODES[node] | {"ray.io/is-ray-node": "yes"})
    wanted = {(who, port) for who, each in ports.items() for port in each}
    assert found == wanted | {("ray.io/is-ray-node", None)}


def test_every_pod_that_is_no_node_of_ray_has_its_policy() -> None:
    apps = [each["spec"]["template"]["metadata"]["labels"] for kind in ("Deployment", "StatefulSet") for each in of_kind(kind)]
    assert len(apps) == 3
    for labels in apps:
        assert reached(labels) and not {INSIDE, OPERATOR, OUTSIDE} & {who for who, _ in reached(labels)}


@pytest.mark.parametrize("manifest", of_kind("RayCronJob"), ids=lambda manifest: manifest["metadata"]["name"])
def test_a_cron_job_is_one_that_kuberay_accepts(manifest: dict[str, Any]) -> None:
    """The rules of KubeRay 1.7.0 (`ValidateRayCronJobSpec`, `validateDeletionRules`) that a schema does not contain."""
    spec = manifest["spec"]
    minute, hour, day, month, weekday = spec["schedule"].split()
    assert 0 <= int(minute) < 60 and 0 <= int(hour) < 24 and day == month == "*"
    assert weekday == "*" or 0 <= int(weekday) < 7
    assert spec["timeZone"] in zoneinfo.available_timezones()
    job = spec["jobTemplate"]
    assert job["clusterSelector"] and not {"shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "backoffLimit"} & set(job)
    rules = job["deletionStrategy"]["deletionRules"]
    assert {rule["policy"] for rule in rules} == {"DeleteSelf"}, "the permanent cluster stays"
    assert sorted(rule["condition"]["jobStatus"] for rule in rules) == ["FAILED", "SUCCEEDED"]
    # No concurrencyPolicy there: what still runs when the next one begins would share the cluster with it.
    assert job["activeDeadlineSeconds"] < 86_400 * (1 if weekday == "*" else 7)


def test_nothing_that_is_repeated_writes_to_the_same_name() -> None:
    repeated = [job["entrypoint"] for job in jobs() if "deletionStrategy" in job]
    assert len(repeated) == 2
    for entrypoint in repeated:
        [written] = [word for word in (" -o ", " name=") if word in entrypoint]
        assert "$(date " in entrypoint.partition(written)[2].split(" ", 1)[0] + " ", entrypoint


def requested(nodes: dict[str, Any], resource: str) -> float:
    """What a group's pods request together."""
    [container] = nodes["template"]["spec"]["containers"]
    text = str(container["resources"]["requests"][resource])
    return float(text.removesuffix("Gi")) * nodes.get("replicas", 1)


@builder
@pytest.mark.parametrize(
    ("name", "label", "kind"),
    [("kueue", "kueue.x-k8s.io/queue-name", "LocalQueue"), ("volcano", "volcano.sh/queue-name", "Queue")],
)
def test_a_queue_has_room_for_its_cluster(name: str, label: str, kind: str) -> None:
    folder = KUBERAY / "overlays" / name
    built = subprocess.run([*BUILDER, folder], capture_output=True, text=True, check=True).stdout
    [cluster] = [one for one in yaml.safe_load_all(built) if one["kind"] == "RayCluster"]
    [file] = folder.glob("queue*.yaml")
    queues = {one["kind"]: one for one in documents(file)}
    assert cluster["metadata"]["labels"][label] == queues[kind]["metadata"]["name"]
    if kind == "LocalQueue":
        assert queues["LocalQueue"]["metadata"]["namespace"] == cluster["metadata"]["namespace"]
        assert queues["LocalQueue"]["spec"]["clusterQueue"] == queues["ClusterQueue"]["metadata"]["name"]
        [group] = queues["ClusterQueue"]["spec"]["resourceGroups"]
        [flavor] = group["flavors"]
        assert flavor["name"] == queues["ResourceFlavor"]["metadata"]["name"]
        assert group["coveredResources"] == [each["name"] for each in flavor["resources"]]
        room = {each["name"]: each["nominalQuota"] for each in flavor["resources"]}
        assert cluster["spec"]["enableInTreeAutoscaling"] is False and "suspend" not in cluster["spec"]
    else:
        assert cluster["metadata"]["labels"]["ray.io/scheduler-name"] == "volcano"
        room = queues["Queue"]["spec"]["capability"]
    groups = [cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]]
    for resource, quota in room.items():
        assert sum(requested(group, resource) for group in groups) <= float(quota.removesuffix("Gi")), resource
