"""Checkpoints: one small folder each, independent of the number of workers.

A checkpoint contains the soft prompt, the optimiser moments and the best soft prompt as safetensors, and the rest as JSON.
DeepSpeed's own checkpoints are not used: they contain the base, which never changes, and depend on the number of workers.
"""

from __future__ import annotations

import json
from typing import Any

import safetensors.torch
from torch import Tensor

from ptuning import storage
from ptuning.redaction import logger

log = logger(__name__)

KEEP = 2
"""Number of checkpoints to keep: the newest, and one to fall back to if it is damaged."""


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
