"""What is said when a run has failed. Real processes that are killed: `test_faults`."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from ray.train.v2.api.exceptions import WorkerGroupError

from ptuning.cluster import failures

pytestmark = pytest.mark.usefixtures("local_ray")

ECHO = (
    "RuntimeError: [/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:48325: "
    "Connection reset by peer. This is typically caused by a remote worker hanging"
)
SILENT = "A worker health check failed.\nWorker info: Worker(hostname='a', node_id='x', pid=7, world_rank=1)\n"


def explain(tmp_path: Path, *workers: str) -> str:
    error = WorkerGroupError("all of it", {rank: RuntimeError(said) for rank, said in enumerate(workers)})
    said, _, rest = failures.explain(error, str(tmp_path / "toy")).rpartition("; see ")
    log, logs = rest.split(", and Ray's own logs in ")
    assert "all of it" in Path(log).read_text(encoding="utf-8")
    assert any(Path(logs).glob("worker-*.err"))
    return said


@pytest.mark.parametrize(
    "workers, said",
    [
        (["Traceback ...\nRuntimeError: boom"], "RuntimeError: boom"),
        ([ECHO, "Traceback ...\nRuntimeError: boom"], "RuntimeError: boom"),
        ([ECHO, f"{SILENT}The actor died unexpectedly before finishing this task."], "worker 1 (pid 7 on a) was killed or "),
        ([ECHO, f"{SILENT}The actor is dead because its node has died."], "the node of worker 1 (pid 7 on a) was lost"),
        ([ECHO], "a worker has lost its connection to another one, whose process or node has died"),
        ([f"{SILENT}timed out"], "worker 1 (pid 7 on a) does not respond"),
    ],
)
def test_the_cause_is_named_in_one_sentence(tmp_path: Path, workers: list[str], said: str) -> None:
    assert explain(tmp_path, *workers).startswith(f"a worker failed: {said}")


@pytest.mark.parametrize(
    "take", [lambda: torch.empty(2**56), lambda: np.empty(2**56), lambda: bytes(2**56)], ids=["torch", "numpy", "python"]
)
def test_want_of_memory_is_named_with_what_needs_less(tmp_path: Path, take: Callable[[], object]) -> None:
    with pytest.raises((RuntimeError, MemoryError)) as raised:
        take()
    wanting = f"Traceback ...\n{raised.type.__name__}: {raised.value}"
    assert re.match(
        r"a worker ran out of memory \(.+\); free memory and .* smaller train.batch_size", explain(tmp_path, wanting)
    )


def test_want_of_memory_on_a_gpu_is_named(tmp_path: Path) -> None:
    # As torch 2.13 says it (c10/cuda/CUDACachingAllocator.cpp); there is no GPU to see it on.
    wanting = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8.00 GiB"
    said = explain(tmp_path, ECHO, wanting)
    assert said.startswith("a worker ran out of memory (CUDA out of memory. Tried to allocate 2.00 GiB); ")
