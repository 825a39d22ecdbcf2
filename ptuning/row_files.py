"""Which local files are rows: by their names only, nothing is opened."""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from pathlib import Path

from ptuning.errors import DataError
from ptuning.paths import SCHEME, locate

KINDS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
ALIASES = {".jsonlines": ".jsonl", ".jl": ".jsonl", ".tab": ".tsv", ".feather": ".arrow"}
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".xz": "xz", ".zip": "zip"}

KNOWN = "give a .jsonl, .json, .csv, .tsv, .parquet or .arrow file, or hub:org/name:split"

_SPLIT = re.compile(r"(?:^|[^a-z])(train|valid|validation|val|dev|test|eval)(?:[^a-z]|$)", re.IGNORECASE)
_META = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
"""Files that `datasets` writes beside the rows."""


def kind_of(name: str) -> tuple[str, str | None] | None:
    """The kind and the compression of a file by its name; None if it is not a file of rows."""
    path = Path(name.lower())
    compression = COMPRESSIONS.get(path.suffix)
    kind = path.with_suffix("").suffix if compression else path.suffix
    kind = ALIASES.get(kind, kind)
    if kind not in KINDS or (compression and kind in (".parquet", ".arrow")):
        return None
    return kind, compression


def local_files(source: str) -> list[Path]:
    """The files of an existing file, a folder or a pattern, in the order of their names; empty if there is no such thing.

    Raises:
        DataError: the folder contains no rows, or those of several splits; the pattern matches nothing.
    """
    path = locate(source)
    if path.is_dir():
        names = sorted(file.name for file in path.iterdir() if file.is_file())
        return [path / name for name in chosen(source, names)]
    if path.exists():
        return [path]
    if not glob.has_magic(source):
        return []
    found = sorted(Path(each) for each in glob.glob(str(path), recursive=True))
    files = [each for each in found if each.is_file() and each.name not in _META]
    if not files:
        raise DataError(f"{source}: matches no file in {Path.cwd()}; correct the pattern")
    return files


def chosen(folder: str, names: Sequence[str]) -> list[str]:
    """The files of rows in a folder.

    Raises:
        DataError: there are none, or they belong to several splits.
    """
    rows = [name for name in names if kind_of(name) and not name.startswith((".", "_")) and name not in _META]
    if not rows:
        raise DataError(f"{folder}: contains no file of rows; {KNOWN}")
    splits = sorted({found[1].lower() for name in rows if (found := _SPLIT.search(name))})
    if len(splits) > 1 and not folder.startswith(SCHEME):
        raise DataError(
            f"{folder}: contains files of several splits ({', '.join(splits)}); name those of this split, for example "
            f"{folder.rstrip('/')}/*{splits[-1]}*"
        )
    return rows
