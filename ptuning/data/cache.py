"""The cache of rows: inside the cache of `datasets` (HF_DATASETS_CACHE)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets

from ptuning.errors import DataError


def cache_folder() -> Path:
    """The folder of the Arrow files."""
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "ptuning"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{folder}: cannot be created ({error.strerror}); set HF_DATASETS_CACHE to a writable folder") from None
    return folder


@contextmanager
def quiet() -> Iterator[None]:
    """Hides the progress bars of `datasets`: the command line has its own."""
    before = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not before:
            datasets.enable_progress_bars()
