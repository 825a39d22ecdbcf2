"""The layouts of GPTQ and AWQ: integers of a few bits, several in each int32, with a scale and a zero for a group of inputs.

transformers (5.23) leaves both to the package gptqmodel, which has to be compiled and whose weights cannot be partitioned. The
layouts are simple, so they are dequantised here, and no package is needed.

GPTQ (AutoGPTQ, `qlinear_cuda.py`): inputs are packed, from the lowest bit on; 3 bits run on from one int32 into the next. The
format "gptq" stores zeros minus one, "gptq_v2" as they are. `g_idx` has the group of each input. AWQ (AutoAWQ, `gemm.py`):
4 bits, outputs are packed, in the order `AWQ_ORDER`.

Shapes: I inputs and O outputs of a linear layer, G groups of inputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ptuning.errors import BaseError
from ptuning.model.safetensors_files import PACKED, StoredTensor

METHODS = ("gptq", "awq")
PARTS = ("qweight", "qzeros", "scales", "g_idx")
"""What is stored instead of a layer's `weight`; `g_idx` may be missing."""
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The output, of eight, that each group of four bits belongs to."""
FORMATS = {"gptq": ("gptq", "gptq_v2"), "awq": ("gemm",)}
"""The layouts that are known; `gemv`, `marlin` and others order the same numbers for one kernel."""


def check_format(path: str, method: str, settings: Mapping[str, Any]) -> None:
    """Refuse another layout than those above, by the settings of a config.json.

    Raises:
        BaseError: names the layout.
    """
    named = [settings.get(key) for key in ("checkpoint_format", "format", "version")]
    for each in filter(None, named):
        if str(each).lower() not in FORMATS[method]:
            raise _unknown(path, method, f"format {str(each)[:40]!r}")


def _unknown(path: str, method: str, what: str) -> BaseError:
    return BaseError(
        f"model.path: {path} is quantised with {method} in a way that is not known ({what}); choose the checkpoint that it was "
        "made from, or save it dequantised"
    )


def plain_tensors(path: str, settings: Mapping[str, Any], tensors: Iterable[StoredTensor]) -> list[StoredTensor]:
    """The tensors that a checkpoint means: `weight` [O, I] in the place of its parts. Their bytes are not those of a tensor.
    `settings`: its quantization_config.

    Raises:
        BaseError: parts are missing, or their shapes do not belong together.
    """
    method, size = settings["quant_method"], group_size(settings)
    stored = {tensor.name: tensor for tensor in tensors}
    plain = dict(stored)
    for name in [name for name in stored if name.endswith(".qweight")]:
        stem = name.removesuffix(".qweight")
        parts = {part: plain.pop(f"{stem}.{part}") for part in PARTS if f"{stem}.{part}" in plain}
        inputs, outputs = _sizes(path, method, stem, size, {part: tensor.shape for part, tensor in parts.items()})
        plain[f"{stem}.weight"] = replace(parts["qweight"], name=f"{stem}.weight", dtype=PACKED, shape=(outputs, inputs))
    for name in plain:
        if name.endswith(".scales"):  # AWQ divides the activations of layers without a gate by them
            raise _unknown(path, method, f"{name} scales activations")
    return list(plain.values())


def group_size(settings: Mapping[str, Any]) -> int:
    """Inputs of a group; 0: not told, or all."""
    size = settings.get("group_size", settings.get("q_group_size"))
    return size if isinstance(size, int) and size > 0 else 0


def _grouped(inputs: int, groups: int, size: int) -> int:
    """Inputs of a group of a layer, if it has no `g_idx`; 0: unknown."""
    if size and math.ceil(inputs / size) == groups:
        return size
    return 0 if inputs % groups else inputs // groups


def _sizes(path: str, method: str, stem: str, size: int, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
    """I and O of a layer."""
    try:
        (rows, columns), (groups, zeros), (scaled, outputs) = (shapes[part] for part in PARTS[:3])
        bits = 32 * zeros // outputs
        inputs = 32 * rows // bits if method == "gptq" else rows
        right = groups == scaled and zeros * 32 == outputs * bits and bits in range(2, 9)
        right &= columns == outputs and rows * 32 == inputs * bits if method == "gptq" else bits == 4 and columns == zeros
        right &= shapes.get("g_idx", (inputs,)) == (inputs,)
        right &= "g_idx" in shapes or bool(_grouped(inputs, groups, size))
    except (KeyError, ValueError, ZeroDivisionError):
        right, inputs, outputs = False, 0, 0
    if not right:
        found = ", ".join(f"{part} {list(shape)}" for part, shape in shapes.items())
        raise _unknown(path, method, f"{stem} has {found}")
    return inputs, outputs


def counts_from_one(settings: Mapping[str, Any]) -> bool:
    """Whether zeros are stored minus one."""
    named = settings.get("checkpoint_format") or settings.get("format") or "gptq"
    return settings["quant_method"] == "gptq" and str(named).lower() == "gptq"


def unpacked(words: Tensor, bits: int) -> Tensor:
    """int32 `[..., n]` -> the `32 n / bits` unsigned integers in them, from the lowest bit of the first on."""
    many, wide = 32 // math.gcd(32, bits), bits // math.gcd(32, bits)  # numbers that fill whole words
    blocks = words.unflatten(-1, (-1, wide))
    found = []
    for at in range(0, many * bits, bits):
        word, shift = divmod(at, 32)
        number = blocks[..., word] >> shift
        if shift + bits > 32:
            number = number & ((1 << (32 - shift)) - 1) | blocks[..., word + 1] << (32 - shift)
        found.append(number & ((1 << bits) - 1))
    return torch.stack(found, -1).flatten(-2)


def weight(method: str, parts: Mapping[str, Tensor], size: int, from_one: bool) -> Tensor:
    """The weight `[O, I]` fp32 of a layer. `size`: inputs of a group, 0: not told. `from_one`: zeros are stored minus one."""
    scales = parts["scales"].float()  # [G, O]
    bits = 32 * parts["qzeros"].shape[1] // scales.shape[1]
    if method == "gptq":
        numbers = unpacked(parts["qweight"].t().contiguous(), bits)  # [O, I]
        zeros = unpacked(parts["qzeros"], bits)  # [G, O]
        if from_one:
            zeros = (zeros + 1) & ((1 << bits) - 1)
    else:
        numbers, zeros = (_in_order(unpacked(parts[part], bits)) for part in ("qweight", "qzeros"))
        numbers = numbers.t()
    group = parts.get("g_idx")
    if group is None:
        inputs = numbers.shape[1]
        group = torch.arange(inputs, device=numbers.device) // _grouped(inputs, len(scales), size)
    group = group.long()
    return ((numbers - zeros.t()[:, group]) * scales.t()[:, group]).contiguous()


def _in_order(numbers: Tensor) -> Tensor:
    """Outputs of AWQ `[n, O]` in their own order."""
    order = torch.tensor(AWQ_ORDER, device=numbers.device).argsort()
    return numbers.unflatten(-1, (-1, len(AWQ_ORDER)))[..., order].flatten(-2)
