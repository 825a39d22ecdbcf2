"""Greedy text of a base after soft prompts, by transformers' `generate`.

Shapes: n rows, P soft-prompt tokens, H width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ptuning.data.encoder import Encoder
from ptuning.model.kv_prefix import cache_of
from ptuning.model.prompted_model import PromptedModel
from ptuning.model.self_check import how_it_generates
from ptuning.training.distributed import Workers


@dataclass(frozen=True)
class Greedy:
    """Greedy continuations of inputs, each after its soft prompt."""

    model: PromptedModel
    encoder: Encoder
    max_new_tokens: int
    together: bool = False
    """Workers that share a base continue until the last of them has finished, because each layer needs all of them."""

    def texts(self, soft_prompts: Tensor | Sequence[Tensor], inputs: Sequence[list[int]]) -> list[str]:
        """Stripped texts, as `ids`."""
        return self.encoder.texts_of(self.ids(soft_prompts, inputs))

    @torch.no_grad()
    def ids(self, soft_prompts: Tensor | Sequence[Tensor], inputs: Sequence[list[int]]) -> list[list[int]]:
        """Token ids after each of the n inputs, up to the end token or `max_new_tokens`. An end is the encoder's end token,
        whichever of the base's it was.

        `soft_prompts`: one for each input, or one for all.
        """
        given = [soft_prompts] * len(inputs) if isinstance(soft_prompts, Tensor) else list(soft_prompts)
        how = how_it_generates(self.model)
        if how == "padded":
            return self._by_kind(given, inputs)
        calls = max(Workers.current().all_gather(len(inputs))) if self.together else len(inputs)
        padding = [0] * (calls - len(inputs))
        found = []
        for at in [*range(len(inputs)), *padding]:
            if how == "recomputed" and given[at].ndim == 2:
                found.append(self._recomputed(given[at], inputs[at]))
            else:
                found += self._batch([given[at]], [inputs[at]])
        return found[: len(inputs)]

    def _by_kind(self, soft_prompts: Sequence[Tensor], inputs: Sequence[list[int]]) -> list[list[int]]:
        """For soft prompts of several kinds: a batch has embeddings, or prefixes of one length."""
        groups: dict[int, list[int]] = {}
        for at, each in enumerate(soft_prompts):
            groups.setdefault(len(each) if each.ndim > 2 else 0, []).append(at)
        found: list[list[int]] = [[] for _ in inputs]
        for rows in groups.values():
            made = self._batch([soft_prompts[at] for at in rows], [inputs[at] for at in rows])
            for at, ids in zip(rows, made, strict=True):
                found[at] = ids
        return found

    def _recomputed(self, soft_prompt: Tensor, ids: list[int]) -> list[int]:
        """Without any cache. `together`: all workers make the same number of passes."""
        made: list[int] = []
        with self.model.plain() as base:
            for _ in range(self.max_new_tokens):
                row = torch.tensor([[0] * len(soft_prompt) + ids + made], device=base.device)
                embeddings = base.get_input_embeddings()(row)
                embeddings[0, : len(soft_prompt)] = soft_prompt.to(embeddings)
                made.append(int(base(**self.model.inputs(embeddings, row), use_cache=False).logits[0, -1].argmax()))
                if made[-1] in self._ends and not self.together:
                    break
        return self._ended(made)

    def _batch(self, soft_prompts: Sequence[Tensor], inputs: Sequence[list[int]]) -> list[list[int]]:
        """By one call of `generate`."""
        if soft_prompts[0].ndim > 2:
            return self._continued(soft_prompts, inputs)
        device = self.model.base.device
        embed = self.model.base.get_input_embeddings()
        # One call for all rows: a partitioned base gathers at every call, and workers may have different numbers of rows.
        text = embed(torch.tensor([token for ids in inputs for token in ids], device=device))
        texts = text.split([len(ids) for ids in inputs])
        rows = [torch.cat([soft_prompt.to(text), row]) for soft_prompt, row in zip(soft_prompts, texts, strict=True)]
        longest = max(len(row) for row in rows)
        # Padding is on the left, because `generate` continues at the right end.
        embeds = torch.stack([torch.cat([row.new_zeros(longest - len(row), row.shape[1]), row]) for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
        ids_of_text = torch.tensor([[0] * (longest - len(ids)) + ids for ids in inputs], device=device)
        with self.model.plain():
            # Ids, because not every architecture continues embeddings (Falcon-H1, 5.23).
            self.model.embedding.replace(embeds)
            return self._generated(ids_of_text, mask)

    def _continued(self, prefixes: Sequence[Tensor], inputs: Sequence[list[int]]) -> list[list[int]]:
        """`_batch` after key-value prefixes of one length: they are the cache that `generate` continues."""
        device, length = self.model.base.device, len(prefixes[0])
        longest = max(map(len, inputs))
        # `generate` leaves out as many leading ids as the cache has tokens.
        ids = torch.tensor([[0] * (length + longest - len(row)) + row for row in inputs], device=device)
        mask = torch.tensor([[1] * length + [0] * (longest - len(row)) + [1] * len(row) for row in inputs], device=device)
        cache = cache_of([each.to(device) for each in prefixes], self.model.base.dtype)
        with self.model.plain():
            return self._generated(ids, mask, past_key_values=cache)

    def _generated(self, ids: Tensor, mask: Tensor, **more: Any) -> list[list[int]]:
        generating: Any = self.model.base  # its type has no generation
        made = generating.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            eos_token_id=sorted(self._ends),
            pad_token_id=self.encoder.end,
            # transformers detects this itself only while an HfDeepSpeedConfig exists (generation/utils.py).
            synced_gpus=self.together,
            **more,
        )
        return [self._ended(row) for row in made[:, ids.shape[1] :].tolist()]

    @property
    def _ends(self) -> set[int]:
        return {self.encoder.end, int(self.encoder.tokenizer.eos_token_id), *self.model.ends}

    def _ended(self, made: list[int]) -> list[int]:
        """Up to the first end."""
        ends = self._ends
        first = next((at for at, token in enumerate(made) if token in ends), None)
        return made if first is None else [*made[:first], self.encoder.end]
