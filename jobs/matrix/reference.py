"""What a base with a soft prompt in front computes, by plain transformers: row by row, without a cache and without padding.

The text goes in as token ids, and a hook replaces the first rows of the input embedding by the soft prompt. So bases whose
layers look up ids, too, are compared with what they compute for the text itself; the virtual tokens need some id there, and
each of a few is allowed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from matrix.shrink import BEGIN, END, PAD
from ptuning.model.label_trie import LabelTrie
from ptuning.model.packing import Row

STAND_INS = (3, PAD, BEGIN, END)
"""Ids that may stand for virtual tokens in layers that look up ids. 3 is an ordinary token."""
TIE = 1e-3
"""Two logits that differ by less, relative to the spread of all, are equal: either token may be chosen."""


class Reference:
    """A plain model, as `load_plain` gives it."""

    def __init__(self, model: PreTrainedModel, stand_in: int = STAND_INS[0]) -> None:
        self.model = model
        self.stand_in = stand_in
        embedding: Any = model.get_input_embeddings()
        self.width = int(self.embed([BEGIN]).shape[-1])
        self.rows = int(embedding.weight.shape[0])

    def embed(self, ids: Sequence[int]) -> Tensor:
        """Rows of the input embedding, `[T, H]`, as the base's layers get them."""
        embedding: Any = self.model.get_input_embeddings()
        found: Tensor = embedding(torch.tensor([list(ids)]))
        return found[0]

    def logits(self, soft_prompt: Tensor, ids: Sequence[int]) -> Tensor:
        """Logits `[P + T, V]` of a soft prompt `[P, H]` and the text after it."""
        whole = torch.tensor([[self.stand_in] * len(soft_prompt) + list(ids)])
        with self._in_front(soft_prompt):
            found: Tensor = self.model(input_ids=whole, use_cache=False).logits
        return found[0].float()

    @contextmanager
    def _in_front(self, soft_prompt: Tensor) -> Iterator[None]:
        def replace(module: Any, inputs: Any, out: Tensor) -> Tensor:
            return torch.cat([soft_prompt.to(out)[None], out[:, len(soft_prompt) :]], 1)

        hook = self.model.get_input_embeddings().register_forward_hook(replace) if len(soft_prompt) else None
        try:
            yield
        finally:
            if hook:
                hook.remove()

    @torch.no_grad()
    def is_causal(self) -> bool:
        """Whether a token depends only on the tokens before it."""
        ids = [5, 90, 17, 44, 8, 120, 31, 60, 77, 12]
        before, after = (self.logits(torch.zeros(0, self.width), [*ids, last]) for last in (33, 34))
        return bool((before[:-1] - after[:-1]).abs().max() <= 1e-4 * before.std())

    @torch.no_grad()
    def takes_vectors(self) -> bool:
        """Whether vectors in the place of ids give the same logits: false where layers look up ids, too."""
        ids = [5, 90, 17, 44, 8, 120, 31, 60, 77, 12]
        expected = self.logits(torch.zeros(0, self.width), ids)[:-1]
        try:
            vectors = self.embed(ids)[None].clone()
            vectors[:, -1] *= 1.5  # Gemma 4 finds out the ids of embeddings that have one
            found = self.model(inputs_embeds=vectors, use_cache=False).logits[0, :-1].float()
        except Exception:  # every architecture refuses in its own way
            return False
        return found.shape == expected.shape and bool((found - expected).abs().max() <= 1e-4 * expected.std())

    @torch.no_grad()
    def context(self) -> float:
        """How much the last logits depend on the first token, relative to their spread."""
        ids = [90, 17, 44, 8, 120, 31, 60, 77, 12]
        one, other = (self.logits(torch.zeros(0, self.width), [first, *ids])[-1] for first in (5, 205))
        return float((one - other).abs().max() / one.std())

    def nll(self, soft_prompt: Tensor, row: Row) -> Tensor:
        """Negative log-likelihood of a row's target tokens."""
        source, target = row
        logits = self.logits(soft_prompt, [*source, *target])
        return cross_entropy(logits[-len(target) - 1 : -1], torch.tensor(target), reduction="none")

    @torch.no_grad()
    def label_logprobs(self, soft_prompt: Tensor, source: list[int], trie: LabelTrie) -> Tensor:
        """Log-probability of each label: at each of its tokens, a softmax over those that any label has there."""
        found = []
        for label in trie.labels:
            logits = self.logits(soft_prompt, [*source, *label])
            total = torch.zeros(())
            for depth, token in enumerate(label):
                allowed = sorted({other[depth] for other in trie.labels if other[:depth] == label[:depth]})
                among = torch.log_softmax(logits[len(soft_prompt) + len(source) - 1 + depth, torch.tensor(allowed)], -1)
                total = total + among[allowed.index(token)]
            found.append(total)
        return torch.stack(found)

    @torch.no_grad()
    def disagreement(self, soft_prompt: Tensor, source: Sequence[int], got: Sequence[int], new: int) -> str:
        """Empty if `got` is a greedy continuation of at most `new` tokens; tokens with equal logits count as the same."""
        if len(got) > new or END in got[:-1] or (len(got) < new and END not in got[-1:]):
            return f"{list(got)} does not end where it should"
        before = len(soft_prompt) + len(source) - 1
        whole = self.logits(soft_prompt, [*source, *got[:-1]])[before:]  # a causal base needs one pass
        for at, token in enumerate(got):
            if not _chosen(whole[at], token):
                logits = self.logits(soft_prompt, [*source, *got[:at]])[-1]  # where positions depend on the length of the text
                if not _chosen(logits, token):
                    return f"token {at}: {token} instead of {int(logits.argmax())}"
        return ""

    @torch.no_grad()
    def greedy(self, soft_prompt: Tensor, source: Sequence[int], new: int) -> tuple[list[int], float]:
        """The greedy continuation up to the end token, and the smallest lead of a chosen logit, relative to the spread."""
        ids, lead = list(source), float("inf")
        for _ in range(new):
            logits = self.logits(soft_prompt, ids)[-1]
            first, second = logits.topk(2).values.tolist()
            lead = min(lead, (first - second) / float(logits.std()))
            ids.append(int(logits.argmax()))
            if ids[-1] == END:
                break
        return ids[len(source) :], lead


def _chosen(logits: Tensor, token: int) -> bool:
    """Whether a token has the largest logit, or one that is equal to it."""
    return float(logits.max() - logits[token]) <= TIE * float(logits.std())
