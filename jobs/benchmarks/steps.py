"""One training step of a soft prompt on a random Llama, ours and PEFT's: the same base, rows, dtype and threads."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from ptuning.model.packing import Row, pack_targets
from ptuning.model.prompted_model import PromptedModel

warnings.filterwarnings("ignore", message=".is_gradient_checkpointing. is deprecated", category=FutureWarning)  # peft 0.21

Step = Callable[[], Tensor]
TARGET = [7, 2]
"""The target of every row."""


class Size(NamedTuple):
    """The shape of a Llama."""

    layers: int
    width: int
    inner: int
    heads: int
    key_heads: int
    vocabulary: int


SIZES = {
    "58m": Size(8, 512, 1376, 8, 8, 32_000),
    "1b": Size(16, 2048, 8192, 32, 8, 128_256),
    "8b": Size(32, 4096, 14_336, 32, 8, 128_256),
}
"""Random bases: one for CPUs (25 M parameters, its embedding and head), and the shapes of Llama 3.2 1B and Llama 3.1 8B."""
SMALL = SIZES["58m"]


def random_llama(dtype: torch.dtype, size: Size = SMALL, device: str = "cpu") -> PreTrainedModel:
    """A Llama with random weights; on one device the same numbers at every call."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.width,
        intermediate_size=size.inner,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.key_heads,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        pad_token_id=0,
    )
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def random_rows(lengths: Sequence[int]) -> list[Row]:
    """Rows of so many tokens each, their target included; the same ones at every call."""
    draw = np.random.default_rng(1)
    return [(draw.integers(5, 4000, length - len(TARGET)).tolist(), TARGET) for length in lengths]


def random_vectors(length: int, width: int = SMALL.width) -> Tensor:
    """A soft prompt `[P, H]`; the same one at every call."""
    return torch.randn(length, width, generator=torch.Generator().manual_seed(2)) * 0.02


def our_step(model: PromptedModel, vectors: Tensor, rows: list[Row], slots: int = 1) -> Step:
    """Loss and gradient `[P, H]` by this project, of K equal soft prompts over equal rows, side by side."""
    soft_prompts = [vectors.to(model.base.device, copy=True).requires_grad_() for _ in range(slots)]

    def step() -> Tensor:
        for soft_prompt in soft_prompts:
            soft_prompt.grad = None
        nll = model(soft_prompts, pack_targets([len(vectors)] * slots, [rows] * slots))
        (nll.mean() * slots).backward()
        assert soft_prompts[-1].grad is not None
        return soft_prompts[-1].grad

    return step


def peft_model(base: PreTrainedModel, vectors: Tensor) -> tuple[Any, Tensor]:
    """PEFT's prompt tuning around a base, and its weight `[P, H]`."""
    from peft import PromptTuningConfig, get_peft_model  # not on a bare machine

    model: Any = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=len(vectors)))
    weight: Tensor = model.prompt_encoder["default"].embedding.weight
    weight.data.copy_(vectors)
    return model, weight


def peft_step(base: PreTrainedModel, vectors: Tensor, rows: list[Row]) -> Step:
    """The same by PEFT's prompt tuning, in a plain loop."""
    model, weight = peft_model(base, vectors)
    batch = padded(rows, base.device)

    def step() -> Tensor:
        weight.grad = None
        model(**batch).loss.backward()
        assert weight.grad is not None
        return weight.grad

    return step


def padded(rows: Sequence[Row], device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """A batch as PEFT's users make it: padded on the right to its longest row, labels -100 elsewhere."""
    longest = max(len(source) + len(target) for source, target in rows)
    ids, mask, labels = (torch.full((len(rows), longest), fill) for fill in (0, 0, -100))
    for row, (source, target) in enumerate(rows):
        end = len(source) + len(target)
        ids[row, :end], mask[row, :end] = torch.tensor(source + target), 1
        labels[row, len(source) : end] = torch.tensor(target)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: each.to(device) for name, each in batch.items()}


def flops(batch: int, text: int, length: int, size: Size) -> int:
    """FLOPs that a step of B rows of T tokens needs, as `tests/test_model.py` counts them: 4 per weight and token (frozen
    weights have no gradient), soft prompt once, last target never fed, last layer and head at targets only, backward pass of
    the first layer's projections for soft prompts only, attention."""
    fed, targets = batch * (text - 1), batch * len(TARGET)
    square, mlp = size.width * size.width, 3 * size.width * size.inner
    last = 2 * square + mlp  # queries, output projection and MLP of the last layer
    layer = last + 2 * square * size.key_heads // size.heads
    looked = length * length + fed * (length + text - 1)
    layers = 4 * (size.layers * layer - last) * (length + fed) + 4 * last * targets
    layers -= 2 * (square + 2 * square * size.key_heads // size.heads) * fed
    return layers + 6 * 2 * size.layers * size.width * looked + 4 * size.vocabulary * size.width * targets


def difference(found: Tensor, expected: Tensor) -> float:
    """Relative norm of what two gradients differ by."""
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def limit(dtype: torch.dtype) -> float:
    """By how much gradients that are computed in different orders may differ."""
    return 1e-4 if dtype == torch.float32 else 0.1
