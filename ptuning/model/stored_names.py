"""Compares the names and shapes of a checkpoint's tensors with those of its model, before any weight is read.

transformers reports a tensor of another shape only in its log, under ZeRO-3 not at all (5.23), and then trains random weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from transformers.pytorch_utils import Conv1D

from ptuning.errors import BaseError
from ptuning.model.safetensors_files import PACKED, StoredTensor

if TYPE_CHECKING:  # importing it imports scipy, torch's compiler and more, which a driver does not need
    from transformers import PreTrainedModel


def stored_names(
    model: PreTrainedModel, tensors: Iterable[StoredTensor], renamed: dict[str, str] | None = None
) -> dict[str, StoredTensor | None]:
    """For every tensor of `model` that is in a checkpoint: its stored form, or None if several stored tensors become one.

    `renamed`: regular expressions and their replacements, which are applied to the stored names first (`key_mapping`).
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, dot_natural_key, rename_source_key

    own = model.state_dict()
    conversions = get_model_conversion_mapping(model, renamed)
    plain = [each for each in conversions if isinstance(each, WeightRenaming)]
    converting: list[Any] = [each for each in conversions if not isinstance(each, WeightRenaming)]
    targets = {source: each.target_patterns for each in converting for source in each.source_patterns}
    found: dict[str, StoredTensor | None] = {}
    for tensor in sorted(tensors, key=lambda tensor: dot_natural_key(tensor.name)):  # as transformers: some renamings need it
        name, converter = rename_source_key(tensor.name, plain, converting, model.base_model_prefix, own)
        if name not in own and tensor.name in own:
            name, converter = tensor.name, None
        if converter is None:
            found[name] = tensor
        else:  # several stored tensors become one, or one becomes several
            first = targets[converter][0]
            found |= {name.replace(first, target): None for target in targets[converter]} | {name: None}
    return {name: tensor for name, tensor in found.items() if name in own}


def check_stored(name: str, model: PreTrainedModel, tensors: Iterable[StoredTensor], renamed: dict[str, str] | None) -> None:
    """Refuse a checkpoint that does not contain every tensor of `model` (which may be on the meta device) in its shape.

    Raises:
        BaseError: names the first tensors that are missing, or one that has another shape.
    """
    own = model.state_dict()
    found = stored_names(model, tensors, renamed)
    for each, tensor in found.items():
        if tensor is not None and _shape(model, each, tensor) != tuple(own[each].shape):
            raise BaseError(
                f"model.path: {name} stores {tensor.name} as {list(tensor.shape)}, but its config.json describes "
                f"{list(own[each].shape)}; use the config.json that belongs to the weights"
            )
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    tied: dict[str, set[str]] = {}
    for target, source in model.all_tied_weights_keys.items():
        tied.setdefault(source, {source}).add(target)
    have = set(found).union(*(group for group in tied.values() if group & found.keys()))
    missing = [each for each, _ in model.named_parameters() if each not in have]
    missing = sorted(each for each in missing if not any(pattern.search(each) for pattern in ignored))
    if missing:
        raise BaseError(
            f"model.path: {name} has no weights for {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}; "
            "use a complete checkpoint"
        )


def _shape(model: PreTrainedModel, name: str, tensor: StoredTensor) -> tuple[int, ...]:
    """The shape of a stored tensor as that of a parameter: GPT-2's linear layers keep the transpose of what is packed."""
    owner = model.get_submodule(name.rpartition(".")[0])
    return tensor.shape[::-1] if tensor.dtype == PACKED and isinstance(owner, Conv1D) else tensor.shape
