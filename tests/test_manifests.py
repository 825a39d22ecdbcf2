"""Every manifest in cluster/ has only fields that its kind has, of their types: as files, and as kustomize builds them."""

from __future__ import annotations

import copy
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_cluster import BUILDER, KUBERAY, OVERLAYS, builder, documents, of_kind

pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed: it comes with the extra `test`")

from support.crds import GROUPS, faults  # noqa: E402

pytestmark = pytest.mark.fast

FILES = [
    pytest.param(path, document, id=f"{path.relative_to(KUBERAY)}: {document['kind']}")
    for path in sorted(KUBERAY.rglob("*.yaml"))
    if path.name != "kustomization.yaml"
    for document in documents(path)
    if isinstance(document, dict)
]
"""Objects, and patches of objects. Lists are operations of kustomize: what they make is checked as it is built."""


@pytest.mark.parametrize(("path", "document"), FILES)
def test_a_file_has_known_fields_only(path: Path, document: dict[str, Any]) -> None:
    # A RayService gets its nodes when kustomize builds it.
    assert faults(document, whole=document["kind"] != "RayService") == []


@builder
@pytest.mark.parametrize("folder", OVERLAYS, ids=lambda folder: folder.name)
def test_what_is_built_is_what_the_operators_take(folder: Path) -> None:
    built = subprocess.run([*BUILDER, folder], capture_output=True, text=True, check=True).stdout
    found = list(yaml.safe_load_all(built))
    assert {"Namespace", "NetworkPolicy", "Deployment", "StatefulSet", "Service"} < {one["kind"] for one in found}
    assert {f"{one['kind']}/{one['metadata']['name']}": faults(one) for one in found if faults(one)} == {}


def cluster(change: str, value: Any) -> dict[str, Any]:
    """The RayCluster with one field set or, by None, removed. `change`: its path, as a/0/b."""
    [manifest] = of_kind("RayCluster")
    changed = copy.deepcopy(manifest)
    *parents, last = [int(key) if key.isdigit() else key for key in change.split("/")]
    node: Any = changed
    for key in parents:
        node = node[key]
    if value is None:
        del node[last]
    else:
        node[last] = value
    return changed


@pytest.mark.parametrize(
    ("change", "value", "said"),
    [
        ("spec/rayVersoin", "2.60.0", "spec.rayVersoin: unknown field"),
        ("spec/headGroupSpec", None, "spec.headGroupSpec: missing"),
        ("spec/enableInTreeAutoscaling", "true", "spec.enableInTreeAutoscaling: 'true' is not of type bool"),
        ("spec/authOptions/mode", "tokens", "spec.authOptions.mode: 'tokens' is not disabled or token"),
        ("spec/workerGroupSpecs/0/replicas", "2", "spec.workerGroupSpecs[0].replicas: '2' is not of type int"),
        ("spec/workerGroupSpecs/0/groupname", "w", "spec.workerGroupSpecs[0].groupname: unknown field"),
        ("spec/headGroupSpec/rayStartParams/num-cpus", 0, "spec.headGroupSpec.rayStartParams: "),
        ("spec/headGroupSpec/template/spec/container", [], "spec.headGroupSpec.template: template.spec: Additional"),
        (
            "spec/headGroupSpec/template/spec/containers/0/env/0/value",
            1,
            "spec.headGroupSpec.template: template.spec.containers.0.env.0.value: 1 is not of type 'string'",
        ),
        ("metadata/label", {}, "metadata: Additional properties are not allowed ('label' was unexpected)"),
        ("status", {}, "status: unknown field"),
        ("kind", "RayClusters", "ray.io/v1 has no kind RayClusters"),
    ],
)
def test_a_mistake_is_found(change: str, value: Any, said: str) -> None:
    fault, *_ = faults(cluster(change, value))  # the same environment is in several pods
    assert fault.startswith(said)


def test_a_mistake_in_an_object_of_kubernetes_is_found() -> None:
    policy = copy.deepcopy(of_kind("NetworkPolicy")[-1])
    policy["spec"]["ingres"] = policy["spec"].pop("ingress")
    [fault] = faults(policy)
    assert fault == "spec: Additional properties are not allowed ('ingres' was unexpected)"


def test_every_kind_of_the_tables_is_used() -> None:
    used = {(document["apiVersion"], document["kind"]) for document in (each.values[1] for each in FILES)}
    assert {(version, kind) for version, kinds in GROUPS.items() for kind in kinds} <= used
