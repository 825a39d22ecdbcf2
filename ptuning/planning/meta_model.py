"""A base on torch's meta device, from its config alone: its tensors, and the allocations of a pass over time. Reads no weights.

It runs the real pass (`PromptedModel`, forward and backward) on tensors with shapes but no memory. A dispatch mode counts the
bytes of every storage from allocation to release, and hooks record which module needs its tensors when, as DeepSpeed's hooks
do. So there are no formulas per architecture that could become outdated. Memory that kernels allocate internally is not seen.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from ptuning.errors import BaseError
from ptuning.model import cpu_attention
from ptuning.model.decoder import check_decoder
from ptuning.model.label_trie import LabelTrie
from ptuning.model.packing import Objective, pack_targets
from ptuning.model.prompted_model import PromptedModel
from ptuning.planning.workload import BaseShape, Workload
from ptuning.planning.zero3_simulator import Moment, Timeline


def read_config(path: str | Path, trust_remote_code: bool = False) -> PretrainedConfig:
    """The config of a base, from a config.json or a folder that contains one. No other file is needed.

    Raises:
        BaseError: there is no config, or it is not one of a decoder-only language model.
    """
    file = Path(path).expanduser()
    file = file / "config.json" if file.is_dir() else file
    if not file.is_file():
        raise BaseError(f"{path}: there is no config.json; give the file or a folder that contains it")
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(file, trust_remote_code=trust_remote_code, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).splitlines()[0][:200]
        raise BaseError(f"{path}: is not a supported config ({reason}); give one with a model_type of transformers") from None
    return check_decoder(str(path), config)


class MetaModel:
    """A base without memory, in its compute dtype.

    Raises:
        BaseError: its code does not run without weights.
    """

    def __init__(self, config: PretrainedConfig, dtype: torch.dtype, *, checkpoint_gradients: bool = False) -> None:
        try:
            with torch.device("meta"):
                base = AutoModelForCausalLM.from_config(config, dtype=dtype)
            self.model = PromptedModel(base)
        except (ValueError, KeyError, TypeError, NotImplementedError) as error:
            reason = str(error).splitlines()[0][:200]
            raise BaseError(f"{config.model_type}: cannot be planned ({reason}); correct the config") from None
        if checkpoint_gradients:
            self.model.checkpoint_gradients()
        self.shape = _shape(self.model, dtype)
        self._known: dict[tuple[Workload, bool], Timeline] = {}

    def training(self, work: Workload) -> Timeline:
        """Forward and backward of a training pass."""
        return self._timeline(work, backward=True)

    def evaluation(self, work: Workload) -> Timeline:
        """A pass without gradients."""
        return self._timeline(work, backward=False)

    def _timeline(self, work: Workload, backward: bool) -> Timeline:
        if (work, backward) not in self._known:
            self._known[work, backward] = self._run(work, backward)
        return self._known[work, backward]

    def _run(self, work: Workload, backward: bool) -> Timeline:
        text = work.tokens - work.targets
        lengths = [work.length] * work.slots
        target, objective = [0] * work.targets, Objective()
        if work.compared:  # labels that branch as late as possible
            shared = [0] * (work.targets - 2)
            labels = tuple((*shared, last, 0) for last in range(work.compared))
            target, objective = list(labels[0]), Objective(LabelTrie(labels), text=False)
        plan = pack_targets(lengths, [[([0] * text, target)] * work.rows] * work.slots, [objective] * work.slots)
        vectors = [torch.zeros(work.length, self.shape.width, device="meta", requires_grad=backward) for _ in lengths]
        with (
            warnings.catch_warnings(),
            _Recorder(self.model) as recorder,
            _fused_attention(),
            torch.set_grad_enabled(backward),
        ):
            # With checkpointing transformers enables gradients of the embeddings' output, and torch warns about those hooks.
            warnings.filterwarnings("ignore", "Full backward hook", UserWarning)
            nll = self.model(vectors, plan)
            if backward:
                nll.sum().backward()
        return recorder.timeline()


def _shape(model: PromptedModel, dtype: torch.dtype) -> BaseShape:
    base = model.base
    config: Any = base.config.get_text_config()
    embedding: Any = base.get_input_embeddings().weight
    head: Any = getattr(base.get_output_embeddings(), "weight", embedding)
    heads = config.num_attention_heads
    wide = getattr(config, "head_dim", None) or config.hidden_size // heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    return BaseShape(
        numbers=sum(parameter.numel() for parameter in base.parameters()),
        embedding=embedding.numel(),
        head=0 if head is embedding else head.numel(),
        last=model.last_layer.numbers,
        width=config.hidden_size,
        layers=config.num_hidden_layers,
        vocabulary=config.vocab_size,
        attention_width=heads * wide,
        token_numbers=2 * config.num_hidden_layers * key_heads * wide,
        itemsize=dtype.itemsize,
        buffers=sum(buffer.numel() * buffer.element_size() for buffer in base.buffers()),
    )


@contextmanager
def _fused_attention() -> Iterator[None]:
    """On the meta device SDPA uses its math implementation, which stores every score. Real devices use a fused kernel, which
    stores queries, keys, values, the result and a numeric mask. The shapes of the CPU kernel are used for all devices."""
    original = functional.scaled_dot_product_attention
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    def fused(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
        if query.device.type != "meta":
            return original(query, key, value, attn_mask, **options)
        if query.shape[1] != key.shape[1]:
            groups = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
        causal, scale = bool(options.get("is_causal")), options.get("scale")
        return flash(query, key, value, 0.0, causal, attn_mask=attn_mask, scale=scale)[0]

    places: tuple[Any, ...] = (functional, cpu_attention)
    for place in places:
        place.scaled_dot_product_attention = fused
    try:
        yield
    finally:
        for place in places:
            place.scaled_dot_product_attention = original


class _Recorder(TorchDispatchMode):
    """Counts the bytes of live storages, and records the moments of a pass."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._live = self._peak = 0
        self._tensors = {id(parameter): number for number, parameter in enumerate(model.parameters())}
        self._sizes = tuple(parameter.numel() for parameter in model.parameters())
        # The base's own tensors are counted elsewhere, and they outlive the pass.
        self._known = {tensor.untyped_storage()._cdata for tensor in [*model.parameters(), *model.buffers()]}
        self._moments: list[Moment] = []
        self._handles = [handle for module in model.modules() for handle in self._watch(module)]

    def __exit__(self, *error: Any) -> None:
        for handle in self._handles:
            handle.remove()
        super().__exit__(*error)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
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

    def _watch(self, module: nn.Module) -> list[Any]:
        own = tuple(dict.fromkeys(self._tensors[id(parameter)] for parameter in module.parameters(recurse=False)))
        if not own:
            return []
        return [
            module.register_forward_pre_hook(lambda *_: self._note("fetch", own, True)),
            module.register_forward_hook(lambda *_: self._note("release", own, True)),
            module.register_full_backward_pre_hook(lambda *_: self._note("fetch", own, False)),
            module.register_full_backward_hook(lambda *_: self._note("release", own, False)),
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
