"""A pretended accelerator: the device `pretend`, whose tensors are CPU tensors in a wrapper.

It raises where a GPU would (tensors of two devices in one operation) and counts what costs time on one: kernels, copies and
waits of the host, each with its place in the source. It cannot see streams and races, which kernel is chosen, memory, NCCL.

torch registers such a device from Python (`_setup_privateuseone_for_python_backend`, 2.13) and cannot forget it. `pretended`
therefore makes it available only inside, and the rest of the process computes as before. Nothing else replaces it: a fake CUDA
device aborts the process on a CPU build of torch, and the meta device accepts tensors of two devices.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from ptuning.model import varlen_attention

NAME = "pretend"

COPIES = {"copy_", "_to_copy", "_copy_from", "_copy_from_and_resize"}
"""Operations whose tensors may be on two devices."""
CPU_INDEX = {"index", "index_put", "index_put_", "_index_put_impl_"}
"""Operations that CUDA lets have an index on the CPU, which it copies."""
WAITS = {"_local_scalar_dense"}
KERNEL_AND_WAIT = {"nonzero", "_unique2", "unique_dim", "unique_consecutive", "masked_select", "is_nonzero", "equal"}
"""Operations whose result has a size, or is a value, that the host must know."""
VIEWS = {
    *("view", "_unsafe_view", "expand", "transpose", "permute", "t", "slice", "select", "unsqueeze", "squeeze", "split"),
    *("split_with_sizes", "alias", "detach", "detach_", "as_strided", "unbind", "reshape", "_reshape_alias", "unfold"),
    *("diagonal", "narrow", "lift_fresh", "view_as", "unflatten", "flatten", "chunk", "is_same_size", "empty", "empty_like"),
    *("empty_strided", "new_empty", "new_empty_strided", "resize_", "set_", "requires_grad_", "transpose_", "t_"),
    *("squeeze_", "unsqueeze_", "_reshape_copy", "movedim", "swapaxes", "view_as_real", "view_as_complex", "real", "imag"),
}
"""Operations without a kernel."""
INSIDE = f"{Path(__file__).parents[2] / 'ptuning'}/"


class Device:
    """The state of the device: whether it is there, and the counters."""

    def __init__(self) -> None:
        self.available = False
        self.synchronised = 0
        self.counts: Counter[str] | None = None
        self.places: Counter[tuple[str, str]] = Counter()

    def count(self, kind: str, name: str) -> None:
        if self.counts is not None:
            self.counts[kind] += 1
            self.places[kind, f"{name} at {place()}"] += 1


DEVICE = Device()


def place() -> str:
    """Module and line of the innermost frame that is in the package, else of the caller of torch."""
    frame, other = sys._getframe(1), "?"
    while frame:
        file = frame.f_code.co_filename
        if file.startswith(INSIDE):
            return f"{file.removeprefix(INSIDE)}:{frame.f_lineno}"
        if other == "?" and "/torch/" not in file and file != __file__:
            other = f"{Path(file).name}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return other


class Pretended(torch.Tensor):
    """A tensor of the device: `raw` is its value on the CPU."""

    raw: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, raw: Tensor) -> Pretended:
        made: Pretended = torch.Tensor._make_wrapper_subclass(
            cls,
            raw.size(),
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device=torch.device(NAME, 0),
            requires_grad=False,
        )
        made.raw = raw
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})

    def tolist(self) -> Any:
        DEVICE.count("waits", "tolist")
        return self.raw.tolist()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Pretended({self.raw!r})"


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operation in which at least one tensor is of the device, or whose result is to be."""
    name = func._schema.name.removeprefix("aten::")
    tensors = [each for each in flat((*args, *kwargs.values())) if isinstance(each, Tensor)]
    wrappers = {id(each.raw): each for each in tensors if isinstance(each, Pretended)}
    strange = [each for each in tensors if not isinstance(each, Pretended)]
    if strange and wrappers and name not in COPIES:
        check_devices(name, args, strange)
    target = kwargs.get("device")
    raw_args = [mapped(raw, each) for each in args]
    raw_kwargs = {key: mapped(raw, value) for key, value in kwargs.items()}
    raw_kwargs |= {"device": torch.device("cpu")} if target is not None else {}
    raw_kwargs |= {"pin_memory": False} if kwargs.get("pin_memory") else {}
    count(name, args, kwargs)
    if name == "_to_copy":
        return moved(func, raw_args, raw_kwargs, args[0], target)
    if name in COPIES:
        into, source = order(name, raw_args)
        into.copy_(source)
        return order(name, args)[0]
    wrappers |= {id(each): each for each in strange}
    result = FLASH.get(name, func)(*raw_args, **raw_kwargs)

    def wrapped(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        known = wrappers.get(id(value))
        return Pretended(value) if known is None else known

    return mapped(wrapped, result)


def flat(values: Any) -> Iterator[Any]:
    """The values, and those in lists among them."""
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from flat(value)
        else:
            yield value


def mapped(change: Callable[[Any], Any], value: Any) -> Any:
    """A value or a list of values, changed."""
    if isinstance(value, (list, tuple)):
        return type(value)([mapped(change, each) for each in value])
    return change(value)


def raw(value: Any) -> Any:
    return value.raw if isinstance(value, Pretended) else value


def order(name: str, args: Any) -> tuple[Any, Any]:
    """Target and source of a copy."""
    return (args[0], args[1]) if name == "copy_" else (args[1], args[0])


def moved(func: Any, args: Any, kwargs: dict[str, Any], source: Tensor, target: Any) -> Tensor:
    """`tensor.to(...)`: to the CPU, to the device, or to another dtype."""
    result: Tensor = func(*args, **kwargs)
    to = torch.device(target) if target is not None else source.device
    if result.data_ptr() == raw(source).data_ptr() and result.numel():
        result = result.clone()
    return Pretended(result) if to.type == NAME else result


def count(name: str, args: Any, kwargs: dict[str, Any]) -> None:
    """Count an operation."""
    if DEVICE.counts is None:
        return
    if name in COPIES - {"_to_copy"}:
        into, source = order(name, args)
        flags = (*args[2:3], kwargs.get("non_blocking"))
        count_copy(name, isinstance(source, Pretended), isinstance(into, Pretended), any(flags))
    elif name == "_to_copy":
        there, target = isinstance(args[0], Pretended), kwargs.get("device")
        to = torch.device(target).type if target is not None else NAME if there else "cpu"
        count_copy(name, there, to == NAME, bool(kwargs.get("non_blocking")))
    elif name in WAITS:
        DEVICE.count("waits", name)
    elif name in KERNEL_AND_WAIT or (name == "index" and has_mask(args)):
        DEVICE.count("waits", name)
        DEVICE.count("kernels", name)
    elif name not in VIEWS:
        DEVICE.count("kernels", name)


def count_copy(name: str, there: bool, to_there: bool, non_blocking: bool) -> None:
    """A copy inside the device is a kernel. For one from the host, the host waits unless it says otherwise (and the memory is
    pinned, which cannot be seen here)."""
    if there and to_there:
        DEVICE.count("kernels", name)
    elif to_there:
        DEVICE.count("sent" if non_blocking else "to device", name)
    elif there:
        DEVICE.count("to host", name)


def has_mask(args: Any) -> bool:
    """Whether an indexing has a mask: then the size of the result depends on values."""
    return any(isinstance(index, Tensor) and index.dtype == torch.bool for index in args[1])


def check_devices(name: str, args: Any, strange: list[Tensor]) -> None:
    """Raise as CUDA does if there are CPU tensors. Allowed there: tensors without dimensions, and indices."""
    strange = [tensor for tensor in strange if tensor.dim() > 0]
    if not strange:
        return
    if name in CPU_INDEX and isinstance(args[0], Pretended):
        indices = {id(index) for index in args[1] if isinstance(index, Tensor)}
        if all(id(tensor) in indices for tensor in strange):
            DEVICE.count("to device", f"{name} (index)")
            return
    raise RuntimeError(
        f"Expected all tensors to be on the same device, but found at least two devices, {NAME}:0 and cpu! "
        f"(in {name} at {place()})"
    )


def flash_forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any) -> Any:
    """`aten::_flash_attention_forward`, which torch has for GPUs only."""
    none = torch.empty(0)
    return (*varlen_attention.plain_forward(q, k, v, *flash_arguments(rest, options)), none, none, none)


