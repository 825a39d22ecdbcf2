"""The only module that uses DeepSpeed: it partitions the frozen base over the data-parallel workers (ZeRO stage 3).

DeepSpeed partitions, gathers and releases the base. It has no optimiser: only the soft prompts are trained, a few thousand
numbers that stay whole on every rank, with plain torch optimisers and one small all-reduce per step. So every slot is
independent of the others (own optimiser, own clipping, own start and end; DeepSpeed clips one global norm and flattens all
groups, which Adafactor does not support), checkpoints do not depend on the number of workers, and the overhead of stage 3
around a step is avoided: its `step()` releases and gathers again every persistent tensor of a base that never changes.
"""

from __future__ import annotations

import copy
import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ptuning.errors import UserError
from ptuning.imports import load_deepspeed
from ptuning.model.base import Base, NotFilled
from ptuning.model.leaf_modules import leaf_modules
from ptuning.model.prompted_model import PromptedModel
from ptuning.planning.zero3_simulator import (
    kept_whole,
    live_numbers,
    node_copies_fit,
    nodes_are_even,
    prefetch_numbers,
    share_bytes,
)
from ptuning.redaction import logger
from ptuning.settings.training import ZeroConfig
from ptuning.training.distributed import Workers

load_deepspeed()

import deepspeed  # noqa: E402
import deepspeed.ops  # noqa: E402
from deepspeed.runtime.zero import partitioned_param_coordinator  # noqa: E402
from deepspeed.runtime.zero.linear import zero3_linear_wrap  # noqa: E402
from deepspeed.runtime.zero.parameter_offload import ZeROOrderedDict  # noqa: E402
from deepspeed.runtime.zero.partitioned_param_coordinator import ZeRoTraceMode  # noqa: E402
from deepspeed.utils.z3_leaf_module import set_z3_leaf_module, z3_leaf_module  # noqa: E402
from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config  # noqa: E402

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Names of glibc's settings (malloc.h)."""
log = logger(__name__)

PLAIN = ("builtins", "collections", type(ZeRoTraceMode.RECORD).__module__)
"""Where the types come from that hold what DeepSpeed has recorded; the others are streams and what it shares."""


def derive_config(zero: ZeroConfig, base: Base, dtype: torch.dtype, micro_batch: int = 1) -> dict[str, Any]:
    """DeepSpeed's configuration for a frozen base; `micro_batch` is only set because DeepSpeed requires it."""
    parameters = base.numbers
    layers = max(1, int(getattr(base.config.get_text_config(), "num_hidden_layers", 1)))
    workers, local, even = _workers()
    free, whole = _free(local), base.bytes(dtype)
    # Each rank divides the workers by its own node's number: with nodes of several sizes, DeepSpeed would fail or wait forever.
    copies = even and node_copies_fit(whole, workers, local, free)
    if zero.node_copies is not None:
        copies = even and zero.node_copies and nodes_are_even(workers, local)
    share = 0 if zero.offload else share_bytes(whole, workers, local if copies else 0)
    share += (zero.persistent_parameters or 0) * dtype.itemsize
    live = zero.live_parameters or live_numbers(free, share, dtype.itemsize)
    partition: dict[str, Any] = {
        "stage": 3,
        # The default would allocate 5e8 elements for gradients, which do not exist here.
        "reduce_bucket_size": 1_000_000,
        "stage3_param_persistence_threshold": zero.persistent_below,
        "stage3_prefetch_bucket_size": prefetch_numbers(parameters, layers, live),
        "stage3_max_live_parameters": live,
        "stage3_max_reuse_distance": live,
        "overlap_comm": torch.cuda.is_available(),
    }
    if copies:
        # Several nodes: a second copy of the weights per node, which never change, keeps all later gathers inside the node
        # (ZeRO++, arXiv 2306.10209, section 3.2).
        partition["zero_hpz_partition_size"] = local
    if zero.offload:
        partition["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "zero_optimization": partition,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},  # without an optimiser of its own, DeepSpeed does not scale the loss
        "steps_per_print": 2**31,
    }


