"""Custom resources in `cluster/`: which fields they have, and of which types. What is not written here is an error.

Kubernetes' own objects have published schemas (kubernetes-validate). Those of these operators are in no package, so this is a
table of the fields that the manifests may set, read from the Go types:

* `ray.io/v1`: KubeRay 1.7.0, `ray-operator/apis/ray/v1/*_types.go`
* `kueue.x-k8s.io/v1beta2`: Kueue, `apis/kueue/v1beta2/*_types.go` at 6c10183 (its only version since 0.20)
* `scheduling.volcano.sh/v1beta1`: Volcano, `staging/src/volcano.sh/apis/pkg/apis/scheduling/v1beta1/types.go` at 0e30546

A type is a Python type, a tuple of words, a list of one type, the name of a table, or a function that puts the value into an
object of Kubernetes. `dict` is a map of strings. A star marks a field that must be there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import kubernetes_validate

KUBERNETES = kubernetes_validate.latest_version()


def template(value: Any) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "PodTemplate", "template": value}


def container(field: str) -> Callable[[Any], dict[str, Any]]:
    return lambda value: template({"spec": {"containers": [{"name": "container", field: value}]}})


def selector(value: Any) -> dict[str, Any]:
    return {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "spec": {"podSelector": value}}


QUANTITY = "quantity"

TABLES: dict[str, dict[str, Any]] = {
    "RayCluster": {
        "upgradeStrategy": "RayClusterUpgradeStrategy",
        "authOptions": "AuthOptions",
        "suspend": bool,
        "managedBy": ("ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue"),
        "autoscalerOptions": "AutoscalerOptions",
        "headServiceAnnotations": dict,
        "enableInTreeAutoscaling": bool,
        "headGroupSpec*": "HeadGroupSpec",
        "rayVersion": str,
        "workerGroupSpecs": ["WorkerGroupSpec"],
    },
    "RayClusterUpgradeStrategy": {"type": ("Recreate", "None")},
    "AuthOptions": {"enableK8sTokenAuth": bool, "secretName": str, "mode": ("disabled", "token")},
    "AutoscalerOptions": {
        "resources": container("resources"),
        "image": str,
        "imagePullPolicy": str,
        "securityContext": container("securityContext"),
        "idleTimeoutSeconds": int,
        "upscalingMode": ("Default", "Aggressive", "Conservative"),
        "version": ("v1", "v2"),
        "env": container("env"),
        "envFrom": container("envFrom"),
        "volumeMounts": container("volumeMounts"),
        "command": [str],
        "args": [str],
    },
    "HeadGroupSpec": {
        "template*": template,
        "enableIngress": bool,
        "resources": dict,
        "labels": dict,
        "rayStartParams*": dict,
        "serviceType": ("ClusterIP", "NodePort", "LoadBalancer"),
    },
    "WorkerGroupSpec": {
        "suspend": bool,
        "groupName*": str,
        "replicas": int,
        "minReplicas": int,
        "maxReplicas": int,
        "idleTimeoutSeconds": int,
        "priority": int,
        "resources": dict,
        "labels": dict,
        "rayStartParams*": dict,
        "template*": template,
        "numOfHosts": int,
    },
    "RayJob": {
        "activeDeadlineSeconds": int,
        "backoffLimit": int,
        "rayClusterSpec": "RayCluster",
        "submitterPodTemplate": template,
        "metadata": dict,
        "clusterSelector": dict,
        "submitterConfig": "SubmitterConfig",
        "managedBy": ("ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue"),
        "deletionStrategy": "DeletionStrategy",
        "entrypoint": str,
        "runtimeEnvYAML": str,
        "jobId": str,
        "submissionMode": ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
        "entrypointResources": str,
        "entrypointNumCpus": float,
        "entrypointNumGpus": float,
        "ttlSecondsAfterFinished": int,
        "preRunningDeadlineSeconds": int,
        "shutdownAfterJobFinishes": bool,
        "suspend": bool,
    },
    "SubmitterConfig": {"backoffLimit": int},
    "DeletionStrategy": {"deletionRules": ["DeletionRule"]},
    "DeletionRule": {
        "policy*": ("DeleteCluster", "DeleteWorkers", "DeleteSelf", "DeleteNone"),
        "condition*": "DeletionCondition",
    },
    "DeletionCondition": {
        "jobStatus": ("SUCCEEDED", "FAILED"),
        "jobDeploymentStatus": ("Failed",),
        "ttlSeconds": int,
    },
    "RayCronJob": {"jobTemplate*": "RayJob", "schedule*": str, "timeZone": str, "suspend": bool},
    "RayService": {
        "rayClusterDeletionDelaySeconds": int,
        "upgradeStrategy": "RayServiceUpgradeStrategy",
        "managedBy": ("ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue"),
        "serveConfigV2": str,
        "rayClusterConfig*": "RayCluster",
        "excludeHeadPodFromServeSvc": bool,
        "suspend": bool,
    },
    "RayServiceUpgradeStrategy": {"type": ("NewClusterWithIncrementalUpgrade", "NewCluster", "None")},
    "ResourceFlavor": {"nodeLabels": dict},
    "ClusterQueue": {"namespaceSelector": selector, "resourceGroups": ["ResourceGroup"]},
    "ResourceGroup": {"coveredResources*": [str], "flavors*": ["FlavorQuotas"]},
    "FlavorQuotas": {"name*": str, "resources*": ["ResourceQuota"]},
    "ResourceQuota": {"name*": str, "nominalQuota*": QUANTITY, "borrowingLimit": QUANTITY, "lendingLimit": QUANTITY},
    "LocalQueue": {"clusterQueue": str},
    "Queue": {"weight": int, "capability": dict, "reclaimable": bool, "priority": int},
}
"""The `spec` of each kind, and the structures in it."""

GROUPS = {
    "ray.io/v1": ("RayCluster", "RayJob", "RayCronJob", "RayService"),
    "kueue.x-k8s.io/v1beta2": ("ResourceFlavor", "ClusterQueue", "LocalQueue"),
    "scheduling.volcano.sh/v1beta1": ("Queue",),
}


def faults(manifest: dict[str, Any], whole: bool = True) -> list[str]:
    """What an API server would refuse or ignore in an object, as `path: what is wrong`.

    Args:
        whole: False for a patch, which may lack fields that must be there.
    """
    version, kind = manifest.get("apiVersion", ""), manifest.get("kind", "")
    if version not in GROUPS:
        return list(_kubernetes(manifest, ""))
    if kind not in GROUPS[version]:
        return [f"{version} has no kind {kind}"]
    metadata = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": manifest["metadata"]}
    unknown = [f"{name}: unknown field" for name in manifest if name not in ("apiVersion", "kind", "metadata", "spec")]
    return unknown + [*_kubernetes(metadata, ""), *_check(kind, manifest.get("spec", {}), "spec", whole)]


def _check(kind: Any, value: Any, path: str, whole: bool) -> Iterator[str]:
    """Compare a value with a type of the tables."""
    if isinstance(kind, list) and isinstance(value, list):
        for number, each in enumerate(value):
            yield from _check(kind[0], each, f"{path}[{number}]", whole)
    elif isinstance(kind, str) and kind != QUANTITY:
        yield from _fields(TABLES[kind], value, path, whole)
    elif callable(kind) and not isinstance(kind, type):
        yield from _kubernetes(kind(value), path)
    elif wanted := _other_than(kind, value):
        yield f"{path}: {value!r} is not {wanted}"


def _other_than(kind: Any, value: Any) -> str | None:
    """The name of a type that a value does not have, if it does not."""
    if isinstance(kind, tuple):
        return None if value in kind else " or ".join(kind)
    if kind == QUANTITY:
        return None if type(value) in (str, int) else kind
    if kind is dict:
        strings = isinstance(value, dict) and all(isinstance(each, str) for pair in value.items() for each in pair)
        return None if strings else "a map of strings"
    if isinstance(kind, list):
        return "a list"
    good = type(value) is kind or (kind is float and type(value) is int)
    return None if good else f"of type {kind.__name__}"


def _fields(table: dict[str, Any], value: Any, path: str, whole: bool) -> Iterator[str]:
    if not isinstance(value, dict):
        yield f"{path}: {value!r} has no fields"
        return
    known = {name.rstrip("*"): kind for name, kind in table.items()}
    for name, each in value.items():
        if name in known:
            yield from _check(known[name], each, f"{path}.{name}", whole)
        else:
            yield f"{path}.{name}: unknown field"
    if whole:
        yield from (f"{path}.{name[:-1]}: missing" for name in table if name.endswith("*") and name[:-1] not in value)


def _kubernetes(manifest: dict[str, Any], path: str) -> Iterator[str]:
    """By Kubernetes' own schema, where no field is allowed that it does not know."""
    try:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        yield ": ".join(filter(None, [path, ".".join(map(str, error.path)), error.message]))
    except kubernetes_validate.SchemaNotFoundError as error:
        yield error.message
