"""Records a pass on torch's meta device: the bytes of all living tensors over time, and which module needs its tensors when.

Hooks record the moments as DeepSpeed's hooks do. Operations that the meta device does not have, or that ask for a value, get
the shapes and values of their usual case.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from ptuning.model import cpu_attention
from ptuning.model.eight_bits import units
from ptuning.model.leaf_modules import leaf_modules
from ptuning.planning.zero3_simulator import Moment, Timeline

aten = torch.ops.aten


@contextmanager
def fused_attention() -> Iterator[None]:
    """On the meta device SDPA uses its math implementation, which stores every score. Real devices use a fused kernel, which
    stores queries, keys, values, the result and a numeric mask. The shapes of the CPU kernel are used for all devices."""
    original = functional.scaled_dot_product_attention
    flash = aten._scaled_dot_product_flash_attention_for_cpu

    def fused(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
        numeric = attn_mask is not None and attn_mask.requires_grad  # a bias with a gradient: no fused kernel takes it
        if query.device.type != "meta" or query.dim() != 4 or numeric:
            return original(query, key, value, attn_mask, **options)
        if query.shape[1] != key.shape[1]:
            groups = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
        causal, scale, wide = bool(options.get("is_causal")), options.get("scale"), value.shape[-1]
        # The kernel's result has the width of the queries; values may be narrower (multi-head latent attention) or wider.
        if wide < query.shape[-1]:
            value = functional.pad(value, (0, query.shape[-1] - wide))
        elif wide > query.shape[-1]:
            query, key = (functional.pad(each, (0, wide - each.shape[-1])) for each in (query, key))
        result: Tensor = flash(query, key, value, 0.0, causal, attn_mask=attn_mask, scale=scale)[0]
        return result[..., :wide]

    places: tuple[Any, ...] = (functional, cpu_attention)
    for place in places:
        place.scaled_dot_product_attention = fused
    try:
        yield
    finally:
        for place in places:
            place.scaled_dot_product_attention = original


class Recorder(TorchDispatchMode):
    """Counts the bytes of live storages, and records the moments of a pass."""

    def __init__(self, model: nn.Module, layers: int, itemsize: int) -> None:
        """`layers`: number of decoder layers, whose leaf modules are gathered as one; `itemsize`: bytes of an element in the
        compute dtype."""
        super().__init__()
        self._live = self._peak = 0
        self._tensors = {id(parameter): number for number, parameter in enumerate(model.parameters())}
        self._sizes = tuple(units(parameter, itemsize) for parameter in model.parameters())
        # The base's own tensors are counted elsewhere, and they outlive the pass.
        self._known = {tensor.untyped_storage()._cdata for tensor in [*model.parameters(), *model.buffers()]}
        self._moments: list[Moment] = []
        leaves = leaf_modules(model, layers)
        inside = {id(part) for leaf in leaves for part in leaf.modules()} - {id(leaf) for leaf in leaves}
        whole = {id(leaf) for leaf in leaves}
        self._handles = [
            handle
            for module in model.modules()
            if id(module) not in inside
            for handle in self._watch(module, id(module) in whole)
        ]

    def __exit__(self, *error: Any) -> None:
        for handle in self._handles:
            handle.remove()
        super().__exit__(*error)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        usual = USUAL.get(function)
        found = None if usual is None else usual(*args, **(kwargs or {}))
        result = function(*args, **(kwargs or {})) if found is None else found
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.device.type == "meta":
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self._live += size
        self._peak = max(self._peak, self._live)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._live -= size

    def _watch(self, module: nn.Module, whole: bool) -> list[Any]:
        own = tuple(dict.fromkeys(self._tensors[id(parameter)] for parameter in module.parameters(recurse=whole)))
        if not own:
            return []
        watched = _Watched(lambda kind, forward: self._note(kind, own, forward))
        return [
            module.register_forward_pre_hook(watched.enter, with_kwargs=True),
            module.register_forward_hook(watched.leave),
        ]

    def _note(self, kind: Any, own: tuple[int, ...], forward: bool) -> None:
        self._close()
        self._moments.append(Moment(kind, own, 0, forward))

    def _close(self) -> None:
        """Assign the peak since the latest moment to that moment."""
        if self._moments:
            latest = self._moments[-1]
            self._moments[-1] = Moment(latest.kind, latest.tensors, max(latest.peak, self._peak), latest.forward)
            self._peak = self._live

    def timeline(self) -> Timeline:
        self._close()
        return Timeline(self._sizes, tuple(self._moments))


class _Watched:
    """The hooks of one module. torch's own hooks of the backward pass refuse results that are changed in place (Falcon), so
    nodes of the graph are put around the module, as DeepSpeed does."""

    def __init__(self, note: Callable[[str, bool], None]) -> None:
        self._note = note
        self._followed = False
        """A node at the module's input notes the end of its backward pass."""

    def enter(self, module: nn.Module, arguments: Any, options: Any) -> tuple[Any, Any]:
        self._note("fetch", True)
        changed, self._followed = _marked((arguments, options), lambda: self._note("release", False))
        return changed

    def leave(self, module: nn.Module, arguments: Any, output: Any) -> Any:
        self._note("release", True)
        followed = self._followed

        def begin() -> None:
            self._note("fetch", False)
            if not followed:
                self._note("release", False)

        return _marked(output, begin)[0]


def _marked(values: Any, note: Callable[[], None]) -> tuple[Any, bool]:
    """The same values behind a node of the graph that calls `note` in the backward pass; False if none has a gradient."""
    leaves, structure = tree_flatten(values)
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
    if not places or not torch.is_grad_enabled():
        return values, False
    for place, leaf in zip(places, _Mark.apply(note, *(leaves[place] for place in places)), strict=True):
        leaves[place] = leaf
    return tree_unflatten(leaves, structure), True


class _Mark(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, note: Callable[[], None], *tensors: Tensor) -> tuple[Tensor, ...]:
        context.note = note
        context.set_materialize_grads(False)
        return tuple(tensor.detach() for tensor in tensors)

    @staticmethod
    def backward(context: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        context.note()
        return None, *gradients


def _value(tensor: Tensor) -> Any:
    """The value of one element: False or 0. Then masks are not skipped, rows are not longer than usual, and no loop runs."""
    if tensor.device.type != "meta":
        return None
    return {torch.bool: False}.get(tensor.dtype, 0.0 if tensor.dtype.is_floating_point else 0)


def _product(left: Tensor, right: Tensor, offsets: Tensor | None = None, bias: Any = None, out_dtype: Any = None) -> Any:
    """A grouped product, which the meta device has in bfloat16 only."""
    if left.device.type != "meta":
        return None
    dtype = out_dtype or left.dtype
    if left.dim() == 2 and right.dim() == 2 and offsets is not None:
        return left.new_empty(offsets.shape[0], left.shape[0], right.shape[1], dtype=dtype)
    return left.new_empty(*left.shape[:-1], right.shape[-1], dtype=dtype)


def _equal(left: Tensor, right: Tensor) -> Any:
    return False if left.device.type == "meta" else None


USUAL: dict[Any, Callable[..., Any]] = {
    aten._local_scalar_dense.default: _value,
    aten._grouped_mm.default: _product,
    aten.equal.default: _equal,
}
"""Results of operations for tensors on the meta device; None: the operation itself is called."""