def _workers() -> tuple[int, int, bool]:
    """The number of all workers, and of those on this node; whether all nodes have the same number."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    workers = Workers.current()
    return workers.size, local, len(set(workers.all_gather(local))) == 1


def _free(local: int) -> int:
    """Free bytes of this worker before the base is loaded: the minimum over all workers, because their passes must be equal."""
    gpu = torch.cuda.is_available()
    free = int(torch.cuda.mem_get_info()[0]) if gpu else int(psutil.virtual_memory().available) // local
    return int(min(Workers.current().all_gather(free)))


def load(
    base: Base, zero: ZeroConfig, dtype: torch.dtype, progress: Callable[[float], None] = lambda share: None
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """This rank's shares of the base, and DeepSpeed's configuration for it. Collective."""
    config = derive_config(zero, base, dtype)
    _skip_compiled_collectives()
    deepspeed.init_distributed(verbose=False)
    with _telling(progress, base.numbers), _freed_at_once():
        return _load_partitioned(base, dtype, config), config


@contextmanager
def gathered(model: PromptedModel, config: dict[str, Any], zero: ZeroConfig) -> Iterator[None]:
    """Gather and release the base's tensors in all passes from now on; those inside are forgotten (`_unrecorded`)."""
    layers = int(getattr(model.base.config.get_text_config(), "num_hidden_layers", 0))
    leaves = leaf_modules(model.base, layers)
    for leaf in leaves:
        set_z3_leaf_module(leaf, True)
    engine = deepspeed.initialize(model=model, config=config)[0]  # installs the hooks that gather and release
    for leaf in leaves:
        leaf.register_forward_pre_hook(_follow_keywords, with_kwargs=True)
    torch.nn.functional.linear = _linear  # type: ignore[assignment]  # in the place of DeepSpeed's
    partitioned_param_coordinator.iter_params = _own_parameters
    _keep(model, zero)
    with _unrecorded(engine.optimizer.param_coordinator), _discovered(model):
        yield


def _follow_keywords(module: Any, arguments: Any, options: dict[str, Any]) -> Any:
    """DeepSpeed releases a module's tensors once the gradients of its inputs are known, but only of positional ones (0.19): an
    attention that gets its states by keyword would keep its tensors until the end of the backward pass."""
    followed = {
        name: module.post_bwd_fn.apply(value)
        for name, value in options.items()
        if isinstance(value, Tensor) and value.requires_grad
    }
    return (arguments, options | followed) if followed else None


_all_parameters = partitioned_param_coordinator.iter_params


def _own_parameters(module: Any, recurse: bool = False) -> Any:
    """The tensors that a module's hooks gather: its own, those that it uses of other modules, and for a leaf those inside.

    To decide what to release, DeepSpeed (0.19, `__params_to_release`) asks for the tensors of later modules with the `recurse`
    of the module that is released: leaves count nothing after another module, and whole decoder layers count after a leaf.
    """
    return _all_parameters(module, recurse=z3_leaf_module(module))


