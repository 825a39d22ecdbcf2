"""Interpretation of soft prompts: the words nearest to their vectors, and the vectors' norms.

Shapes: P virtual tokens, H width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from ptuning.errors import BaseError
from ptuning.model.base import Base
from ptuning.model.safetensors_files import STORED_DTYPES, StoredTensor, stored_values
from ptuning.model.stored_names import stored_names

ROWS = 8192
"""Rows of the vocabulary that are compared at a time."""


def nearest_words(vectors: Tensor, base: Base, most: int = 3) -> list[list[tuple[str, float]]]:
    """The words of the vocabulary nearest to each virtual token, by cosine (Lester et al. 2021, section 7).

    Reads only the embedding from the base's files.
    """
    unit = torch.nn.functional.normalize(vectors.float(), dim=1)
    best, ids = torch.full((len(vectors), most), -2.0), torch.zeros((len(vectors), most), dtype=torch.long)
    words = len(base.tokenizer)
    for first, rows in _embedding_rows(base):
        rows = rows[: max(0, words - first)]  # the rows after the last token are padding
        cosines = unit @ torch.nn.functional.normalize(rows, dim=1).T
        together = torch.cat([best, cosines], dim=1)
        places = torch.cat([ids, torch.arange(first, first + cosines.shape[1]).expand(len(vectors), -1)], dim=1)
        best, kept = together.topk(most, dim=1)
        ids = places.gather(1, kept)
    return [
        [(str(base.tokenizer.decode([word])), round(cosine, 4)) for word, cosine in zip(row, values, strict=True)]
        for row, values in zip(ids.tolist(), best.tolist(), strict=True)
    ]


def norms(vectors: Tensor, base: Base | None) -> dict[str, float]:
    """Mean and largest norm of the virtual tokens and, for comparison with embeddings, the mean norm of the base's own."""
    lengths = vectors.float().flatten(1).norm(dim=1)
    found = {"mean": float(lengths.mean()), "largest": float(lengths.max())}
    if base and vectors.ndim == 2:
        own = torch.cat([rows.norm(dim=1) for _, rows in _embedding_rows(base)])
        found["vocabulary_mean"] = float(own.mean())
    return found


def _embedding_rows(base: Base) -> Iterator[tuple[int, Tensor]]:
    """The input embedding `[V, H]` in pieces, each with the number of its first row."""
    tensor = _embedding(base)
    count, width = tensor.shape
    for first in range(0, count, ROWS):
        rows = min(ROWS, count - first)
        yield first, stored_values(tensor, first * width, rows * width).view(rows, width)


def _embedding(base: Base) -> StoredTensor:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(base.config, trust_remote_code=base.trust_remote_code)
    weight = model.get_input_embeddings().weight
    name = next(name for name, parameter in model.named_parameters() if parameter is weight)
    tensor = stored_names(model, base.tensors, base.renamed).get(name)
    if tensor is not None and tensor.shape == tuple(weight.shape) and tensor.dtype in STORED_DTYPES:
        return tensor
    raise BaseError(
        f"{base.name}: its files contain no input embedding {name}, so there are no nearest words; convert the base"
    )
