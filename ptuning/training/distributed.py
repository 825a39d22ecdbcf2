"""The data-parallel workers of a run: rank, size, and the collectives that training and evaluation need."""

from __future__ import annotations

import resource
from dataclasses import dataclass
from functools import cache
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Workers:
    """This process as one of the workers. With a single worker every collective is the identity."""

    rank: int = 0
    size: int = 1

    @staticmethod
    def current() -> Workers:
        """The initialised process group, or a single worker."""
        return Workers(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else Workers()

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over all workers, in place. It is bit-identical on all workers."""
        if self.size > 1:
            device = tensor.device
            moved = tensor.to(self._device())
            dist.all_reduce(moved)
            if moved.is_cuda:  # here, where the watchdog knows that this worker waits for others
                torch.cuda.synchronize()
            tensor.copy_(moved.to(device))
        return tensor

    def all_gather(self, value: Any) -> list[Any]:
        """The values of all workers, by rank. Only for small values: they are pickled between these processes."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=_for_objects())
        return values

    def broadcast(self, value: Any) -> Any:
        """The first worker's value, on all workers."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=_for_objects())
        return box[0]

    def memory(self) -> list[int]:
        """Memory that each worker uses now, in bytes by rank: GPU memory where there is one, else resident memory."""
        if torch.cuda.is_available():
            return self.all_gather(torch.cuda.memory_allocated())
        return self.all_gather(psutil.Process().memory_info().rss)

    def peak_memory(self) -> list[int]:
        """The most that each worker has used so far, as `memory`."""
        gpu = torch.cuda.is_available()
        return self.all_gather(
            torch.cuda.max_memory_allocated() if gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        )

    def _device(self) -> torch.device:
        return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


@cache
def _for_objects() -> dist.ProcessGroup | None:
    """The group for objects: gloo's, on the CPU. NCCL would copy each to the GPU, and a worker that waits for another would
    seem to wait for its own GPU. All workers make it at the same moment, in their first exchange."""
    return dist.new_group(backend="gloo") if dist.get_backend() == "nccl" else None