def flash_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, *rest: Any, **options: Any
) -> Any:
    """`aten::_flash_attention_backward`."""
    for _ in range(2):  # three kernels: sums of the output's gradients, those of keys and values, those of queries
        DEVICE.count("kernels", "_flash_attention_backward")
    assert sums.is_contiguous()
    return varlen_attention.plain_backward(gradient, q, k, v, out, sums, *flash_arguments(rest, options))


def flash_arguments(rest: Any, options: dict[str, Any]) -> tuple[varlen_attention.Sequences, float | None]:
    """What the two have in common, after the tensors."""
    queries, keys, longest_queries, longest_keys, _, causal, *_ = rest
    assert queries.dtype == keys.dtype == torch.int32
    window = options["window_size_left"]
    assert options["window_size_right"] == (0 if causal else -1)
    return (
        varlen_attention.Sequences(queries, keys, longest_queries, longest_keys, causal, None if window < 0 else window + 1),
        options["scale"],
    )


FLASH = {"_flash_attention_forward": flash_forward, "_flash_attention_backward": flash_backward}


class Module:
    """What `torch.pretend` is: as `torch.cuda`."""

    __name__ = f"torch.{NAME}"

    def is_available(self) -> bool:
        return DEVICE.available

    def device_count(self) -> int:
        return int(DEVICE.available)

    def current_device(self) -> int:
        return 0

    def set_device(self, device: Any) -> None:
        pass

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed(self, seed: int) -> None:
        pass

    def manual_seed_all(self, seed: int) -> None:
        pass

    def get_rng_state(self, device: Any = 0) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_rng_state(self, state: Tensor, device: Any = 0) -> None:
        pass

    def synchronize(self, device: Any = None) -> None:
        DEVICE.synchronised += 1

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    def is_initialized(self) -> bool:
        return True

    def _lazy_init(self) -> None:
        pass

    def empty_cache(self) -> None:
        pass