def _keep(model: PromptedModel, zero: ZeroConfig) -> None:
    """Mark the tensors that stay whole on every rank after their first use. DeepSpeed's own limit on their sum
    (stage3_model_persistence_threshold, 0.19) counts also those of other bases in this process."""
    parameters: list[Any] = list(model.parameters())
    late = next((at for at, each in enumerate(parameters) if each is model.base.get_input_embeddings().weight), -1)
    itemsize = model.base.dtype.itemsize
    sizes = [-(-each.ds_numel * each.ds_tensor.element_size() // itemsize) for each in parameters]
    kept = kept_whole(sizes, zero.persistent_below, zero.persistent_parameters or 0, late)
    for at, parameter in enumerate(parameters):
        parameter.ds_persist = at in kept


def _load_partitioned(base: Base, dtype: torch.dtype, config: dict[str, Any]) -> PreTrainedModel:
    """transformers builds the model under `zero.Init` as long as an HfDeepSpeedConfig exists.

    Some architectures cannot be built that way, because they initialise tensors by their shapes (RWKV, RoFormer; 5.23), or are
    not filled (DeepSeek V4). Then every rank loads the whole base, and it is partitioned afterwards.
    """
    base.check_tensors()
    if not base.loaded_whole:
        keep_alive = HfDeepSpeedConfig(config)
        try:
            return base.load(dtype)
        except (IndexError, ValueError) as error:
            if isinstance(error, UserError) and not isinstance(error, NotFilled):
                raise
            log.warning(
                "%s cannot be partitioned while it is loaded, so every worker loads it whole (%s)",
                base.name,
                str(error).splitlines()[0],
            )
        finally:
            del keep_alive
            unset_hf_deepspeed_config()
    loaded = base.load(dtype)
    deepspeed.zero.Init(module=loaded, config_dict_or_path=config)
    return loaded


@contextmanager
def _unrecorded(coordinator: Any) -> Iterator[None]:
    """Let DeepSpeed forget the passes inside. It records the first pass to know what the next one needs, and after passes of
    another kind it gathers the output head twice in every later one (0.19)."""
    before = {name: copy.copy(value) for name, value in vars(coordinator).items() if type(value).__module__ in PLAIN}
    yield
    vars(coordinator).update(before)


@contextmanager
def _discovered(model: PromptedModel) -> Iterator[None]:
    """Let DeepSpeed see which modules use parameters of other modules (a convolution's weight in a state space): from then on
    it gathers them, too. It looks only while its engine is called (`_forward_prologue`, 0.19), and here the model is."""
    containers = [module._parameters for module in model.modules() if isinstance(module._parameters, ZeROOrderedDict)]
    for parameters in containers:
        parameters._in_forward = True
    try:
        yield
    finally:
        for parameters in containers:
            parameters._in_forward = False


@contextmanager
def _telling(progress: Callable[[float], None], numbers: int) -> Iterator[None]:
    """transformers gathers a module's tensors to fill them (integrations/deepspeed.py): the only indication of its progress."""
    original, arrived = deepspeed.zero.GatheredParameters, 0

    class Counting(original):  # type: ignore[misc, valid-type]
        def __exit__(self, *error: Any) -> None:
            nonlocal arrived
            super().__exit__(*error)
            arrived += sum(parameter.ds_numel for parameter in self.params) if self.enabled else 0
            progress(min(1.0, arrived / numbers))

    deepspeed.zero.GatheredParameters = Counting
    try:
        yield
    finally:
        deepspeed.zero.GatheredParameters = original


@contextmanager
def _freed_at_once() -> Iterator[None]:
    """Make glibc allocate large blocks with mmap, so that their memory returns to the system when they are freed.

    While a base is partitioned, each tensor is first allocated whole and then its part after it. In the heap, the freed whole
    tensors leave gaps between the parts that are too small for the next ones (measured: a rank with half of 388 MiB used 546).
    Afterwards the default is restored, because mmap for every activation would make a step 1.5 times as long.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None or "MALLOC_MMAP_THRESHOLD_" in os.environ:  # set by the user
        yield
        return
    mallopt(M_MMAP_THRESHOLD, 1 << 20)
    try:
        yield
    finally:
        mallopt(
            M_MMAP_THRESHOLD, 32 << 20
        )  # the values that glibc's dynamic thresholds reach when such blocks are freed: this and twice this
        mallopt(M_TRIM_THRESHOLD, 64 << 20)


class _FrozenLinear(torch.autograd.Function):
    """A linear map whose weights are frozen and partitioned between passes.

    torch's own linear map would keep the gathered weights until its backward pass. DeepSpeed's (runtime/zero/linear.py) keeps
    the parameter instead, which is released in between. But it also keeps the input, which only a gradient of the weights would
    need: a third of the memory that a Llama layer keeps. The linear map here keeps only the parameter.
    """

    @staticmethod
    def forward(context: Any, values: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        context.save_for_backward(weight)
        result = values.matmul(weight.t())
        return result if bias is None else result.add_(bias)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        [weight] = context.saved_tensors
        return gradients[0].matmul(weight), None, None


def _linear(values: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        return zero3_linear_wrap(values, weight, bias)
    return _FrozenLinear.apply(values, weight, bias)


def _skip_compiled_collectives() -> None:
    """On CPU DeepSpeed 0.19 compiles a shared-memory all-reduce at initialisation, and fails if there is no compiler.

    Only its inference engine uses it (deepspeed/comm/torch.py, `inference_all_reduce`), so it is declared unavailable.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
