"""Gradients of two processes that share a base by ZeRO-3."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor

from ptuning.errors import UserError
from ptuning.model.base import find_base
from ptuning.model.packing import Row, pack_targets
from ptuning.settings.fields import EightBits
from ptuning.settings.model import ModelConfig
from ptuning.settings.training import ZeroConfig
from ptuning.training import base_loader
from ptuning.training.distributed import Workers

SECONDS = 100


class SharedFailed(RuntimeError):
    """A process failed; the message is its error's first line."""


def gradients_of_two(
    folder: Path,
    soft_prompts: Sequence[Tensor],
    rows: Sequence[Sequence[Row]],
    work: Path,
    quantization: EightBits | None = None,
) -> list[Tensor]:
    """The gradient of each soft prompt for the sum of its rows' losses; each process computes every second row.

    The processes are forked: importing everything again would take ten seconds for each.
    """
    context = multiprocessing.get_context("fork")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    model = ModelConfig(path=str(folder), quantization=quantization)
    arguments = (port, model, [each.detach() for each in soft_prompts], rows, work)
    started = [context.Process(target=_work, args=(rank, *arguments)) for rank in range(2)]
    for process in started:
        process.start()
    try:
        for process in started:
            process.join(SECONDS)
    finally:
        for process in started:
            if process.is_alive():
                process.kill()
    failed = sorted(work.glob("zero-*.txt"))
    said = [json.loads(file.read_text(encoding="utf-8")) for file in failed]
    if refused := next((each for each in said if each["refused"]), None):
        raise UserError(refused["message"])
    if said:
        raise SharedFailed(f"{said[0]['type']}: {said[0]['message'][:200]}")
    if any(process.exitcode for process in started):
        raise SharedFailed(f"a process ended with exit code {max(abs(process.exitcode or 0) for process in started)}")
    found = safetensors.torch.load_file(work / "zero.safetensors")
    return [found[str(k)] for k in range(len(soft_prompts))]


def _work(
    rank: int, port: int, model: ModelConfig, vectors: Sequence[Tensor], rows: Sequence[Sequence[Row]], work: Path
) -> None:
    os.environ |= {
        **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
    }
    try:
        dist.init_process_group("gloo", rank=rank, world_size=2)
        workers = Workers.current()
        base = find_base(model)
        shared = base_loader.load(base, ZeroConfig(stage=3, persistent_below=50), torch.float32)
        prompts = [each.clone().requires_grad_() for each in vectors]
        plan = pack_targets([len(each) for each in prompts], [batch[rank::2] for batch in rows])
        shared(prompts, plan).sum().backward()
        gradients = {str(k): workers.all_reduce(each.grad) for k, each in enumerate(prompts) if each.grad is not None}
        if rank == 0:
            safetensors.torch.save_file(gradients, work / "zero.safetensors")
    except Exception as error:
        line = (str(error).splitlines() or [""])[0]
        said = {"type": type(error).__name__, "message": line, "refused": isinstance(error, UserError)}
        (work / f"zero-{rank}.txt").write_text(json.dumps(said), encoding="utf-8")
        sys.stdout.flush()
        os._exit(1)  # the other process may wait for this one
    os._exit(0)
