"""The only door to DeepSpeed: the frozen base spread over the data-parallel workers (ZeRO stage 3).

DeepSpeed partitions, gathers and releases the base. It gets no optimiser: the only trained numbers are the soft prompts, a
few thousand, which stay whole on every rank, with plain torch optimisers and one small all-reduce per step. That keeps
every slot independent of the others (own optimiser, own clipping, own arrival and end; DeepSpeed clips one global norm and
flattens all groups, on which Adafactor cannot work), keeps checkpoints free of the number of workers, and saves what
stage 3 does around a step: its `step()` releases and re-gathers every persistent tensor of a base that never changed.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel

from ptuning.base import STORED_DTYPES, Base, BaseError, stored_tensors, stored_values
from ptuning.config import ZeroConfig
from ptuning.model import PromptedModel

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # detection by DeepSpeed may find mps on a Mac, which ZeRO cannot use

import deepspeed  # noqa: E402  (reads DS_ACCELERATOR when it is imported)
import deepspeed.ops  # noqa: E402
from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config  # noqa: E402

SAMPLES = 8
"""Numbers per tensor and rank that are compared with the file after loading."""


@dataclass(frozen=True)
class Sharding:
    """What one rank holds of the base after loading, in bytes."""

    held: int
    whole: int


def derive_config(zero: ZeroConfig, base: Base, dtype: torch.dtype, micro_batch: int = 1) -> dict[str, Any]:
    """DeepSpeed's configuration for a frozen base; `micro_batch` is only there because DeepSpeed insists on one."""
    parameters = sum(_numbers(tensor.shape) for tensor in stored_tensors(base.folder))
    layers = max(1, int(getattr(base.config.get_text_config(), "num_hidden_layers", 1)))
    live = zero.live_parameters or _live_budget(dtype)
    partition: dict[str, Any] = {
        "stage": zero.stage,
        # The default of 5e8 numbers would be allocated for gradients that do not exist here.
        "reduce_bucket_size": 1_000_000,
        "stage3_param_persistence_threshold": zero.persistent_below,
        "stage3_prefetch_bucket_size": min(live, 2 * parameters // layers),
        "stage3_max_live_parameters": live,
        "stage3_max_reuse_distance": live,
        "overlap_comm": torch.cuda.is_available(),
    }
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if zero.stage == 3 and local > 1 and dist.is_initialized() and dist.get_world_size() > local:
        # Several nodes: a second copy per node of weights that never change keeps all later gathers inside the node
        # (ZeRO++, arXiv 2306.10209, section 3.2).
        partition["zero_hpz_partition_size"] = local
    if zero.offload:
        partition["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "zero_optimization": partition,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "steps_per_print": 2**31,
    }


def _live_budget(dtype: torch.dtype) -> int:
    """Numbers of the base that may be gathered at once: a third of the free memory, shared by the host's workers."""
    if torch.cuda.is_available():
        free = torch.cuda.mem_get_info()[0]
    else:
        free = psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(10_000_000, free // 3 // dtype.itemsize)


def load(base: Base, zero: ZeroConfig, dtype: torch.dtype, *, checkpoint_gradients: bool = False) -> PromptedModel:
    """The base on this rank, ready to run: partitioned while it is loaded (stage 3), or whole (stage 0).

    Needs an initialised process group for stage 3. Collective: every rank calls it.

    Raises:
        BaseError: what was loaded is not what the files hold.
    """
    if zero.stage == 0:
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        model = PromptedModel(base.load(dtype))
        _check_weights(model.base, base)
        model.to(device)
    else:
        config = derive_config(zero, base, dtype)
        _skip_compiled_collectives()
        deepspeed.init_distributed(verbose=False)
        loaded = _load_partitioned(lambda: base.load(dtype), config)
        model = PromptedModel(loaded)
        _check_weights(model.base, base)
        deepspeed.initialize(model=model, config=config)  # installs the hooks that gather and release
    if checkpoint_gradients:
        model.checkpoint_gradients()
    return model


def _load_partitioned(load_base: Callable[[], PreTrainedModel], config: dict[str, Any]) -> PreTrainedModel:
    """transformers builds the model under `zero.Init` as long as an HfDeepSpeedConfig lives."""
    keep_alive = HfDeepSpeedConfig(config)
    try:
        return load_base()
    finally:
        del keep_alive
        unset_hf_deepspeed_config()


def _skip_compiled_collectives() -> None:
    """On CPU DeepSpeed 0.19 compiles a shared-memory all-reduce when it is initialised, and dies where there is no compiler.

    Only its inference engine uses it (deepspeed/comm/torch.py, `inference_all_reduce`), so it is declared absent.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def sharding(model: nn.Module) -> Sharding:
    """Bytes of the base that this rank holds, and bytes of the whole base."""
    held = whole = 0
    for parameter in model.parameters():
        own = _own_share(parameter)
        held += max(own.numel(), parameter.data.numel()) * own.element_size()
        whole += _numbers(_whole_shape(parameter)) * own.element_size()
    return Sharding(held, whole)


def _own_share(parameter: nn.Parameter) -> torch.Tensor:
    """What stays on this rank between passes: the flattened part of a partitioned tensor, or a whole one."""
    share: torch.Tensor = getattr(parameter, "ds_tensor", parameter)
    return share.detach()


def _whole_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def weights_hash(model: nn.Module) -> str:
    """SHA-256 over every base tensor as this rank holds it: equal before and after training (law 2)."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(name.encode())
        digest.update(_own_share(parameter).cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _check_weights(model: PreTrainedModel, base: Base) -> None:
    """Compare sampled numbers of every tensor with the file, in this rank's own share, without communication.

    Under ZeRO-3 transformers 5 does not report mismatched keys (integrations/deepspeed.py), and a base that is silently
    random trains without any error.
    """
    stored = {tensor.name: tensor for tensor in stored_tensors(base.folder)}
    rank = dist.get_rank() if dist.is_initialized() else 0
    compared = 0
    for name, parameter in model.named_parameters():
        file = stored.get(name) or stored.get(name.removeprefix(f"{model.base_model_prefix}."))
        shape = _whole_shape(parameter)
        if file is None or file.shape != shape or file.dtype not in STORED_DTYPES:
            continue  # renamed or merged while loading, or tied: nothing to compare with
        local = _own_share(parameter).flatten()
        first = rank * local.numel() if hasattr(parameter, "ds_tensor") else 0
        count = min(local.numel(), _numbers(shape) - first)
        for at in range(0, max(count, 0), max(1, count // SAMPLES)):
            expected = stored_values(file, first + at, 1).to(local.dtype)
            if not torch.equal(local[at : at + 1].cpu(), expected):
                raise BaseError(f"model.path: {base.name} was not loaded as it is stored (tensor {name}); report this")
            compared += 1
    if not compared:
        raise BaseError(f"model.path: no tensor of {base.name} could be compared with its file; convert the checkpoint")


def _numbers(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())
