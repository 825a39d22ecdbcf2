"""The files of a job: which are uploaded, which every node sees under the same path, and which the nodes have."""

from __future__ import annotations

import glob
import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ptuning.errors import UserError
from ptuning.paths import FOLDER, SCHEME, is_path
from ptuning.row_files import COMPRESSIONS, local_files

LIMIT = 100_000_000
"""Maximum bytes of an upload. Ray keeps it in the head's memory and on every node's disk."""


@dataclass
class JobPackage:
    """The upload of one job."""

    experiment: Path | None
    """The unchanged experiment file; None for `doctor` without one."""
    overrides: list[str]
    """`key=value` for the job: the user's overrides, then those that replace paths of this machine."""
    env: dict[str, str]
    files: dict[str, list[tuple[str, Path]]] = field(default_factory=dict)
    """Name in the folder of uploaded files -> path below it ("" for a file) and its path on this machine."""
    notes: list[str] = field(default_factory=list)
    """Notes about what the cluster must provide for this job."""

    @property
    def experiment_name(self) -> str:
        """Name of the experiment file in the job's working directory. All processes of a job import from that directory, so a
        file with the name of a module would hide the module."""
        assert self.experiment is not None
        return self.experiment.name if self.experiment.suffix == ".toml" else f"{self.experiment.name}.toml"

    @property
    def contents(self) -> dict[str, int]:
        """Path in the job's working directory -> bytes."""
        listed = {self.experiment_name: self.experiment.stat().st_size} if self.experiment else {}
        return listed | {target: source.stat().st_size for target, source in self._shipped()}

    def pack(self, folder: Path) -> None:
        """Copy all files to the folder that is uploaded."""
        if self.experiment:
            shutil.copyfile(self.experiment, folder / self.experiment_name)
        for target, source in self._shipped():
            (folder / target).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, folder / target)

    def _shipped(self) -> Iterable[tuple[str, Path]]:
        for name, parts in self.files.items():
            for part, source in parts:
                yield "/".join(filter(None, (FOLDER, name, part))), source


class Packer:
    """Decides for each path whether it is shared, uploaded, or a path of the cluster."""

    def __init__(self, shipment: JobPackage, shared: Sequence[Path]) -> None:
        self._shipment = shipment
        self._shared = shared
        self._bytes = 0

    def data(self, key: str, sources: str | Sequence[str]) -> None:
        """The files, folders and patterns of a split."""
        found = [self._data(key, source) for source in ([sources] if isinstance(sources, str) else sources)]
        replaced = [new or old for new, old in found]
        if any(new for new, _ in found):
            self.override(key, replaced[0] if isinstance(sources, str) else json.dumps(replaced, ensure_ascii=False))

    def _data(self, key: str, source: str) -> tuple[str | None, str]:
        """The source in the job, or None if it is the same there; and the source."""
        path = Path(source).expanduser()
        if not is_path(source):
            return None, source
        if not path.exists() and not glob.glob(str(path), recursive=True):
            self.of_the_cluster(key, source)
            return None, source
        fixed = path if path.exists() else next(parent for parent in path.parents if parent.exists())
        shared = self._shared_path(fixed)
        if shared is not None:
            return str(shared / path.relative_to(fixed)), source
        if path.is_file():
            suffix = "".join(path.suffixes[-2:]) if path.suffix in COMPRESSIONS else path.suffix
            return self._ship(key, path, [("", path)], suffix), source
        # The files of a folder or of a pattern become those of one folder, in the same order.
        parts = [(f"{number:05}-{file.name}", file) for number, file in enumerate(local_files(source))]
        return self._ship(key, fixed, parts), source

    def folder(self, key: str, source: str, patterns: Sequence[str]) -> None:
        path = Path(source).expanduser()
        if not path.is_dir():
            self.of_the_cluster(key, source)
        elif not self.is_shared(key, path):
            names = {found.name for pattern in patterns for found in path.glob(pattern) if found.is_file()}
            parts = [(name, path / name) for name in sorted(names) if not name.startswith(".")]
            if not parts:
                raise UserError(f"{key}: {source} contains none of {', '.join(patterns)}; correct the path")
            self.override(key, self._ship(key, path, parts))

    def storage(self, storage: str) -> None:
        """Results must be in a place that every node, and every later command, can read."""
        if "://" in storage or self.is_shared("compute.storage", Path(storage).expanduser()):
            return
        if not Path(storage).is_absolute():
            raise UserError(
                f"compute.storage: {storage} is a folder of this machine; give one that every node of the cluster can access, "
                "such as compute.storage=/mnt/shared/runs or s3://bucket/runs, or add --shared FOLDER if the nodes mount "
                "FOLDER, too"
            )
        self.of_the_cluster("compute.storage", storage)

    def override(self, key: str, value: str) -> None:
        self._shipment.overrides.append(f"{key}={value}")

    def is_shared(self, key: str, path: Path) -> bool:
        whole = self._shared_path(path)
        if whole is None:
            return False
        self.override(key, str(whole))
        return True

    def _shared_path(self, path: Path) -> Path | None:
        """The path that this machine and the nodes see, or None."""
        whole = path.resolve()
        return whole if any(whole.is_relative_to(folder) for folder in self._shared) else None

    def of_the_cluster(self, key: str, source: str) -> None:
        if not Path(source).is_absolute():
            raise UserError(f"{key}: {source} is not in {Path.cwd()}; correct the path, or give an absolute one of the cluster")
        self._shipment.notes.append(f"{key}: every node must have {source}")

    def _ship(self, key: str, path: Path, parts: list[tuple[str, Path]], suffix: str = "") -> str:
        """Add files to the upload; returns their name there."""
        size = sum(part.stat().st_size for _, part in parts)
        self._bytes += size
        if self._bytes > LIMIT:
            among = "" if self._bytes == size else f", with the other files {self._bytes / 1e6:.0f} MB,"
            raise UserError(
                f"{key}: {path} ({size / 1e6:.0f} MB){among} is too large to upload with a job (at most {LIMIT / 1e6:.0f} MB); "
                f"put it on shared storage and give that path, or add --shared {path.absolute().parent} if the nodes mount it"
            )
        digest = hashlib.sha256()
        for name, part in parts:
            with part.open("rb") as content:
                digest.update(f"{name}\0{hashlib.file_digest(content, 'sha256').hexdigest()}\n".encode())
        stem = re.sub(r"[^A-Za-z0-9._-]", "-", path.absolute().name.removesuffix(suffix) if suffix else path.absolute().name)
        name = f"{stem}-{digest.hexdigest()[:12]}{suffix}"
        self._shipment.files[name] = parts
        return SCHEME + name
