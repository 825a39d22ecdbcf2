"""What plans assume of hardware unless they are told: rates of GPUs, of CPU workers, and of the links between them."""

from __future__ import annotations

GB = 1_000_000_000
GPU = {"memory_gb": 80.0, "tflops": 400.0}
"""An H100: 80 GB, 40 % of its dense bf16 peak."""
INSIDE_GB = 300.0
"""GB/s that a GPU receives from those of its node: two thirds of an H100's NVLink."""
LINK_GB = 50.0
"""GB/s of a node's network per GPU of the node: a 400 Gb/s link for each."""
CPU = {"bandwidth_gb": 1.0, "tflops": 0.1}


def gpu_rate(per_node: int, nodes: bool, network_gb: float | None = None) -> float:
    """GB/s that a GPU receives in an all-gather. `nodes`: from several nodes.

    NCCL's rings bring every byte to a node once, over all its links together, and pass it on inside the node. So the rate of
    each GPU is that of the node's whole network, up to the rate inside the node.
    """
    return min(INSIDE_GB, network_gb or LINK_GB * per_node) if nodes else INSIDE_GB
