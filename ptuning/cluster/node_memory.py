"""The memory that workers of a cluster get: bytes of the smallest GPU, or of the smallest part of a node."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from typing import Any

import psutil
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

ANSWER_S = 60.0


@dataclass(frozen=True)
class WorkerMemory:
    """Of the workers of a group, as Ray packs them on nodes."""

    smallest: int
    """Bytes of the worker that has least."""
    per_node: int
    """Most workers on a node."""


def worker_memory(workers: int, resources: dict[str, float], groups: int = 1) -> WorkerMemory | None:
    """The memory of each of `groups` times `workers` workers with these resources. None: a node does not tell it."""
    with_gpus = resources.get("GPU", 0) > 0
    kind = "GPU" if with_gpus else "CPU"
    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get(kind, 0) >= resources[kind]]
    if len(nodes) == 1:  # the driver is on one of the nodes
        answers = [own_memory(with_gpus)]
    else:
        try:
            asked = [_ask.options(scheduling_strategy=_on(node)).remote(with_gpus) for node in nodes]
            answers = ray.get(asked, timeout=ANSWER_S)
        except Exception:  # any error of a node: its memory is unknown
            return None
    places = {id(node): min(int(node["Resources"][kind] // resources[kind]), workers * groups) for node in nodes}
    shares = []
    for node, answer in zip(nodes, answers, strict=True):
        if not answer:
            return None
        shares.append(min(answer) if with_gpus else answer[0] // max(1, places[id(node)]))
    return WorkerMemory(min(shares), min(workers, max(places.values()))) if shares else None


def own_memory(gpus: bool) -> list[int]:
    """Bytes of each GPU of this machine, or `[free bytes]` of its memory; empty: unknown."""
    if not gpus:
        return [int(psutil.virtual_memory().available)]
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.split()
        return [int(line) << 20 for line in lines]
    except (OSError, subprocess.SubprocessError, ValueError):
        return []


@ray.remote(num_cpus=0, max_retries=0)
def _ask(gpus: bool) -> list[int]:
    return own_memory(gpus)


def _on(node: dict[str, Any]) -> NodeAffinitySchedulingStrategy:
    return NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
