"""The last decoder layer, computed only where its output is read.

Keys and values of all tokens are needed there, but of its outputs only those that predict a token. In a pass over short
targets these are few, and query, output projection and MLP are the most part of a layer: they work on the places that are read,
and what they would have said elsewhere is zero and never looked at. A quarter of a base of 4 layers, a fiftieth of one of 40.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

QUERIES = ("q_proj", "o_proj")
"""Maps of an attention that treat tokens one by one and are not needed for keys and values."""


class LastLayer:
    """Watches the last decoder layer of a base. Passes without a segment tree are left alone."""

    def __init__(self, base: nn.Module, layers: int) -> None:
        self._read: Tensor | None = None
        """Places `[U]` whose outputs are read in the pass that the layer computes; None: all of them may be."""
        self._tokens = 0
        self.numbers = 0
        """Parameters that only such places go through; 0 where a base is built in a way that is not known here."""
        lists = [module for module in base.modules() if isinstance(module, nn.ModuleList) and len(module) == layers]
        if not lists:
            return
        layer = lists[0][-1]
        attention = next((module for module in layer.modules() if type(module).__name__.endswith("Attention")), None)
        if attention is None:
            return
        # Not the layer itself: when gradient checkpointing computes it again, hooks of the layer are not called.
        attention.register_forward_pre_hook(self._enter, with_kwargs=True)
        modules = _tokenwise(layer)
        self.numbers = sum(parameter.numel() for module in modules for parameter in module.parameters())
        for module in modules:
            module.register_forward_pre_hook(self._select)
            module.register_forward_hook(self._spread)

    def _enter(self, attention: nn.Module, arguments: Any, options: dict[str, Any]) -> None:
        segments: Any = options.get("segments")
        self._read = None
        if segments and segments.read is not None:
            hidden = arguments[0] if arguments else options["hidden_states"]
            self._read, self._tokens = segments.read.to(hidden.device), segments.tokens

    def _select(self, module: nn.Module, arguments: tuple[Tensor]) -> tuple[Tensor] | None:
        return None if self._read is None else (arguments[0].index_select(1, self._read),)

    def _spread(self, module: nn.Module, arguments: tuple[Tensor], output: Tensor) -> Tensor | None:
        if self._read is None:
            return None
        whole = output.new_zeros(output.shape[0], self._tokens, *output.shape[2:])
        return whole.index_copy(1, self._read, output)


def _tokenwise(layer: nn.Module) -> list[nn.Module]:
    """Parts of a layer that treat tokens one by one: a dense MLP, and an attention's maps to queries and from its output.

    Experts are left out: they are called in ways of their own.
    """
    found: list[nn.Module] = [
        module for name, module in layer.named_modules() if name.rpartition(".")[2] in QUERIES and isinstance(module, nn.Linear)
    ]
    mlp = getattr(layer, "mlp", None)
    if isinstance(mlp, nn.Module) and not any("expert" in name or name == "gate" for name, _ in mlp.named_modules()):
        found.append(mlp)
    return found
