"""The modules of a base that ZeRO-3 gathers as one: the attention and the MLP of each decoder layer.

DeepSpeed's hooks run for every module with tensors of its own: about ten in a layer, 0.4 ms each. For a module that it takes as
a leaf, they run once, and its tensors are gathered together. Whole decoder layers cannot be leaves: gradient checkpointing does
not call the hooks of a layer that it computes again.
"""

from __future__ import annotations

from collections import Counter

from torch import nn

NAMES = ("attention", "mlp")
"""Ends of the names of classes."""


def leaf_modules(base: nn.Module, layers: int) -> list[nn.Module]:
    """Those of a base with this number of decoder layers. Not: experts, of which a token needs a few, and modules whose tensors
    are also used by others."""
    lists = [module for module in base.modules() if isinstance(module, nn.ModuleList) and len(module) == layers]
    owners = Counter(id(parameter) for module in base.modules() for parameter in module.parameters(recurse=False))
    found = lists[0] if lists and layers else ()
    return [module for layer in found for module in layer.children() if _is_leaf(module, owners)]


def _is_leaf(module: nn.Module, owners: Counter[int]) -> bool:
    parts = list(module.modules())
    own = [parameter for part in parts for parameter in part.parameters(recurse=False)]
    return (
        type(module).__name__.lower().endswith(NAMES)
        and len(own) > 1
        and not any(isinstance(part, nn.ModuleList) for part in parts)
        and all(owners[id(parameter)] == 1 for parameter in own)
    )
