"""Log-probabilities of the tokens of a text, by the pass of training and evaluation.

Shapes: T tokens of the text, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ptuning.inference.sampling import Token
from ptuning.model.limits import LOGITS
from ptuning.model.packing import kv_slots, pack_targets
from ptuning.model.prompted_model import PromptedModel


@torch.no_grad()
def score_text(model: PromptedModel, vectors: Tensor, ids: Sequence[int], top: int, vocabulary: int) -> list[Token]:
    """Every token but the first. `vectors`: those of the soft prompt; `ids` `[T]`.

    One pass, unless the logits of a long text over a large vocabulary need more memory than a pass may have.
    """
    most = max(1, LOGITS // vocabulary)
    found: list[Token] = []
    for begin in range(1, len(ids), most):
        part = list(ids[begin : begin + most])
        plan = pack_targets([len(vectors)], [[(list(ids[:begin]), part)]], kv=kv_slots([vectors]))
        logits = model.text_logits([vectors], plan).float()
        logprobs = torch.log_softmax(logits, -1)
        own = logprobs.gather(1, torch.tensor(part, device=logits.device)[:, None])[:, 0].tolist()
        values, likely = (each.tolist() for each in logprobs.topk(min(top, logprobs.shape[1])))
        for token, logprob, others, theirs in zip(part, own, likely, values, strict=True):
            found.append(Token(token, logprob, tuple(zip(others, theirs, strict=True))))
    return found
