"""A base on torch's meta device, from its config alone: its tensors, and the allocations of a pass over time. Reads no weights.

It runs the real pass (`PromptedModel`, forward and backward) on tensors with shapes but no memory (`recorder`). So there are no
formulas per architecture that could become outdated. Memory that kernels allocate internally is not seen. A pass that depends
on values of tensors cannot be replayed; it is estimated by a formula, and `MetaModel.estimated` is the reason.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from ptuning.errors import BaseError
from ptuning.model.attention_sizes import attention_sizes, paged_numbers, token_numbers
from ptuning.model.decoder import check_decoder
from ptuning.model.eight_bits import store, units
from ptuning.model.label_trie import LabelTrie
from ptuning.model.packing import Objective, pack_targets
from ptuning.model.prompted_model import PromptedModel
from ptuning.planning.formula import timeline_by_formula
from ptuning.planning.recorder import Recorder, fused_attention
from ptuning.planning.workload import BaseShape, Workload
from ptuning.planning.zero3_simulator import Timeline
from ptuning.redaction import logger
from ptuning.settings.fields import EightBits

log = logger(__name__)


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
        BaseError: its code does not run without weights, or it cannot recompute activations.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        dtype: torch.dtype,
        *,
        checkpoint_gradients: bool = False,
        quantization: EightBits | None = None,
    ) -> None:
        try:
            with torch.device("meta"):
                base = AutoModelForCausalLM.from_config(config, dtype=dtype)
                if quantization:
                    store(base, quantization, config.model_type)
            self.model = PromptedModel(base)
        except BaseError:
            raise
        except Exception as error:  # the base's own code, with any config
            raise BaseError(
                f"{config.model_type}: cannot be planned ({_reason(error)}); correct the config, or choose another base"
            ) from None
        if checkpoint_gradients:
            self.model.checkpoint_gradients()
        self.recomputes = checkpoint_gradients
        self.quantization = quantization
        self.shape = _shape(self.model, dtype)
        self.estimated: str | None = None
        """Why a pass could not be replayed and its activations are an estimate; None: all passes were replayed."""
        self._known: dict[tuple[Workload, bool], Timeline] = {}

    def training(self, work: Workload) -> Timeline:
        """Forward and backward of a training pass."""
        return self._timeline(work, backward=True)

    def evaluation(self, work: Workload) -> Timeline:
        """A pass without gradients."""
        return self._timeline(work, backward=False)

    def _timeline(self, work: Workload, backward: bool) -> Timeline:
        if (work, backward) not in self._known:
            self._known[work, backward] = self._replay(work, backward) or timeline_by_formula(
                self.model.base,
                self.shape,
                work,
                backward=backward,
                shared=self.model.shared_prefix,
                recompute=self.recomputes,
            )
        return self._known[work, backward]

    def _replay(self, work: Workload, backward: bool) -> Timeline | None:
        """None if the pass depends on values, or does not work at all: a plan does not need to know which."""
        if self.estimated:
            return None
        try:
            return self._run(work, backward)
        except Exception as error:  # whatever the base's own code raises without values
            self.estimated = _reason(error)
            log.warning("%s: activations are estimated, its pass cannot be replayed (%s)", self._name, self.estimated)
            return None

    @property
    def _name(self) -> str:
        return type(self.model.base).__name__

    def _run(self, work: Workload, backward: bool) -> Timeline:
        text = work.tokens - work.targets
        lengths = [work.length] * work.slots
        target, objective = [0] * work.targets, Objective()
        if work.compared:  # labels that branch as late as possible
            shared = [0] * (work.targets - 2)
            labels = tuple((*shared, last, 0) for last in range(work.compared))
            target, objective = list(labels[0]), Objective(LabelTrie(labels), text=False)
        rows = [[([0] * text, target)] * work.rows] * work.slots
        plan = pack_targets(lengths, rows, [objective] * work.slots, range(work.slots) if work.kv else ())
        sizes = (work.length, *_prefix_sizes(self.model.base)) if work.kv else (work.length, self.shape.width)
        vectors = [torch.zeros(*sizes, device="meta", requires_grad=backward) for _ in lengths]
        with (
            warnings.catch_warnings(),
            Recorder(self.model, self.shape.layers, self.shape.itemsize) as recorder,
            fused_attention(),
            torch.set_grad_enabled(backward),
        ):
            # transformers warns about what it does not know of tensors without values.
            warnings.simplefilter("ignore", UserWarning)
            nll = self.model(vectors, plan)
            if backward:
                nll.sum().backward()
        return recorder.timeline()


def _prefix_sizes(base: Any) -> tuple[int, int, int, int]:
    """Layers, 2, key heads and their width of a key-value prefix."""
    config, sizes = base.config.get_text_config(), attention_sizes(base)
    heads = int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    return len(sizes), 2, heads, sizes[0].keys // heads


def _reason(error: Exception) -> str:
    """The first line of an error that code of others raised."""
    words = str(error).strip().splitlines() or [type(error).__name__]
    return words[0][:200]


def _shape(model: PromptedModel, dtype: torch.dtype) -> BaseShape:
    base = model.base
    embedding: Any = base.get_input_embeddings().weight
    head: Any = getattr(base.get_output_embeddings(), "weight", embedding)
    layers = int(base.config.get_text_config().num_hidden_layers)
    return BaseShape(
        numbers=sum(parameter.numel() for parameter in base.parameters()),
        units=sum(units(parameter, dtype.itemsize) for parameter in base.parameters()),
        embedding=embedding.numel(),
        head=0 if head is embedding else head.numel(),
        last=model.last_layer.numbers,
        width=embedding.shape[1],
        layers=layers,
        vocabulary=head.shape[0],
        attention_width=sum(size.queries for size in attention_sizes(base)) // layers,
        token_numbers=paged_numbers(base, layers),
        cached_numbers=token_numbers(base, cached=True),
        itemsize=dtype.itemsize,
        buffers=sum(buffer.numel() * buffer.element_size() for buffer in base.buffers()),
        embedding_at=next(at for at, parameter in enumerate(model.parameters()) if parameter is embedding),
    )
