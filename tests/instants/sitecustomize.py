"""Faults at exact instants, in processes that a test starts. Python imports this by itself where the folder is on its path.

`PTUNING_INSTANTS` names a folder with a `plan.json`: a list of {"when", "step", "rank", "do"}. A worker that reaches such an
instant writes `<number>.json` (its pid and the time) beside the plan, does it, and never does it again.

when: loading (step 0), forward, backward (mid-way), barrier (the others wait in the all-reduce), half-written and renamed (its
checkpoint)
do: kill, stop (as with Ctrl-Z), sleep, raise, hog (takes memory until it is killed)
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import json
import os
import signal
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

FOLDER = os.environ.get("PTUNING_INSTANTS")


def reached(when: str, step: int) -> None:
    folder = Path(str(FOLDER))
    plan = folder / "plan.json"
    for number, instant in enumerate(json.loads(plan.read_text()) if plan.exists() else []):
        if (instant["when"], instant["step"], instant["rank"]) != (when, step, int(os.environ.get("RANK", 0))):
            continue
        try:
            handle = os.open(folder / f"{number}.json", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            continue
        os.write(handle, json.dumps({"pid": os.getpid(), "time_ms": time.time() * 1000}).encode())
        os.close(handle)
        if instant["do"] == "sleep":
            time.sleep(3600)
        elif instant["do"] == "raise":
            raise RuntimeError("as planned")
        elif instant["do"] == "hog":
            taken = []
            while len(taken) < 400:
                taken.append(b"x" * 2**25)
                time.sleep(0.02)
        else:
            os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[instant["do"]])


NOW: dict[str, Any] = {"step": 0, "writing": False, "synced": 0}


def prepare(train: ModuleType) -> None:
    """Put the instants into the loop."""
    from ptuning.training import stepper

    whole_step, plan_targets = train.step, stepper.pack_targets
    backward, reduce = stepper.Stepper._backward, stepper.Stepper._reduce

    def step(pack: Any, report: Any) -> None:
        for slot in pack.slots:
            NOW["step"] = slot.step + 1
        whole_step(pack, report)

    def forward(*arguments: Any) -> Any:
        reached("forward", NOW["step"])
        return plan_targets(*arguments)

    def mid_way(self: Any, together: Any, *arguments: Any) -> Any:
        hook = together.blocks[0].vectors.register_hook(lambda gradient: reached("backward", NOW["step"]))
        losses = backward(self, together, *arguments)
        hook.remove()
        return losses

    def barrier(*arguments: Any) -> Any:
        reached("barrier", NOW["step"])
        return reduce(*arguments)

    train.step, stepper.pack_targets = step, forward  # type: ignore[attr-defined]
    stepper.Stepper._backward, stepper.Stepper._reduce = mid_way, barrier  # type: ignore[method-assign]
    prepare_writing(train.checkpoint, train.storage)


def prepare_writing(checkpoint: ModuleType, storage: ModuleType) -> None:
    save, sync_folder, fsync = checkpoint.save, storage._sync_folder, os.fsync

    def saving(*arguments: Any) -> None:
        NOW.update(writing=True, synced=0)
        save(*arguments)
        NOW["writing"] = False

    def syncing(handle: int) -> None:
        fsync(handle)
        NOW["synced"] += 1
        if NOW["writing"] and NOW["synced"] == 2:
            reached("half-written", NOW["step"])

    def renamed(path: Path) -> None:
        if NOW["writing"]:
            reached("renamed", NOW["step"])
        sync_folder(path)

    checkpoint.save, storage._sync_folder, os.fsync = saving, renamed, syncing  # type: ignore[attr-defined]


def prepare_loading(worker: ModuleType) -> None:
    find_base = worker.find_base

    def finding(*arguments: Any) -> Any:
        reached("loading", 0)
        return find_base(*arguments)

    worker.find_base = finding  # type: ignore[attr-defined]


PREPARE = {"ptuning.training.loop": prepare, "ptuning.training.worker": prepare_loading}


class Finder(importlib.abc.MetaPathFinder):
    """Prepares these modules when they are imported, wherever that happens; costs nothing before."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name not in PREPARE:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        assert spec is not None and spec.loader is not None
        execute = spec.loader.exec_module

        def execute_and_prepare(module: ModuleType) -> None:
            execute(module)
            PREPARE[name](module)

        spec.loader.exec_module = execute_and_prepare  # type: ignore[method-assign]
        return spec


if FOLDER:
    sys.meta_path.insert(0, Finder())
