"""Lets transformers dequantise the checkpoints of `integer_weights`, tensor by tensor while it loads them.

Importing this registers it. It imports scipy, torch's compiler and more, which a driver does not need.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ptuning.model.integer_weights import PARTS, counts_from_one, group_size, weight

NAME = "ptuning-integers"
"""The method of a quantization_config by which transformers finds this."""


def loading_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The quantization_config for transformers, by that of the checkpoint."""
    found = {"method": settings["quant_method"], "size": group_size(settings), "from_one": counts_from_one(settings)}
    return {"quant_method": NAME, **found}


@register_quantization_config(NAME)
class _Settings(QuantizationConfigMixin):
    def __init__(self, method: str, size: int, from_one: bool, **_: Any) -> None:
        self.quant_method: Any = NAME
        self.method, self.size, self.from_one, self.dequantize = method, size, from_one, True


class _Dequantize(ConversionOps):
    """The parts of one layer, or of a list of experts, become weights before all other operations."""

    def __init__(self, hf_quantizer: Any) -> None:
        self.hf_quantizer = hf_quantizer  # transformers then leaves the dtypes of the parts as they are

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **options: Any
    ) -> dict[str, Any]:
        model, name = options["model"], options["full_layer_name"]
        dtype = model.get_parameter_or_buffer(name).dtype
        layers: dict[str, dict[str, list[Tensor]]] = {}
        for key, found in input_dict.items():
            stem, _, part = key.rpartition(".")
            layers.setdefault(stem, {})[part] = found if isinstance(found, list) else [found]
        weights: dict[str, Any] = {}
        for stem, parts in layers.items():
            if len({len(found) for found in parts.values()}) > 1 or ("weight" in parts and len(parts) > 1):
                raise ValueError(f"only some of {name} are quantised")
            each = [dict(zip(parts, found, strict=True)) for found in zip(*parts.values(), strict=True)]
            made = [self._weight(one, model, name).to(dtype) for one in each]
            weights |= {f"{stem}.weight": made} if stem else {name: made[0]}
        return weights

    def _weight(self, parts: dict[str, Tensor], model: Any, name: str) -> Tensor:
        if "weight" in parts:
            return parts["weight"]
        settings = self.hf_quantizer.quantization_config
        made = weight(settings.method, parts, settings.size, settings.from_one)
        return made.t().contiguous() if isinstance(model.get_submodule(name.rpartition(".")[0]), Conv1D) else made


@register_quantizer(NAME)
class _Quantizer(HfQuantizer):
    serialized_names = {"weight": ["weight", *PARTS]}

    def get_load_operations(self) -> dict[str, Any]:
        return {"dequantize": _Dequantize}

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False
