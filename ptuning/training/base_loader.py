"""Loads the base on a worker, whole or partitioned, and checks that it is the stored one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedModel

from ptuning.errors import BaseError
from ptuning.model.base import Base
from ptuning.model.prompted_model import PromptedModel
from ptuning.model.safetensors_files import STORED_DTYPES, stored_values
from ptuning.model.self_check import choose_pass
from ptuning.model.stored_names import stored_names
from ptuning.settings.training import ZeroConfig
from ptuning.training.distributed import Workers
from ptuning.training.messages import BaseShare

SAMPLES = 8
"""Elements per tensor and rank that are compared with the file after loading."""


def load(
    base: Base,
    zero: ZeroConfig,
    dtype: torch.dtype,
    *,
    checkpoint_gradients: bool = False,
    progress: Callable[[float], None] = lambda share: None,
) -> PromptedModel:
    """The base on this rank, ready to run: partitioned during loading (stage 3), or whole (stage 0). "auto" is whole for a
    single worker, and else partitioned; in a run the driver has decided it (`base_placement`).

    Stage 3 needs an initialised process group. Collective: every rank must call it. Only the first rank reads the files, tensor
    by tensor, and sends them to the others; `progress` receives the fraction of the elements that has arrived.

    Raises:
        BaseError: the loaded weights differ from the files, or no pass is right for this base.
    """
    alone = Workers.current().size == 1 and not zero.offload
    if zero.stage == 0 or (zero.stage == "auto" and alone):
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        model = PromptedModel(base.load(dtype, device))
        _check_weights(model.base, base)
        choose_pass(model, base.name)
    else:
        from ptuning.training import zero as partition  # imports DeepSpeed: seconds that a whole base does not need

        loaded, config = partition.load(base, zero, dtype, progress)
        model = PromptedModel(loaded)
        _check_weights(model.base, base)
        with partition.gathered(model, config, zero):
            choose_pass(model, base.name)
    if checkpoint_gradients:
        model.checkpoint_gradients()
    return model


def is_partitioned(model: nn.Module) -> bool:
    """Whether the base is divided among the workers, which then have to compute every pass together."""
    return any(hasattr(parameter, "ds_tensor") for parameter in model.parameters())


def sharding(model: nn.Module) -> BaseShare:
    """Bytes of the base that this rank holds, and bytes of the whole base."""
    held = whole = 0
    for parameter in model.parameters():
        own = _own_share(parameter)
        held += max(own.numel(), parameter.data.numel()) * own.element_size()
        whole += _numbers(_whole_shape(parameter)) * own.element_size()
    return BaseShare(held, whole)


def _own_share(parameter: nn.Parameter) -> torch.Tensor:
    """The part of a parameter that stays on this rank between passes: a flattened part, or the whole tensor."""
    share: torch.Tensor = getattr(parameter, "ds_tensor", parameter)
    return share.detach()


def _whole_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _check_weights(model: PreTrainedModel, base: Base) -> None:
    """Compare sampled elements of the tensors with their files, in this rank's own part, without communication. Several ranks
    divide the tensors: with all tensors on each of 512 ranks, a base of 405 B would be opened millions of times.

    Under ZeRO-3 transformers 5 does not report mismatched keys (integrations/deepspeed.py), and a base with random weights
    would train without any error.
    """
    stored = stored_names(model, base.tensors, base.renamed)
    workers = Workers.current()
    rank, compared = workers.rank, 0
    # transformers fills the row of the padding with zeros in some architectures (Youtu, 5.23).
    unused = {
        f"{name}.weight": module.padding_idx for name, module in model.named_modules() if isinstance(module, nn.Embedding)
    }
    for name, parameter in model.named_parameters():
        file = stored.get(name)
        shape = _whole_shape(parameter)
        if file is None or file.shape != shape or file.dtype not in STORED_DTYPES:
            continue  # merged or dequantised while loading, or tied: nothing to compare with
        compared += 1
        if hasattr(parameter, "ds_tensor") and compared % workers.size != rank:
            continue
        local = _own_share(parameter).flatten()
        first = rank * local.numel() if hasattr(parameter, "ds_tensor") else 0
        count = min(local.numel(), _numbers(shape) - first)
        for at in range(0, max(count, 0), max(1, count // SAMPLES)):
            expected = stored_values(file, first + at, 1).to(local.dtype)
            if not torch.equal(local[at : at + 1].cpu(), expected):
                if unused.get(name) == (first + at) // shape[-1]:
                    continue
                raise BaseError(f"model.path: {base.name} was not loaded as it is stored (tensor {name}); report this")
    if not compared:
        raise BaseError(f"model.path: no tensor of {base.name} could be compared with its file; convert the checkpoint")


def _numbers(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())
