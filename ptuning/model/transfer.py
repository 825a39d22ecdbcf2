"""Many small tensors of the host, in one copy to a device.

A copy from ordinary memory makes the host wait until the device has done everything before it. Here the tensors are laid out in
one block of pinned memory, from which the copy starts at once and the host goes on.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

ALIGNED = 16
"""Bytes: every tensor starts at a multiple of this."""


class Parcel:
    """Tensors that are ready to be sent. For the CPU they are themselves."""

    def __init__(self, tensors: Sequence[Tensor], device: torch.device) -> None:
        self.device = device
        self._tensors = list(tensors)
        if device.type == "cpu":
            return
        sizes = [math.ceil(tensor.nbytes / ALIGNED) * ALIGNED for tensor in tensors]
        self._starts = list(itertools.accumulate(sizes, initial=0))
        self._block = torch.empty(self._starts[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._tensors = [each.copy_(tensor) for each, tensor in zip(self._laid_out(self._block), tensors, strict=True)]

    @property
    def tensors(self) -> list[Tensor]:
        """On the host. What is written into them before they are sent is sent."""
        return self._tensors

    def send(self) -> list[Tensor]:
        """The tensors on the device."""
        if self.device.type == "cpu":
            return self._tensors
        return self._laid_out(self._block.to(self.device, non_blocking=True))

    def _laid_out(self, block: Tensor) -> list[Tensor]:
        return [
            block[start : start + like.nbytes].view(like.dtype).view(like.shape)
            for start, like in zip(self._starts, self._tensors, strict=False)
        ]


def moved(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """The tensors on a device, by one copy."""
    return Parcel(tensors, device).send()
