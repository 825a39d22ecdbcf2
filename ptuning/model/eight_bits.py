"""A base whose linear layers are stored in 8 bits: integers, or floats of 4 exponent and 3 mantissa bits (e4m3).

Only weights are stored so, with one scale for each output. A product converts them to the dtype of the activations and is
computed in that, so a row's result depends on that row alone, and the gradient is that of the product. What is stored are two
plain tensors, so ZeRO-3 partitions and gathers bytes.

Not the layers of libraries: the weights of torchao (0.18) are a class of tensor that cannot be flattened, as ZeRO-3 does, and
those of bitsandbytes (0.50) are not known to work under `zero.Init` (DeepSpeed#5660). The input embedding and the output head
stay as they are: soft prompts are compared with rows of the one, and labels select rows of the other. So do experts that are
one tensor together.

Shapes: I inputs and O outputs of a linear layer.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ptuning.errors import BaseError
from ptuning.settings.fields import EightBits

SAME = {"FalconLinear"}
"""Classes derived from `nn.Linear` that compute the same."""
LARGEST = {"int8": 127.0, "fp8": 448.0}


class EightBitLinear(nn.Linear):
    """A linear layer with `codes` [O, I] int8, which are the bits of e4m3 for "fp8", and `scales` [O] fp32."""

    def __init__(self, weight: Tensor, bias: Tensor | None, kind: EightBits) -> None:
        """`weight` [O, I] in the dtype of the base."""
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.kind, self.dtype = kind, weight.dtype
        codes, scales = coded(weight.detach(), kind)
        self.codes = nn.Parameter(codes, requires_grad=False)
        self.scales = nn.Parameter(scales, requires_grad=False)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # computed
        """`[O, I]`, for code that multiplies by the weight itself."""
        return _scaled(self.codes, self.scales, self.kind, self.dtype)

    def forward(self, input: Tensor) -> Tensor:
        result: Tensor = _Product.apply(input, self.codes, self.scales, self.bias, self.kind)
        return result


def coded(weight: Tensor, kind: EightBits) -> tuple[Tensor, Tensor]:
    """Codes `[O, I]` int8 and scales `[O]` fp32 of a weight. Scales are numbers of bfloat16, so they are exact in a product."""
    scales = weight.abs().amax(1).float() / LARGEST[kind]
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))
    scales = (scales * (1 + 2**-8)).to(torch.bfloat16).float()  # not below the exact one: no code may exceed the largest
    small = (weight.float() / scales[:, None]).clamp_(-LARGEST[kind], LARGEST[kind])
    return (small.round_().to(torch.int8) if kind == "int8" else small.to(torch.float8_e4m3fn).view(torch.int8)), scales


def units(tensor: Tensor, itemsize: int) -> int:
    """The elements of `itemsize` bytes that take the memory of a tensor."""
    return -(-tensor.numel() * tensor.element_size() // itemsize)


def _numbers(codes: Tensor, kind: EightBits, dtype: torch.dtype) -> Tensor:
    return (codes if kind == "int8" else codes.view(torch.float8_e4m3fn)).to(dtype)


def _scaled(codes: Tensor, scales: Tensor, kind: EightBits, dtype: torch.dtype) -> Tensor:
    return (_numbers(codes, kind, torch.float32) * scales[:, None]).to(dtype)


class _Product(torch.autograd.Function):
    """The map keeps what is stored for its backward pass, not the converted weight; ZeRO-3 may have released it in between."""

    @staticmethod
    def forward(context: Any, values: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, kind: EightBits) -> Tensor:
        context.save_for_backward(codes, scales)
        context.kind = kind
        # Products with codes would exceed the numbers of float16.
        if values.dtype == torch.float16:
            result = values.matmul(_scaled(codes, scales, kind, values.dtype).t())
        else:
            result = values.matmul(_numbers(codes, kind, values.dtype).t()).mul_(scales.to(values.dtype))
        return result if bias is None else result.add_(bias)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        codes, scales = context.saved_tensors
        [gradient], kind = gradients, context.kind
        if gradient.dtype == torch.float16:
            return gradient.matmul(_scaled(codes, scales, kind, gradient.dtype)), None, None, None, None
        weight = _numbers(codes, kind, gradient.dtype)
        return (gradient * scales.to(gradient.dtype)).matmul(weight), None, None, None, None


def store(base: nn.Module, kind: EightBits, name: str) -> None:
    """Store the linear layers of a base in 8 bits, one after the other, in place. `name` is for the error.

    Raises:
        BaseError: it has none.
    """
    found = _layers(base)
    if not found:
        raise BaseError(
            f"model.quantization: {name} has no linear layers that could be stored in {kind}; leave the setting out"
        )
    for parent, own in found:
        layer: Any = getattr(parent, own)
        weight = layer.weight.t() if isinstance(layer, Conv1D) else layer.weight
        setattr(parent, own, EightBitLinear(weight, layer.bias, kind))


def restored(base: nn.Module) -> None:
    """Replace layers in 8 bits by plain ones with the weights that they mean, in place."""
    for parent in list(base.modules()):
        for own, layer in list(parent.named_children()):
            if isinstance(layer, EightBitLinear):
                with torch.device("meta"):
                    plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
                plain.weight, plain.bias = nn.Parameter(layer.weight, requires_grad=False), layer.bias
                setattr(parent, own, plain)


def _layers(base: Any) -> list[tuple[nn.Module, str]]:
    """Linear layers besides the output head, by their parents. Not: those whose weight is also used elsewhere."""
    head = getattr(base, "get_output_embeddings", lambda: None)()
    owners = Counter(id(parameter) for module in base.modules() for parameter in module.parameters(recurse=False))
    return [
        (parent, own)
        for parent in base.modules()
        for own, layer in parent.named_children()
        if _is_linear(layer) and layer is not head and owners[id(layer.weight)] == 1
    ]


def _is_linear(layer: nn.Module) -> bool:
    return type(layer) is nn.Linear or isinstance(layer, Conv1D) or type(layer).__name__ in SAME
