"""Imports that take no longer than they have to."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from ptuning import environment


@contextmanager
def quick_imports() -> Iterator[None]:
    """Nothing is garbage-collected inside, and what is there at the end is never looked through again.

    An import makes some hundred thousand objects that stay. Python (3.11) looks through them again and again for cycles that
    nobody uses any more: a quarter of the time that a worker's imports take.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextmanager
def without_module(module: str) -> Iterator[None]:
    """Inside, packages that import `module` only where it is installed do without it, unless it has been imported before."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]  # Python's own sign for what cannot be imported
    try:
        yield
    finally:
        del sys.modules[module]


def load_deepspeed() -> None:
    """Import DeepSpeed before anything else does: told which accelerator there is, and without MLflow."""
    import torch

    if not torch.cuda.is_available():
        environment.apply("deepspeed")
    # Its autotuner, of no use here, imports MLflow if it can (0.19, autotuning/autotuner.py): 0.4 s and 45 MB of every worker.
    with without_module("mlflow"):
        import deepspeed  # noqa: F401  # reads DS_ACCELERATOR when it is imported
