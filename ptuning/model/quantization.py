"""Quantised checkpoints: what is dequantised while it is loaded, and what is refused before.

A soft prompt is trained over plain weights: the gradient passes through every layer, and ZeRO-3 partitions parameters, not the
packed tensors of a library. So quantised weights are dequantised into the dtype of the base.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from transformers import PretrainedConfig

from ptuning.errors import BaseError
from ptuning.model import integer_weights

if TYPE_CHECKING:  # importing it imports scipy, torch's compiler and more, which a driver does not need
    from transformers import PreTrainedModel

DEQUANTISED = {
    **{"fp8": "", "mxfp4": "", "bitsandbytes": "bitsandbytes", "compressed-tensors": "compressed-tensors"},
    **dict.fromkeys(integer_weights.METHODS, ""),
}
"""Methods whose weights are dequantised on any device -> the package that this needs."""

WHOLE = ("bitsandbytes", "compressed-tensors")
"""Methods of which every worker dequantises the whole base before it is partitioned: their packages do not know ZeRO-3."""


def take_quantization(path: str, config: PretrainedConfig) -> dict[str, Any] | None:
    """The settings that make transformers dequantise a checkpoint, None for a plain one. They are removed from `config`.

    Raises:
        BaseError: its method is not supported, or needs a package that is not installed.
    """
    settings = None
    for each in (config, config.get_text_config()):
        settings = settings or getattr(each, "quantization_config", None)
        if hasattr(each, "quantization_config"):
            del each.quantization_config
    if not settings:
        return None
    if not isinstance(settings, dict):
        settings = settings.to_dict()
    method = _method(settings)
    if method not in DEQUANTISED:
        raise BaseError(
            f"model.path: {path} is quantised with {method}, which is not supported; choose the checkpoint that it was made "
            "from, or save it dequantised"
        )
    if method in integer_weights.METHODS:
        integer_weights.check_format(path, method, settings)
        return settings | {"quant_method": method}
    package = DEQUANTISED[method]
    if package and find_spec(package.replace("-", "_")) is None:
        raise BaseError(f"model.path: {path} is quantised with {method}; pip install {package}, on every node")
    return settings | {"quant_method": method, **({} if method == "bitsandbytes" else {"dequantize": True})}


def loading_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """What transformers is given as the quantization_config of a checkpoint with these settings (`take_quantization`)."""
    if settings["quant_method"] not in integer_weights.METHODS:
        return settings
    from ptuning.model import integer_loading

    return integer_loading.loading_settings(settings)


def dequantized(model: PreTrainedModel, method: str, dtype: torch.dtype) -> PreTrainedModel:
    """A loaded model with plain weights in one dtype."""
    if method == "bitsandbytes":  # the others dequantise while they load
        model = model.dequantize(dtype=dtype)
    _complete_dtype(model, dtype)
    return model


def _complete_dtype(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Convert the tensors of a dequantised model that transformers left in the dtype of the file (5.23): embeddings, norms."""
    from transformers.core_model_loading import build_glob_alternation

    kept = list(model._get_dtype_plan(dtype))  # modules that the architecture computes in float32
    exempt = build_glob_alternation(kept)[0] if kept else None
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not (exempt and exempt.search(name)):
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype


def _method(settings: dict[str, Any]) -> str:
    """The method of a quantization_config; older files of bitsandbytes name only their number of bits."""
    for bits in ("load_in_4bit", "load_in_8bit"):
        if settings.get(bits):
            return "bitsandbytes"
    return str(settings.get("quant_method") or "an unnamed method")
