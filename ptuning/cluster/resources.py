"""Resources that a cluster does not have yet: its autoscaler is asked for them, and waited for.

Ray tells which demands its autoscaler can never meet, but has no public call for it (2.60): version 2 reports them to the GCS,
version 1 only reports its nodes. Both are read here, and nowhere else.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group

from ptuning.cluster.connection import join_ray, own_cluster
from ptuning.errors import UserError

Bundle = Mapping[str, float]
"""Amounts of resources by kind that have to be on one node."""

LOOK = 1.0
"""Seconds between two looks."""
SURE = 3
"""Looks in a row after which a demand that the autoscaler calls infeasible counts as that."""
AGAIN = 30.0
"""Seconds between two lines about the wait."""


@dataclass(frozen=True)
class _Autoscaler:
    """What the autoscaler last told."""

    infeasible: tuple[str, ...] = ()
    """Placement groups that no node types of it can hold."""
    starting: int = 0
    """Nodes that were asked for and are not there."""


def await_resources(
    many: int, each: Bundle, who: str, fixes: Mapping[str, str], seconds: float, say: Callable[[str], None]
) -> None:
    """Return when the cluster has `many` times `each`; others may use them.

    Args:
        who: the setting that asks for them and how many it means, such as "compute.workers: 2 workers".
        fixes: how to ask for less of each kind.
        seconds: how long to wait if the cluster has an autoscaler.
        say: receives lines for people while it waits.

    Raises:
        UserError: the cluster cannot have them, or does not have them in time.
    """
    have = ray.cluster_resources()
    lacking = next((kind for kind, amount in each.items() if many * amount > have.get(kind, 0)), None)
    if lacking is None:
        return
    there, needed = f"{have.get(lacking, 0):g}", f"{many * each[lacking]:g}"
    what, fix = f"{who} with {each[lacking]:g} {lacking} each need {needed}", fixes[lacking]
    if not can_grow():
        raise UserError(f"{what}, the cluster has {there}; {fix}")
    say(f"waiting for {needed} {lacking}, at most {seconds:g} s (compute.wait_s): the cluster has {there}")
    group = placement_group([{kind: amount for kind, amount in each.items() if amount}] * many)
    try:
        _wait(group, seconds, say, f"{what}, more than the cluster's autoscaler can start; {fix}, or raise its limits", lacking)
    except TimeoutError:
        raise UserError(
            f"{what}, the cluster has {ray.cluster_resources().get(lacking, 0):g} after {seconds:g} s; see why with: ray "
            f"status, and raise compute.wait_s, or {fix}"
        ) from None
    finally:
        remove_placement_group(group)


def can_grow() -> bool:
    """Whether the cluster has an autoscaler that may add nodes."""
    return not own_cluster() and _autoscaler() is not None


def in_use(address: str) -> tuple[int, dict[str, tuple[float, float]]]:
    """Number of nodes of a cluster, and of CPUs and GPUs how many are in use, and how many there are.

    Raises:
        UserError: there is no cluster.
    """
    join_ray(address, "--address")
    have, free = ray.cluster_resources(), ray.available_resources()
    kinds = [kind for kind in ("CPU", "GPU") if kind in have]
    return sum(node["Alive"] for node in ray.nodes()), {kind: (have[kind] - free.get(kind, 0), have[kind]) for kind in kinds}


def _wait(group: Any, seconds: float, say: Callable[[str], None], never: str, kind: str) -> None:
    """Raises:
    UserError: `never`.
    TimeoutError: it is not there yet.
    """
    until, told, refused = time.monotonic() + seconds, time.monotonic(), 0
    while not group.wait(LOOK):
        found = _autoscaler() or _Autoscaler()
        # What others use now counts as taken for the autoscaler: only where nothing is in use, its word is final.
        refused = refused + 1 if group.id.hex() in found.infeasible and not _in_use(kind) else 0
        if refused >= SURE:
            raise UserError(never)
        now = time.monotonic()
        if now > until:
            raise TimeoutError
        if now - told > AGAIN:
            told = now
            starting = f"{found.starting} node{'s' if found.starting != 1 else ''} starting"
            say(f"still waiting: the cluster has {ray.cluster_resources().get(kind, 0):g} {kind}, {starting}")


def _in_use(kind: str) -> bool:
    return ray.available_resources().get(kind, 0) < ray.cluster_resources().get(kind, 0)


def _autoscaler() -> _Autoscaler | None:
    """What the cluster's autoscaler told last; None: nodes cannot be added to this cluster."""
    # Imported late: neither is needed where everything is there.
    from ray.autoscaler.v2.utils import is_autoscaler_v2

    return _version_2() if is_autoscaler_v2() else _version_1()


def _version_2() -> _Autoscaler:
    """Also of clusters without one: it then calls every demand infeasible that does not fit."""
    from ray._raylet import GcsClient  # type: ignore[attr-defined]  # compiled
    from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply  # type: ignore[attr-defined]  # generated

    reply = GetClusterStatusReply()
    reply.ParseFromString(GcsClient(ray.get_runtime_context().gcs_address).get_cluster_status(timeout_s=10))
    state = reply.autoscaling_state
    return _Autoscaler(
        tuple(each.details.partition(":")[0] for each in state.infeasible_gang_resource_requests),
        sum(each.count for each in state.pending_instance_requests) + len(state.pending_instances),
    )


def _version_1() -> _Autoscaler | None:
    """It never tells that a demand is infeasible."""
    from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
    from ray.experimental.internal_kv import _internal_kv_get

    report = (json.loads(_internal_kv_get(DEBUG_AUTOSCALING_STATUS) or "{}")).get("autoscaler_report") or {}
    # A cluster that was started without an autoscaler's config has one that only watches, and names nodes itself
    # (`format_readonly_node_type`).
    if all(name.startswith("node_") for name in report.get("active_nodes") or {}):
        return None
    return _Autoscaler(starting=sum((report.get("pending_launches") or {}).values()) + len(report.get("pending_nodes") or ()))
