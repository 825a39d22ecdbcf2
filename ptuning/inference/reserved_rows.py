"""Which of the rows behind vLLM's input embedding are taken."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor

from ptuning.inference.types import NoRoom, RequestError


class ReservedRows:
    """Which of the R reserved rows are taken. Thread-safe; one soft prompt at a time is added."""

    def __init__(self, first: int, many: int, width: int, dtype: torch.dtype, write: Callable[[Tensor, int], bool]) -> None:
        self._first, self._many, self._width, self._dtype = first, many, width, dtype
        self._write = write
        self._lock = threading.Lock()
        self._taken: dict[int, int] = {}  # first row -> number of rows

    @property
    def resident_bytes(self) -> int:
        return self._many * self._width * self._dtype.itemsize

    @property
    def itemsize(self) -> int:
        return self._dtype.itemsize

    def add(self, vectors: Tensor) -> range:
        if vectors.ndim > 2:
            raise RequestError("vLLM does not serve key-value prefixes; set serve.engine=transformers")
        if vectors.ndim != 2 or vectors.shape[1] != self._width or not len(vectors):
            raise ValueError(f"vectors are {tuple(vectors.shape)}, not [P, {self._width}]")
        if not bool(torch.isfinite(vectors.to(self._dtype)).all()):
            raise ValueError(f"vectors are not finite in {self._dtype}")
        with self._lock:
            row = self._gap(len(vectors))
            self._taken[row] = len(vectors)
        ids = range(self._first + row, self._first + row + len(vectors))
        try:
            if not self._write(vectors, ids.start):
                raise ValueError(f"vectors are not finite in {self._dtype}")
        except BaseException:
            self.remove(ids)
            raise
        return ids

    def remove(self, ids: range) -> None:
        with self._lock:
            del self._taken[ids.start - self._first]

    def _gap(self, length: int) -> int:
        """The first row of the first gap of this length."""
        row = 0
        for taken in sorted(self._taken):
            if taken - row >= length:
                return row
            row = taken + self._taken[taken]
        if self._many - row >= length:
            return row
        raise NoRoom(
            f"{sum(self._taken.values())} of {self._many} rows for virtual tokens are taken, and {length} are needed; raise "
            "serve.rows, or name fewer soft prompts in serve.soft_prompts"
        )
