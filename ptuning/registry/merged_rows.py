"""Adds rows for virtual tokens to a base: to its input embedding, its output head, and other tables that it looks up by id."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ptuning.registry.merged_check import OTHERWISE, ExportError


@torch.no_grad()
def grow(model: PreTrainedModel, ids: list[int], vectors: Tensor, looks_up_ids: bool) -> bool:
    """Add rows for the virtual tokens `ids`: the soft prompt's vectors in the input embedding. The head gets its own matrix.

    `looks_up_ids`: the layers look up ids, too. There, a virtual token gets the row of id 0, as in training.

    Returns: True if the two were tied.

    Raises:
        ExportError: the base has no head of its own, or its embedding is more than a table.
    """
    scale = _scale(model)
    head, embedding = model.get_output_embeddings(), cast(nn.Embedding, model.get_input_embeddings())
    if head is None:
        raise ExportError(f"{type(model).__name__}: has no output head of its own and cannot be merged; {OTHERWISE}")
    tied = head.weight is embedding.weight
    if tied:
        for config in {id(config): config for config in (model.config, model.config.get_text_config())}.values():
            config.tie_word_embeddings = False
        head.weight = nn.Parameter(head.weight.clone(), requires_grad=False)
    tables = list(_tables(model, embedding.num_embeddings)) if looks_up_ids else []
    spare = max(0, embedding.num_embeddings - len(head.weight))
    if max(ids) >= embedding.num_embeddings - spare:
        embedding = _resize(model, max(ids) + 1, spare)
    embedding.weight.data[ids] = (vectors / scale).to(model.dtype)
    for module, name in tables:
        _copy_first_row(module, name, ids)
    return tied


def _resize(model: PreTrainedModel, rows: int, spare: int) -> nn.Embedding:
    """`rows` rows in the head, and `spare` more in the embedding: some architectures (Mllama, Moshi) have such rows for tokens
    that are never predicted."""
    config = model.config.get_text_config()
    before = len(model.get_output_embeddings().weight)
    same = _named(model, getattr(model.get_output_embeddings(), "bias", None))
    embedding = model.resize_token_embeddings(rows, mean_resizing=False)
    for owner, place in same:  # some architectures give the head's bias a second name, which would keep its old size
        setattr(owner, place, model.get_output_embeddings().bias)
    if getattr(config, "decoder_vocab_size", None) == before:  # transformers forgets it (Marian, 5.23)
        config.decoder_vocab_size = rows
    if spare:
        embedding.weight = nn.Parameter(torch.cat([embedding.weight, embedding.weight[-spare:]]), requires_grad=False)
        embedding.num_embeddings += spare
    return embedding


def _named(model: PreTrainedModel, parameter: Tensor | None) -> list[tuple[nn.Module, str]]:
    """All modules with this parameter, and its name there."""
    return [
        (module, name)
        for module in model.modules()
        for name, each in module.named_parameters(recurse=False)
        if parameter is not None and each is parameter
    ]


def _scale(model: PreTrainedModel) -> float:
    """The factor that the embedding multiplies its rows with: the square root of the width in Gemma 3, almost always 1."""
    embedding = cast(nn.Embedding, model.get_input_embeddings())
    ids = torch.arange(min(64, embedding.num_embeddings))
    given, rows = embedding(ids).float(), embedding.weight[ids].float()
    scale = float((given * rows).sum() / rows.square().sum())
    if not torch.allclose(given, scale * rows, rtol=1e-2, atol=1e-6):
        raise ExportError(
            f"{type(model).__name__}: its embedding is more than a table, no soft prompt can be merged; {OTHERWISE}"
        )
    return scale


def _tables(model: PreTrainedModel, rows: int) -> Iterator[tuple[nn.Module, str]]:
    """What else has a row per token: embeddings of each layer (Gemma 4), routes of tokens through experts (DeepSeek V4)."""
    config = model.config.get_text_config()
    sizes = {rows, config.vocab_size, getattr(config, "vocab_size_per_layer_input", None)}
    known = {id(each) for each in (model.get_input_embeddings(), model.get_output_embeddings())}
    for module in model.modules():
        if id(module) in known or isinstance(module, nn.Linear):
            continue
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if tensor.dim() > 1 and len(tensor) in sizes:
                yield module, name


def _copy_first_row(module: nn.Module, name: str, ids: list[int]) -> None:
    table = getattr(module, name)
    missing = max(ids) + 1 - len(table)
    if missing > 0:
        grown = torch.cat([table.data, table.data[:1].expand(missing, *table.shape[1:])])
        if isinstance(table, nn.Parameter):
            setattr(module, name, nn.Parameter(grown, requires_grad=False))
        else:
            module._buffers[name] = grown
        if isinstance(module, nn.Embedding):
            module.num_embeddings = len(grown)
    rows = getattr(module, name).data
    rows[ids] = rows[0].clone()
