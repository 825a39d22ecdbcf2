"""One training step of a soft prompt on a random Llama, ours and PEFT's: the same base, rows, dtype and threads."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from peft import PromptTuningConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from ptuning.model import PromptedModel, Row, plan_targets

warnings.filterwarnings("ignore", message=".is_gradient_checkpointing. is deprecated", category=FutureWarning)  # peft 0.21

Step = Callable[[], Tensor]
LAYERS, WIDTH, INNER = 8, 512, 1376
VOCABULARY = 32_000
TARGET = [7, 2]
"""The target of every row."""


def random_llama(dtype: torch.dtype, vocabulary: int = VOCABULARY) -> PreTrainedModel:
    """A Llama shape of 25 M parameters and its embedding and head (58 M with 32,000 tokens); the same numbers at every call."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        pad_token_id=0,
    )
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def random_rows(lengths: Sequence[int]) -> list[Row]:
    """Rows of so many tokens each, their target included; the same ones at every call."""
    draw = np.random.default_rng(1)
    return [(draw.integers(5, 4000, length - len(TARGET)).tolist(), TARGET) for length in lengths]


def random_vectors(length: int) -> Tensor:
    """A soft prompt `[P, H]`; the same one at every call."""
    return torch.randn(length, WIDTH, generator=torch.Generator().manual_seed(2)) * 0.02


def our_step(model: PromptedModel, vectors: Tensor, rows: list[Row]) -> Step:
    """Loss and gradient `[P, H]` by this project."""
    soft_prompt = vectors.clone().requires_grad_()

    def step() -> Tensor:
        soft_prompt.grad = None
        model([soft_prompt], plan_targets([len(soft_prompt)], [rows])).mean().backward()
        assert soft_prompt.grad is not None
        return soft_prompt.grad

    return step


def peft_model(base: PreTrainedModel, vectors: Tensor) -> tuple[Any, Tensor]:
    """PEFT's prompt tuning around a base, and its weight `[P, H]`."""
    model: Any = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=len(vectors)))
    weight: Tensor = model.prompt_encoder["default"].embedding.weight
    weight.data.copy_(vectors)
    return model, weight


def peft_step(base: PreTrainedModel, vectors: Tensor, rows: list[Row]) -> Step:
    """The same by PEFT's prompt tuning, in a plain loop."""
    model, weight = peft_model(base, vectors)
    batch = padded(rows)

    def step() -> Tensor:
        weight.grad = None
        model(**batch).loss.backward()
        assert weight.grad is not None
        return weight.grad

    return step


def padded(rows: Sequence[Row]) -> dict[str, Tensor]:
    """A batch as PEFT's users make it: padded on the right to its longest row, labels -100 elsewhere."""
    longest = max(len(source) + len(target) for source, target in rows)
    ids, mask, labels = (torch.full((len(rows), longest), fill) for fill in (0, 0, -100))
    for row, (source, target) in enumerate(rows):
        end = len(source) + len(target)
        ids[row, :end], mask[row, :end] = torch.tensor(source + target), 1
        labels[row, len(source) : end] = torch.tensor(target)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def flops(batch: int, text: int, length: int, vocabulary: int) -> int:
    """FLOPs that a step of B rows of T tokens needs, as `tests/test_model.py` counts them: 4 per weight and token (frozen
    weights have no gradient), soft prompt once, last target never fed, last layer and head at targets only, attention."""
    fed, targets = batch * (text - 1), batch * len(TARGET)
    layer, mlp = 4 * WIDTH * WIDTH + 3 * WIDTH * INNER, 3 * WIDTH * INNER
    last = 2 * WIDTH * WIDTH + mlp  # queries, output projection and MLP of the last layer
    looked = length * length + fed * (length + text - 1)
    layers = 4 * (LAYERS * layer - last) * (length + fed) + 4 * last * targets
    return layers + 6 * 2 * LAYERS * WIDTH * looked + 4 * vocabulary * WIDTH * targets


def difference(found: Tensor, expected: Tensor) -> float:
    """Relative norm of what two gradients differ by."""
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def limit(dtype: torch.dtype) -> float:
    """By how much gradients that are computed in different orders may differ."""
    return 1e-4 if dtype == torch.float32 else 0.1
