"""Faster imports."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from ptuning import environment


@contextmanager
def quick_imports() -> Iterator[None]:
    """Disables garbage collection inside, and afterwards freezes all existing objects.

    An import creates some hundred thousand long-lived objects. Python (3.11) scans them repeatedly for unreachable cycles,
    which takes a quarter of a worker's import time.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextmanager
def without_module(module: str) -> Iterator[None]:
    """Makes `module` look uninstalled inside, for packages that import it optionally. No effect if it is imported already."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]  # how Python marks a module that cannot be imported
    try:
        yield
    finally:
        del sys.modules[module]


def load_deepspeed() -> None:
    """Import DeepSpeed before any other module does, with the accelerator set and without MLflow."""
    import torch

    if not torch.cuda.is_available():
        environment.apply("deepspeed")
    # Its autotuner, unused here, imports MLflow if it is installed (0.19, autotuning/autotuner.py): 0.4 s and 45 MB per worker.
    with without_module("mlflow"):
        import deepspeed  # noqa: F401  # reads DS_ACCELERATOR at import
