"""The safetensors files of a base: which of them belong to the model, and the tensors in them."""

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

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
"""The names that transformers gives to the weights of a model: one file, or the index of several."""


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


def weights_name(folder: Path) -> str:
    """The file that decides which weights are read: the index; without one, `model.safetensors` or the only file.

    Other safetensors files (`consolidated`, old checkpoints) do not belong to the model.

    Raises:
        BaseError: there is no safetensors file, or several without an index.
    """
    for name in (INDEX, WHOLE):
        if (folder / name).is_file():
            return name
    names = sorted(file.name for file in folder.glob("*.safetensors"))
    own = [name for name in names if not name.startswith(("consolidated", "adapter_"))] or names
    if not own:
        raise BaseError(f"{folder} has no .safetensors file, the only format that is opened; convert it")
    if len(own) > 1:
        raise BaseError(
            f"{folder} has {len(own)} .safetensors files but no {INDEX}, which lists those of the model; download the index"
        )
    return own[0]


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of the model in a folder, sorted by name.

    Raises:
        BaseError: as `weights_name`; the index is not valid, or files that it lists are missing.
    """
    name = weights_name(folder)
    if name != INDEX:
        return [folder / name]
    names = index_files(folder / INDEX)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        listed = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise BaseError(f"{folder} lacks {len(missing)} of the {len(names)} files of its index ({listed}); download them")
    return [folder / name for name in names]


def index_files(index: Path) -> list[str]:
    """The names of the files that an index lists, sorted.

    Raises:
        BaseError: it is not an index, or names a file outside its folder.
    """
    try:
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(listed.values()))
        valid = bool(names) and all(name.endswith(".safetensors") and Path(name).name == name for name in names)
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        valid = False
    if not valid:
        raise BaseError(f"{index} is not a valid index of safetensors files; use another copy")
    return names


def stored_tensors(folder: Path) -> Iterator[StoredTensor]:
    """All tensors of the model in a folder, ordered by file and offset; only the headers are read.

    Format: https://huggingface.co/docs/safetensors (8 bytes of header length, JSON header, data).

    Raises:
        BaseError: as `weight_files`; a file is damaged or incomplete.
    """
    for file in weight_files(folder):
        size = os.path.getsize(file)
        with file.open("rb") as stream:
            prefix = stream.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= length <= min(size - 8, 100_000_000):
                raise BaseError(f"{file}: is not a safetensors file (header of {length} bytes); use another copy")
            header = _parse(file, stream.read(length))
        end = max((tensor.start + tensor.size for tensor in header), default=0)
        if end > size:
            raise BaseError(f"{file}: is incomplete ({size} of {end} bytes); download it again")
        yield from header


def _parse(file: Path, header: bytes) -> list[StoredTensor]:
    try:
        entries: dict[str, Any] = json.loads(header)
        return [
            StoredTensor(name, file, entry["dtype"], tuple(entry["shape"]), 8 + len(header) + begin, end - begin)
            for name, entry in entries.items()
            if name != "__metadata__"
            for begin, end in [entry["data_offsets"]]
        ]
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        raise BaseError(f"{file}: is not a safetensors file (its header is not valid JSON); use another copy") from None


PACKED = "packed"
"""The dtype of a tensor that is stored as others, which it is computed from."""
STORED_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def stored_values(tensor: StoredTensor, first: int, count: int) -> Tensor:
    """Elements `first .. first + count` of a stored tensor, flattened, `[count]` fp32."""
    dtype = STORED_DTYPES[tensor.dtype]
    width = torch.finfo(dtype).bits // 8
    return torch.frombuffer(bytearray(tensor.read(first * width, count * width)), dtype=dtype).float()
