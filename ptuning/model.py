"""`PromptedModel`: K soft prompts of any lengths over one frozen base, in one forward pass.

The pass is described by a `Plan`: which tokens stand where (a segment tree) and which token is predicted at which place.
Training, evaluation by loss and scoring of labels are three plans for the same pass, so they cannot see different tokens.
Logits are computed only where a token is predicted.

Shapes: K slots, B rows, P soft-prompt tokens, H width, V vocabulary, N packed tokens, M predictions.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from ptuning.last_layer import LastLayer
from ptuning.redaction import logger
from ptuning.segments import ATTENTION, Group, Segments

log = logger(__name__)

Row = tuple[list[int], list[int]]
"""Token ids of one example: input, target (with the end token)."""


@dataclass(frozen=True)
class Plan:
    """One forward pass: `tokens` [N - sum of P] text ids behind the soft prompts, predictions `targets` [M] made at
    packed places `at` [M], and how many predictions belong to each slot."""

    segments: Segments
    tokens: Tensor
    at: Tensor
    targets: Tensor
    per_slot: list[int]

    @property
    def positions(self) -> int:
        """Tokens that go through the base."""
        return self.segments.tokens


class _Packer:
    """Collects the pieces of a plan in packed order."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.segments = Segments()
        # A slot without soft prompt (length 0) is the bare base: its texts are roots themselves.
        self.roots = [self.segments.add([length]) if length else None for length in lengths]
        self.tokens: list[int] = []
        self.at: list[int] = []
        self.targets: list[int] = []
        self.per_slot: list[int] = []

    def plan(self) -> Plan:
        at = torch.tensor(self.at, dtype=torch.long)
        self.segments.read = at.unique()
        return Plan(
            self.segments,
            torch.tensor(self.tokens, dtype=torch.long),
            at,
            torch.tensor(self.targets, dtype=torch.long),
            self.per_slot,
        )


def plan_targets(lengths: Sequence[int], batches: Sequence[Sequence[Row]]) -> Plan:
    """The pass that predicts every target token of every row: training, and evaluation by loss.

    `lengths` [K] are the soft prompts' lengths, `batches[k]` the rows of slot k. The last target token is predicted but never
    fed: nothing comes after it.
    """
    packer = _Packer(lengths)
    for root, rows in zip(packer.roots, batches, strict=True):
        before = len(packer.at)
        if not all(source and target for source, target in rows):
            raise ValueError("a row needs at least one input and one target token")
        if rows:
            texts = [source + target[:-1] for source, target in rows]
            group = packer.segments.add([len(text) for text in texts], root)
            at = group.start
            for (source, target), text in zip(rows, texts, strict=True):
                packer.tokens += text
                packer.at += range(at + len(source) - 1, at + len(text))
                packer.targets += target
                at += len(text)
        packer.per_slot.append(len(packer.at) - before)
    return packer.plan()


def plan_labels(lengths: Sequence[int], inputs: Sequence[Sequence[list[int]]], labels: Sequence[list[int]]) -> Plan:
    """The pass that scores every label behind every input: `inputs[k]` are slot k's texts, `labels` [L] the same for all.

    Predictions come slot by slot, row by row, label by label. A text is computed once, however many labels continue it.
    """
    packer = _Packer(lengths)
    for root, texts in zip(packer.roots, inputs, strict=True):
        before = len(packer.at)
        if texts:
            _pack_labels(packer, root, texts, labels)
        packer.per_slot.append(len(packer.at) - before)
    return packer.plan()


def _pack_labels(packer: _Packer, root: Group | None, texts: Sequence[list[int]], labels: Sequence[list[int]]) -> None:
    group = packer.segments.add([len(text) for text in texts], root)
    for text in texts:
        packer.tokens += text
    longer = [label for label in labels if len(label) > 1]
    parents = [row for row in range(len(texts)) for _ in longer]
    behind = packer.segments.add([len(label) - 1 for label in longer] * len(texts), group, parents) if longer else None
    last, at = group.start - 1, behind.start if behind else 0
    for text in texts:
        last += len(text)
        for label in labels:
            packer.tokens += label[:-1]
            packer.at += [last, *range(at, at + len(label) - 1)]
            packer.targets += label
            at += len(label) - 1


def _forget_shapes() -> None:
    """Let oneDNN, which multiplies in bf16 on CPUs, keep few of the products that it has prepared.

    Rows lie unpadded, so hardly any step has shapes that were there before. By default the last 1,024 are kept, twice: oneDNN's
    (ONEDNN_PRIMITIVE_CACHE_CAPACITY) and torch's own (https://github.com/pytorch/pytorch/issues/98688). A worker with eight
    slots grew from 0.8 to 2.6 GB in 400 steps and on, since what is kept leaves holes in the heap; and finding one of them
    takes longer than the product saves. The layers of a step still share theirs. Read once, at the first product.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    os.environ.setdefault("LRU_CACHE_CAPACITY", "16")


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
        _forget_shapes()
        _remove_dropout(base)
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

    def forward(self, soft_prompts: Sequence[Tensor], plan: Plan) -> Tensor:
        """Negative log-likelihood of every predicted token, `[M]` fp32; `soft_prompts[k]` is `[P_k, H]` (P_k may be 0)."""
        device = self.base.device
        text = self.base.get_input_embeddings()(plan.tokens.to(device))
        pieces = [soft_prompt.to(text) for soft_prompt in soft_prompts if len(soft_prompt)]
        packed = torch.cat([*pieces, text])  # [N, H]
        logits = self._shared(packed, plan) if self.shared_prefix else self._concatenated(packed, plan)
        return cross_entropy(logits.float(), plan.targets.to(device), reduction="none")

    def _shared(self, packed: Tensor, plan: Plan) -> Tensor:
        """Logits `[M, V]`, every segment computed once."""
        device = packed.device
        out = self.base(
            inputs_embeds=packed[None],
            position_ids=plan.segments.positions()[None].to(device),
            # A ready 4-D mask switches off transformers' own mask building; segment_attention builds its own.
            attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device),
            use_cache=False,
            logits_to_keep=plan.at.to(device),
            segments=plan.segments,
        )
        return out.logits[0]

    def _concatenated(self, packed: Tensor, plan: Plan) -> Tensor:
        """Logits `[M, V]`, every sequence written out, padded on the right and computed whole."""
        device = packed.device
        index, lengths = plan.segments.sequences()
        valid = torch.arange(index.shape[1])[None] < lengths[:, None]
        where = torch.full((plan.positions,), -1)
        where[index[valid]] = valid.flatten().nonzero()[:, 0]  # any sequence that contains the token will do
        flat = where[plan.at]
        rows, columns = flat // index.shape[1], flat % index.shape[1]
        kept, column = torch.unique(columns, return_inverse=True)
        out = self.base(
            inputs_embeds=packed[index.to(device)],
            attention_mask=valid.long().to(device),
            use_cache=False,
            logits_to_keep=kept.to(device),
        )
        return out.logits[rows.to(device), column.to(device)]


def _remove_dropout(base: PreTrainedModel) -> None:
    """A frozen base is the same function in training, evaluation and serving."""
    # Falcon reads its dropout from the config in every pass, most others from their modules.
    for owner in (base.config.get_text_config(), *base.modules()):
        for name, value in vars(owner).items():
            if "drop" in name and isinstance(value, float):
                setattr(owner, name, 0.0)
        if isinstance(owner, nn.Dropout):
            owner.p = 0.0
