"""Measures what a worker receives in an all-gather, as ZeRO-3 gathers a base. Without Ray."""

from __future__ import annotations

import socket
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from ptuning.cluster.node_checks import Finding
from ptuning.planning.rates import CPU, GB, gpu_rate

GATHERED, GATHERED_BY_GPUS = 64 << 20, 1 << 30
"""Bytes of one all-gather, about a layer of a large base."""
REPEATS = 3
WAIT = timedelta(seconds=60)
SLOW = 0.5
"""A rate below this fraction of the plan's is a warning."""


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("", 0))
        return int(free.getsockname()[1])


def join(rank: int, size: int, address: str, gpu: bool) -> None:
    """Make this process a member of the group at `address` (host:port). Returns when all have joined."""
    backend = "nccl" if gpu else "gloo"
    dist.init_process_group(backend, init_method=f"tcp://{address}", rank=rank, world_size=size, timeout=WAIT)


def all_gather_rate(gathered: int | None = None) -> float:
    """Bytes per second that this member of a group receives from the others; the best of a few all-gathers."""
    gpu, size = dist.get_backend() == "nccl", dist.get_world_size()
    device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
    own = torch.zeros((gathered or (GATHERED_BY_GPUS if gpu else GATHERED)) // size, dtype=torch.uint8, device=device)
    whole = own.new_empty(size * len(own))
    seconds = []
    for _ in range(1 + REPEATS):  # the first one makes the connections
        dist.barrier()
        began = time.perf_counter()
        dist.all_gather_into_tensor(whole, own)
        if gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return len(own) * (size - 1) / min(seconds[1:])


def judge(rates: list[float], per_node: int, nodes: int, gpus: bool) -> Finding:
    """Compare the measured rates of all members with the rate that plans assume."""
    rate = min(rates) / GB
    assumed = gpu_rate(per_node, nodes > 1) if gpus else CPU["bandwidth_gb"]
    members = f"{len(rates)} {'GPUs' if gpus else 'processes'} on {nodes} node{'s' * (nodes > 1)}"
    text = f"{rate:.3g} GB/s per worker in an all-gather of {members}; plans assume {assumed:g}"
    if rate >= SLOW * assumed:
        return Finding("ok", "network", text, where="cluster")
    fix = f"plan with --bandwidth {rate:.2g}"
    if gpus:
        fix = f"give the containers InfiniBand or EFA (cluster/README.md), or {fix}"
    return Finding("warn", "network", text, fix, "cluster")
