"""Checkpoints: one small folder each, independent of the number of workers.

A checkpoint contains the soft prompt, the optimiser moments and the best soft prompt as safetensors, and the rest as JSON.
DeepSpeed's own checkpoints are not used: they contain the base, which never changes, and depend on the number of workers.
"""

from __future__ import annotations

import copy
import json
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from typing import Any

import safetensors.torch
from torch import Tensor

from ptuning import storage
from ptuning.redaction import logger

log = logger(__name__)

KEEP = 2
"""Number of checkpoints to keep: the newest, and one to fall back to if it is damaged."""
THREADS = 4
"""Number of runs whose checkpoints are written at a time."""


def save(folder: str, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Write the checkpoint of `step` below `folder` and delete those that are no longer needed."""
    # Copies, because tensors that share memory cannot be written (safetensors), and those of all slots do.
    whole = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    storage.write_folder(
        storage.join(folder, f"step-{step:09d}"),
        {"state.safetensors": safetensors.torch.save(whole), "state.json": json.dumps(state).encode()},
    )
    for name in storage.list_folders(folder)[:-KEEP]:
        storage.delete_folder(storage.join(folder, name))


def newest(folder: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors and state of the newest intact checkpoint; None if there is none.

    A damaged one is skipped with a warning: falling back costs some steps, a crash loop would cost the run.
    """
    for name in reversed(storage.list_folders(folder)):
        try:
            files = storage.read_folder(storage.join(folder, name))
            return safetensors.torch.load(files["state.safetensors"]), json.loads(files["state.json"])
        except (storage.StorageError, KeyError, ValueError) as error:
            log.warning("checkpoint %s is damaged, using the previous one: %s", name, error)
    return None


class Writer:
    """Writes checkpoints of several runs: to a disk at once; to an object store, or beside an accelerator, in a thread, because
    a request takes longer than many steps. A run has one at a time, so the newest is older than an interval by at most the time
    that writing takes."""

    def __init__(self) -> None:
        self._writing: dict[str, Future[None]] = {}

    @cached_property
    def _threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(THREADS, "ptuning-checkpoint")

    def save(self, folder: str, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """As `save`. What is written is the state at this moment.

        Raises:
            OSError: this checkpoint or the last one of the folder could not be written.
        """
        self.wait(folder)
        if storage.is_local(folder) and all(tensor.device.type == "cpu" for tensor in tensors.values()):
            save(folder, step, tensors, state)
            return
        now = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        self._writing[folder] = self._threads.submit(save, folder, step, now, copy.deepcopy(state))

    def wait(self, folder: str) -> None:
        """Wait until the last checkpoint of a folder is written.

        Raises:
            OSError: it could not be written.
        """
        writing = self._writing.pop(folder, None)
        if writing is not None:
            writing.result()

    def end(self) -> None:
        """`wait` for all folders."""
        for folder in list(self._writing):
            self.wait(folder)

    def settle(self) -> None:
        """Wait for all folders, without an error, because there is another one already."""
        futures.wait(self._writing.values())
        self._writing.clear()