@cache
def register() -> torch.library.Library:
    """Tell torch of the device, once per process."""
    _setup_privateuseone_for_python_backend(NAME, backend_module=Module())
    library = torch.library.Library("aten", "IMPL")
    for full in torch._C._dispatch_get_all_op_names():
        if full.startswith("aten::") and (made := factory(full.removeprefix("aten::"))):
            library.impl(full.removeprefix("aten::"), made, "PrivateUse1")
    for name in ("_copy_from", "_copy_from_and_resize"):
        packet = getattr(torch.ops.aten, name).default
        library.impl(name, lambda *args, _op=packet, **kwargs: run(_op, args, kwargs), "PrivateUse1")
    return library


def factory(name: str) -> Callable[..., Tensor] | None:
    """An operation that makes a tensor from none: on the CPU, then wrapped."""
    base, _, overload = name.partition(".")
    if base in ("from_file", "_cudnn_init_dropout_state") or not hasattr(torch.ops.aten, base):
        return None
    operation = getattr(getattr(torch.ops.aten, base), overload or "default", None)
    if operation is None:
        return None
    schema = operation._schema
    takes = [argument for argument in schema.arguments if "Tensor" in str(argument.type)]
    gives = [str(each.type) for each in schema.returns]
    if takes or gives != ["Tensor"] or not any(argument.name == "device" for argument in schema.arguments):
        return None

    def make(*args: Any, **kwargs: Any) -> Tensor:
        kwargs = {key: value for key, value in kwargs.items() if key not in ("device", "pin_memory")}
        if base not in VIEWS:
            DEVICE.count("kernels", base)
        return Pretended(operation(*args, **kwargs))

    return make


class Attention(torch.autograd.Function):
    """torch chooses a kernel for attention by the device, in C++: here it is the CPU's."""

    @staticmethod
    def forward(context: Any, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
        mask = options.get("attn_mask")
        context.inputs = [each.detach().raw.detach().requires_grad_() for each in (q, k, v)]
        raw = options | {"attn_mask": mask.raw if mask is not None else None}
        with torch.enable_grad():
            context.output = plain_attention(*context.inputs, **raw)
        for _ in range(1 if mask is None else 3):
            DEVICE.count("kernels", "attention")
        return Pretended(context.output.detach())

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Any:
        found = torch.autograd.grad(context.output, context.inputs, gradients[0].raw)
        for _ in range(3):
            DEVICE.count("kernels", "attention")
        return *(Pretended(each) for each in found), None


plain_attention = torch.nn.functional.scaled_dot_product_attention


def attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Tensor:
    """`scaled_dot_product_attention`, also of the device."""
    options |= dict(zip(("attn_mask", "dropout_p", "is_causal"), args, strict=False))
    tensors = (query, key, value, options.get("attn_mask"))
    there = {isinstance(each, Pretended) for each in tensors if each is not None}
    if there == {False}:
        return plain_attention(query, key, value, **options)
    if len(there) > 1:
        raise RuntimeError(f"Expected all tensors to be on the same device: attention at {place()}")
    if options.pop("enable_gqa", False):
        key, value = (each.repeat_interleave(query.shape[-3] // key.shape[-3], -3) for each in (key, value))
    output: Tensor = Attention.apply(query, key, value, options)
    return output


USERS = ("ptuning.model.cpu_attention", "ptuning.inference.paged_attention")
"""Modules that import the function by its name."""


@contextmanager
def pretended() -> Iterator[torch.device]:
    """Inside, the device is there."""
    register()
    DEVICE.available = True
    patches = [patch("torch.nn.functional.scaled_dot_product_attention", attention)]
    patches += [patch(f"{user}.scaled_dot_product_attention", attention) for user in USERS if user in sys.modules]
    for each in patches:
        each.start()
    try:
        yield torch.device(NAME, 0)
    finally:
        DEVICE.available = False
        for each in patches:
            each.stop()


@contextmanager
def counting() -> Iterator[Counter[str]]:
    """The number of `kernels`, of `waits` for values, and of copies inside: `to device` and `to host`, for which the host
    waits, too, and `sent` to the device without waiting. `DEVICE.places` says where."""
    counts: Counter[str] = Counter()
    DEVICE.counts, DEVICE.places = counts, Counter()
    try:
        yield counts
    finally:
        DEVICE.counts = None
