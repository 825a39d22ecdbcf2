"""The tensors in the safetensors files of a base."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ptuning.errors import BaseError


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a safetensors file, with the location of its bytes."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int

    def read(self, offset: int, size: int) -> bytes:
        with self.file.open("rb") as stream:
            stream.seek(self.start + offset)
            return stream.read(size)


def stored_tensors(folder: Path) -> Iterator[StoredTensor]:
    """All tensors of a folder's safetensors files, ordered by file and offset; only the headers are read.

    Format: https://huggingface.co/docs/safetensors (8 bytes of header length, JSON header, data).
    """
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            prefix = stream.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= length <= min(os.path.getsize(file) - 8, 100_000_000):
                raise BaseError(f"{file}: is not a safetensors file (header of {length} bytes); use another copy")
            header: dict[str, Any] = json.loads(stream.read(length))
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                yield StoredTensor(name, file, entry["dtype"], tuple(entry["shape"]), 8 + length + begin, end - begin)


STORED_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def stored_values(tensor: StoredTensor, first: int, count: int) -> Tensor:
    """Elements `first .. first + count` of a stored tensor, flattened, `[count]` fp32."""
    dtype = STORED_DTYPES[tensor.dtype]
    width = torch.finfo(dtype).bits // 8
    return torch.frombuffer(bytearray(tensor.read(first * width, count * width)), dtype=dtype).float()
