"""`PromptedModel`: K soft prompts of any lengths over one frozen base, in one forward pass.

The pass is described by a `Plan`: which tokens stand where (a segment tree) and what is predicted at which place: a token
among the whole vocabulary, or a choice among the children of a label trie's node. Training, evaluation by loss and scoring of
labels are plans for the same pass, so they cannot see different tokens. Logits are computed only where something is predicted,
and only for the tokens that it is predicted among.

Shapes: K slots, B rows, P soft-prompt tokens, H width, V vocabulary, N packed tokens, M predictions among V, M' choices, Q
comparisons of a node's children (at most C), U tokens that are compared anywhere.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from ptuning import environment
from ptuning.model.last_layer import LastLayer
from ptuning.model.output_head import OutputHead
from ptuning.model.packing import Choices, PackedBatch
from ptuning.model.tree_attention import ATTENTION
from ptuning.redaction import logger

log = logger(__name__)


class PromptedModel(nn.Module):
    """A frozen base that runs plans.

    Soft prompts are arguments, not parameters of this module: the base may be partitioned by ZeRO-3 while the soft prompts,
    a few thousand numbers, stay whole on every rank.
    """

    def __init__(self, base: PreTrainedModel) -> None:
        super().__init__()
        if "logits_to_keep" not in inspect.signature(base.forward).parameters:
            raise ValueError(f"{type(base).__name__} cannot compute logits at chosen places (no logits_to_keep)")
        self.base = base.requires_grad_(False).eval()
        environment.apply("torch")
        _remove_dropout(base)
        self.head = OutputHead(base)
        self.last_layer = LastLayer(base, base.config.get_text_config().num_hidden_layers)
        self.shared_prefix = self._take_segment_attention()
        """True if soft prompts are computed once per pass and shared by their rows, False for plain concatenation."""

    def _take_segment_attention(self) -> bool:
        kinds = set(getattr(self.base.config, "layer_types", None) or ["full_attention"])
        if self.base._supports_attention_backend and kinds <= {"full_attention", "sliding_attention"}:
            self.base.set_attn_implementation(ATTENTION)
            return True
        log.warning("%s: no shared-prefix attention, soft prompts are concatenated row by row", type(self.base).__name__)
        return False

    def checkpoint_gradients(self) -> None:
        """Recompute activations in the backward pass: less memory, about a third more compute."""
        self.base.activation_checkpointing_enable({"use_reentrant": False})
        for module in self.base.modules():
            # transformers checkpoints layers in training mode only.
            if getattr(module, "gradient_checkpointing", False) or hasattr(module, "_gradient_checkpointing_func"):
                module.training = True

    def forward(self, soft_prompts: Sequence[Tensor], plan: PackedBatch) -> Tensor:
        """Negative log-likelihood of every prediction, `[M + M']` fp32: tokens of the text among the whole vocabulary, then
        choices among the children of their nodes. `soft_prompts[k]` is `[P_k, H]` (P_k may be 0)."""
        device = self.base.device
        text = self.base.get_input_embeddings()(plan.tokens.to(device))
        pieces = [soft_prompt.to(text) for soft_prompt in soft_prompts if len(soft_prompt)]
        packed = torch.cat([*pieces, text])  # [N, H]
        choices = plan.choices
        kept = plan.kept
        with self.head.only(choices.ids if choices and not len(plan.at) else None):
            logits = self._shared(packed, plan, kept) if self.shared_prefix else self._concatenated(packed, plan, kept)
        place = torch.empty(plan.positions, dtype=torch.long)
        place[kept] = torch.arange(len(kept))
        parts = []
        if len(plan.at) or not choices:
            rows = logits if len(plan.at) == len(logits) else logits.index_select(0, place[plan.at].to(device))
            parts.append(cross_entropy(rows.float(), plan.targets.to(device), reduction="none"))
        if choices:
            rows = logits.index_select(0, place[choices.at].to(device)).float()
            parts.append(choice_nll(rows, choices))
        return torch.cat(parts)

    def _shared(self, packed: Tensor, plan: PackedBatch, kept: Tensor) -> Tensor:
        """Logits of the packed places `kept`, `[kept, V or U]`, every segment computed once."""
        device = packed.device
        out = self.base(
            inputs_embeds=packed[None],
            position_ids=plan.segments.positions()[None].to(device),
            # A ready 4-D mask switches off transformers' own mask building; segment_attention builds its own.
            attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device),
            use_cache=False,
            logits_to_keep=kept.to(device),
            segments=plan.segments,
        )
        return out.logits[0]

    def _concatenated(self, packed: Tensor, plan: PackedBatch, kept: Tensor) -> Tensor:
        """The same with every sequence written out, padded on the right and computed whole."""
        device = packed.device
        index, lengths = plan.segments.sequences()
        valid = torch.arange(index.shape[1])[None] < lengths[:, None]
        where = torch.full((plan.positions,), -1)
        where[index[valid]] = valid.flatten().nonzero()[:, 0]  # any sequence that contains the token will do
        flat = where[kept]
        rows, columns = flat // index.shape[1], flat % index.shape[1]
        wanted, column = torch.unique(columns, return_inverse=True)
        out = self.base(
            inputs_embeds=packed[index.to(device)],
            attention_mask=valid.long().to(device),
            use_cache=False,
            logits_to_keep=wanted.to(device),
        )
        return out.logits[rows.to(device), column.to(device)]


def choice_nll(logits: Tensor, choices: Choices) -> Tensor:
    """Logits `[Q, U or V]` fp32 of every comparison -> negative log-likelihood of every choice, `[M']`."""
    device = logits.device
    children = choices.children.to(device)
    hidden = children < 0
    if logits.shape[1] != len(choices.ids):  # of the whole vocabulary
        children = choices.ids.to(device)[children]
    node = choices.node.to(device)
    among = logits.gather(1, children.clamp(min=0)[node]).masked_fill(hidden[node], -math.inf)  # [Q, C]
    return -torch.log_softmax(among, -1)[choices.asked.to(device), choices.child.to(device)]


def _remove_dropout(base: PreTrainedModel) -> None:
    """A frozen base is the same function in training, evaluation and serving."""
    # Falcon reads its dropout from the config in every pass, most others from their modules.
    for owner in (base.config.get_text_config(), *base.modules()):
        for name, value in vars(owner).items():
            if "drop" in name and isinstance(value, float):
                setattr(owner, name, 0.0)
        if isinstance(owner, nn.Dropout):
            owner.p = 0.0
