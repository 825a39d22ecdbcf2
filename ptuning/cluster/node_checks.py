"""Checks of one machine. They run in this process or in a task on any node, without importing Ray."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from packaging.requirements import Requirement

from ptuning import storage
from ptuning.config import Experiment
from ptuning.errors import TrackingError, UserError
from ptuning.model.base import computes_in_bfloat16, find_base
from ptuning.redaction import redact
from ptuning.tracking.client import OFFLINE, asking, check_tracking, connect, database, tracking_uri

GB = 1_000_000_000
CONSTRAINTS = "constraints.txt"
LEAST_MEMORY, LEAST_SHARED = 2 * GB, GB // 2
"""The libraries of a worker take 0.7 GB (measured), and a search has several workers. Ray keeps objects in /dev/shm."""


@dataclass(frozen=True)
class Finding:
    """One line: the check, its result, and the fix if it is not ok."""

    state: Literal["ok", "warn", "wrong"]
    what: str
    text: str
    fix: str = ""
    where: str = ""


def check_node(tables: dict[str, Any] | None, probe: str | None = None) -> dict[str, Any]:
    """The results for this machine as plain data: `findings`, and `facts` that must be equal on all nodes.

    `tables`: an experiment with absolute paths; `probe`: the name of a file, and of its folder, to write into the storage, so
    that other machines can check whether they share it.
    """
    found = [*_software(), *_hardware()]
    facts: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__, "ray": _version("ray")}
    facts["transformers"], facts["deepspeed"] = _version("transformers"), _version("deepspeed")
    if tables is not None:
        experiment = Experiment.model_validate(tables)
        found.append(_storage(experiment.compute.storage, probe))
        found.append(_tracker(experiment))
        base, fingerprint = _base(experiment)
        found.append(base)
        if fingerprint:
            facts["base"] = fingerprint
    return {"findings": [vars(finding) for finding in found], "facts": facts}


def _software() -> Iterator[Finding]:
    python = platform.python_version()
    if sys.version_info < (3, 11):  # noqa: UP036  (a node's Python may not be the one that installed the package)
        yield Finding("wrong", "python", python, "install Python 3.11 or newer")
    else:
        yield Finding("ok", "python", python)
    yield from versions()
    compiler = next((name for name in ("g++", "c++", "clang++") if shutil.which(name)), None)
    yield Finding("ok", "compiler", f"{compiler or 'none'}; not needed, DeepSpeed's compiled operations are not used")


def versions() -> Iterator[Finding]:
    """Compares the installed packages with the required versions, and with the versions of the tests."""
    unmet = []
    for line in metadata.requires("ptuning") or []:
        needed = Requirement(line)
        if needed.marker and not needed.marker.evaluate({"extra": ""}):
            continue
        installed = _version(needed.name)
        if installed is None:
            unmet.append(f"{needed.name} is missing")
        elif not needed.specifier.contains(installed, prereleases=True):
            unmet.append(f"{needed.name} {installed} is not {needed.specifier}")
    if unmet:
        yield Finding("wrong", "packages", ", ".join(unmet), f"pip install -c {CONSTRAINTS} ptuning")
        return
    others = [
        f"{name} {installed} (tested: {version})"
        for name, version in pins().items()
        if (installed := _version(name)) is not None and installed.split("+")[0] != version
    ]
    if others:
        shown = ", ".join(others[:5]) + (f" and {len(others) - 5} more" if len(others) > 5 else "")
        yield Finding("warn", "packages", shown, f"in case of problems: pip install -c {CONSTRAINTS} ptuning")
    else:
        yield Finding("ok", "packages", "the tested versions" if pins() else "as required")


def pins() -> dict[str, str]:
    """Name -> tested version, from the installed package or its repository."""
    here = Path(__file__).parent.parent
    file = next((path for path in (here / CONSTRAINTS, here.parent / CONSTRAINTS) if path.is_file()), None)
    if file is None:
        return {}
    lines = (line.split("#")[0].strip() for line in file.read_text(encoding="utf-8").splitlines())
    return dict(line.split("==", 1) for line in lines if "==" in line)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _hardware() -> Iterator[Finding]:
    gpus = _gpus()
    if gpus and torch.version.cuda is None:
        yield Finding("wrong", "gpus", f"{len(gpus)}, but torch {torch.__version__} is a CPU build", "install torch for CUDA")
    else:
        names = ", ".join(sorted({name for name, _ in gpus}))
        yield Finding("ok", "gpus", f"{len(gpus)} x {names}" if gpus else "none; workers compute on the CPU")
    if gpus:
        half, fix = all(capability >= 8 for _, capability in gpus), "set model.dtype=float16 or float32, or use newer GPUs"
    else:
        half, fix = computes_in_bfloat16(), "set model.dtype=float32; bfloat16 works but is emulated"
    yield Finding("ok", "bf16", "computed in hardware") if half else Finding("warn", "bf16", "not computed in hardware", fix)
    memory = psutil.virtual_memory()
    text = f"{memory.available / GB:.1f} of {memory.total / GB:.1f} GB free, {os.cpu_count()} CPUs"
    enough = memory.available >= LEAST_MEMORY
    yield (
        Finding("ok", "memory", text)
        if enough
        else Finding("warn", "memory", text, "end other programs, or use a larger machine")
    )
    if Path("/dev/shm").is_dir():
        size = shutil.disk_usage("/dev/shm")
        text = f"{size.free / GB:.1f} of {size.total / GB:.1f} GB free"
        if size.free < LEAST_SHARED:
            yield Finding(
                "warn", "/dev/shm", text, "give containers more (docker run --shm-size=2g); Ray falls back to slow disk"
            )
        else:
            yield Finding("ok", "/dev/shm", text)


def _gpus() -> list[tuple[str, float]]:
    """Name and compute capability of every GPU of the machine, including those that this process may not use."""
    query = ["nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
        return [(name.strip(), float(capability)) for name, _, capability in (line.rpartition(",") for line in lines)]
    except (OSError, subprocess.SubprocessError, ValueError):
        return []


def _storage(folder: str, probe: str | None) -> Finding:
    try:
        storage.check_writable(folder)
        if probe:
            where, name = probe.split("/")
            storage.write_file(storage.join(folder, where), name, b"ok")
    except (UserError, OSError) as error:
        return Finding("wrong", "storage", *_split(str(error), "choose another folder"))
    return Finding("ok", "storage", f"{folder} can be written")


def _tracker(experiment: Experiment) -> Finding:
    try:
        uri = tracking_uri(experiment)
        file = database(uri)
        if file is not None:
            check_tracking(experiment)
            return Finding("ok", "mlflow", f"{redact(uri)}, a file on one machine")
        with asking(uri):
            connect(uri).search_experiments(max_results=1)
    except UserError as error:
        fix = "start the server, or correct tracking.uri"
        offline = isinstance(error, TrackingError) and error.code == OFFLINE
        return Finding("wrong", "mlflow", *((str(error), fix) if offline else _split(str(error), fix)))
    return Finding("ok", "mlflow", f"{redact(uri)} answers")


def _base(experiment: Experiment) -> tuple[Finding, str | None]:
    try:
        base = find_base(experiment.model)
        fingerprint = base.fingerprint.weights
    except UserError as error:
        return Finding("wrong", "base", *_split(str(error), "put it where every node can read it")), None
    return Finding("ok", "base", ", ".join([f"{base.name} in {base.folder}", fingerprint[:12], *base.notes])), fingerprint


def _split(sentence: str, fix: str) -> tuple[str, str]:
    """Splits an error of ptuning at its last semicolon, which precedes the fix."""
    text, semicolon, own = sentence.rpartition("; ")
    return (text, own) if semicolon else (sentence, fix)
