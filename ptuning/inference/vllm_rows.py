"""Rows for soft prompts behind vLLM's input embedding. Only vLLM's workers import it.

A worker imports this module for its extension class before it loads the model (`worker_extension_cls`). The module registers
layers that vLLM (0.29) then uses in place of its own. The input embedding gets rows above the vocabulary, which the ids of soft
prompts look up. The output head does not get them, so these ids can never be generated, and the files of the base are used as
they are. Rows are written while the model runs: workers do one thing after the other, so no step sees half a soft prompt.

Shapes: V vocabulary, R reserved rows, H width, P virtual tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.v1.sample.sampler import Sampler

from ptuning.inference.vllm_requests import ROWS, VECTORS
from ptuning.inference.vllm_sampling import PerRequestSampler

PROBED = 64
"""Tokens whose embeddings tell by how much the model scales them."""


class _Method(UnquantizedEmbeddingMethod):
    """Where a tied base uses its input embedding as output head: without the rows of soft prompts."""

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        logits: Tensor = super().apply(layer, x, bias)
        return logits[..., : layer.shard_indices.num_org_elements_padded]


@VocabParallelEmbedding.register_oot
class PromptEmbedding(VocabParallelEmbedding):
    """The input embedding, with `[R, H]` rows above the vocabulary. Other embeddings, such as those of positions, have none."""

    quant_method: Any

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        params_dtype: torch.dtype | None = None,
        org_num_embeddings: int | None = None,
        *further: Any,
        **options: Any,
    ) -> None:
        config = get_current_vllm_config()
        rows = int((config.additional_config or {}).get(ROWS, 0))
        own = org_num_embeddings or num_embeddings
        self.rows = rows if own == num_embeddings == config.model_config.get_vocab_size() else 0
        super().__init__(num_embeddings + self.rows, embedding_dim, params_dtype, own, *further, **options)
        if self.rows and type(self.quant_method) is UnquantizedEmbeddingMethod:
            self.quant_method = _Method()

    def places(self, first: int, many: int) -> tuple[int, int, int]:
        """Of `many` ids from `first` on: how many of them are before those in this rank's part, how many are in it, and the row
        of the first one of these."""
        shard = self.shard_indices
        if self.tp_size == 1:  # an id is its row there
            return 0, many, first
        begin, end = max(first, shard.added_vocab_start_index), min(first + many, shard.added_vocab_end_index)
        return begin - first, max(0, end - begin), shard.num_org_elements_padded + begin - shard.added_vocab_start_index


@ParallelLMHead.register_oot
class PlainHead(ParallelLMHead):
    """The output head of a tied base shares the rows of the vocabulary only."""

    def tie_weights(self, embed_tokens: VocabParallelEmbedding) -> nn.Module:
        if not getattr(embed_tokens, "rows", 0):
            return super().tie_weights(embed_tokens)
        many = embed_tokens.shard_indices.num_org_elements_padded
        self.weight = nn.Parameter(embed_tokens.weight[:many], requires_grad=False)
        return self


class SoftPromptRows:
    """What a worker can be asked, by `collective_rpc`. Arguments and answers are numbers, texts and bytes."""

    model_runner: Any

    @torch.inference_mode()
    def open_soft_prompts(self) -> list[str]:
        """Called once, after the model was loaded. Returns why soft prompts cannot be served; empty if they can."""
        model = self.model_runner.get_model()
        found = [each for each in model.modules() if isinstance(each, PromptEmbedding) and each.rows]
        if len(found) != 1:
            return [f"{len(found)} embeddings have the size of the vocabulary"]
        (self._embedding,) = found
        if type(self._embedding.quant_method) is not _Method:
            return ["its input embedding is quantised"]
        ids = torch.arange(min(PROBED, model.config.get_text_config().vocab_size), device=self._embedding.weight.device)
        plain, used = self._embedding(ids).float(), model.embed_input_ids(ids).float()
        self._scale = float((used * plain).sum() / (plain * plain).sum())
        # The model multiplies what it looks up, as Gemma does, or it does something else.
        if not torch.allclose(used, plain * self._scale, rtol=1e-2, atol=1e-3 * float(used.abs().max())):
            return ["it changes its embeddings by more than a factor"]
        if type(self.model_runner.sampler) is not Sampler:
            return ["this version of vLLM has another sampler"]
        self.model_runner.sampler.__class__ = PerRequestSampler  # it has state of its own
        return []

    @torch.inference_mode()
    def write_soft_prompt(self, data: bytes, first: int) -> bool:
        """Write a soft prompt `[P, H]`, the tensor of a safetensors file, under the ids from `first` on. False: it is not
        finite in the dtype of the rows, and nothing was written."""
        rows = (load(data)[VECTORS].float() / self._scale).to(self._embedding.weight)
        if not bool(torch.isfinite(rows).all()):
            return False
        before, many, row = self._embedding.places(first, len(rows))
        self._embedding.weight[row : row + many] = rows[before : before + many]
        return True
