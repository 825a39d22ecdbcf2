"""Leaves out gradients that no soft prompt needs: those of the text's inputs to the first decoder layer.

Text enters the first layer as rows of the frozen embedding. The gradient that would reach them through the layer's query, key
and value projections is dropped, so the backward pass of these projections is computed for the tokens of the soft prompts only.
This saves a thirteenth of the backward products of a base with 4 layers, a hundred and fiftieth with 40.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ptuning.model.eight_bits import EightBitLinear
from ptuning.model.tree_attention import tree_of

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "qkv_proj")


class FirstLayer:
    """Limits the backward pass of the first decoder layer's projections. Passes without a segment tree are unchanged."""

    def __init__(self, base: nn.Module, layers: int) -> None:
        self._trained: int | None = None
        """Number of leading tokens of the current pass that have a gradient; None: any may have one."""
        self.active = True
        """False: whole gradients, for architectures that run their first layer again (`self_check`)."""
        self.numbers = 0
        """Parameters whose backward pass is limited; 0 if the structure of the base is not recognised."""
        lists = [module for module in base.modules() if isinstance(module, nn.ModuleList) and len(module) == layers]
        if not lists or layers == 1:  # of a single layer, only some tokens may be computed: see `LastLayer`
            return
        layer = lists[0][0]
        attention = next((module for module in layer.modules() if type(module).__name__.endswith("Attention")), None)
        if attention is None:
            return
        attention.register_forward_pre_hook(self._enter, with_kwargs=True)
        for name, module in attention.named_modules():
            if name in PROJECTIONS and type(module) in (nn.Linear, EightBitLinear):
                self.numbers += sum(parameter.numel() for parameter in module.parameters())
                self._limit(module)

    def _limit(self, module: Any) -> None:
        # The module itself stays: its hooks gather the weights if they are partitioned.
        module.forward = lambda hidden: self._project(module, hidden)

    def _enter(self, attention: nn.Module, arguments: Any, options: dict[str, Any]) -> None:
        segments: Any = options.get("segments") or tree_of(options.get("attention_mask"))
        self._trained = segments.trained if segments and self.active else None

    def _project(self, module: nn.Linear, hidden: Tensor) -> Tensor:
        linear = type(module).forward
        if self._trained is None or not (torch.is_grad_enabled() and hidden.requires_grad):
            return linear(module, hidden)
        parts = hidden[:, : self._trained], hidden[:, self._trained :].detach()
        return torch.cat([linear(module, part) for part in parts], 1)
