"""Negative log-likelihood of tokens over the whole vocabulary, for many predictions.

torch's cross-entropy keeps the logits in float32, their log-softmax and its gradient beside the logits of the base: 16 bytes
for each of M * V numbers with a base in 16 bits, which are tens of GB for a large vocabulary. Here everything but the logits
and their gradient is computed for a few predictions at a time, and only the logarithm of the sum of a row is kept.

Shapes: M predictions, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ptuning.model.limits import LOGITS


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Logits `[M, V]`, targets `[M]` -> negative log-likelihoods `[M]` fp32."""
    if logits.numel() <= LOGITS:
        return cross_entropy(logits.float(), targets, reduction="none")
    nll: Tensor = _InParts.apply(logits, targets)
    return nll


class _InParts(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, logits: Tensor, targets: Tensor) -> Tensor:
        many = max(1, LOGITS // logits.shape[1])
        sums = torch.cat([part.float().logsumexp(1) for part in logits.split(many)])
        context.save_for_backward(logits, targets, sums)
        return sums - logits.gather(1, targets[:, None])[:, 0].float()

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        logits, targets, sums = context.saved_tensors
        many = max(1, LOGITS // logits.shape[1])
        found = torch.empty_like(logits)
        parts = (each.split(many) for each in (logits, targets, sums, gradients[0], found))
        for part, target, total, gradient, into in zip(*parts, strict=True):
            shares = (part.float() - total[:, None]).exp_().mul_(gradient[:, None])
            into.copy_(shares.scatter_add_(1, target[:, None], -gradient[:, None]))
        return found, None
