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
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from ptuning.model.label_trie import LabelTrie
from ptuning.model.last_layer import LastLayer
from ptuning.model.output_head import OutputHead
from ptuning.model.tree_attention import ATTENTION, Group, Segments
from ptuning.redaction import logger

log = logger(__name__)

WORTHWHILE = 0.75
"""Share of attention's scores that must be left for a second group of rows to pay: it is called twice as often then."""

Row = tuple[list[int], list[int]]
"""Token ids of one example: input, target (with the end token)."""


@dataclass(frozen=True)
class Choices:
    """Predictions among the children of label tries, over the nodes of all slots' tries."""

    at: Tensor
    """`[Q]` packed places where a node's children are compared."""
    node: Tensor
    """`[Q]` which node."""
    children: Tensor
    """`[nodes, C]` columns of `ids`, filled up with -1."""
    ids: Tensor
    """`[U]` token ids that any node chooses from, ascending."""
    asked: Tensor
    """`[M']` which of the Q comparisons a prediction belongs to."""
    child: Tensor
    """`[M']` the child that is predicted."""
    per_slot: list[int]


@dataclass(frozen=True)
class Plan:
    """One forward pass: `tokens` [N - sum of P] text ids behind the soft prompts, predictions `targets` [M] among the whole
    vocabulary made at packed places `at` [M], and how many of them belong to each slot; then those among labels."""

    segments: Segments
    tokens: Tensor
    at: Tensor
    targets: Tensor
    per_slot: list[int]
    choices: Choices | None = None

    @property
    def positions(self) -> int:
        """Tokens that go through the base."""
        return self.segments.tokens

    @cached_property
    def kept(self) -> Tensor:
        """Packed places at which anything is predicted, ascending, each once."""
        return (torch.cat([self.at, self.choices.at]) if self.choices else self.at).unique()

    def split(self, nll: Tensor) -> list[tuple[Tensor, Tensor]]:
        """What the pass returns, slot by slot: of tokens of the text, and of choices."""
        text = nll[: len(self.at)].split(self.per_slot)
        chosen = nll[len(self.at) :].split(self.choices.per_slot if self.choices else [0] * len(self.per_slot))
        return list(zip(text, chosen, strict=True))


@dataclass(frozen=True)
class Objective:
    """What the predictions of a slot's rows are: the target's tokens (`text`), the choices along a label's path (`trie`), or
    both."""

    trie: LabelTrie | None = None
    text: bool = True


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
        self.choices = _ChoicePacker()

    def plan(self) -> Plan:
        plan = Plan(self.segments, _ids(self.tokens), _ids(self.at), _ids(self.targets), self.per_slot, self.choices.choices())
        self.segments.read = plan.kept
        return plan


class _ChoicePacker:
    """Collects the choices of a plan. Slots of the same task share its trie's nodes."""

    def __init__(self) -> None:
        self.first_node: dict[LabelTrie, int] = {}
        self.nodes: list[tuple[int, ...]] = []
        self.at: list[int] = []
        self.node: list[int] = []
        self.asked: list[int] = []
        self.child: list[int] = []
        self.per_slot: list[int] = []

    def enter(self, trie: LabelTrie) -> int:
        """The number of a trie's first node."""
        if trie not in self.first_node:
            self.first_node[trie] = len(self.nodes)
            self.nodes += [each.children for each in trie.nodes]
        return self.first_node[trie]

    def ask(self, node: int, at: int, children: Sequence[int]) -> None:
        """Compare the children of a node at a packed place, and predict some of them."""
        self.asked += [len(self.at)] * len(children)
        self.child += children
        self.at.append(at)
        self.node.append(node)

    def end_slot(self) -> None:
        self.per_slot.append(len(self.child) - sum(self.per_slot))

    def choices(self) -> Choices | None:
        if not self.at:
            return None
        ids = sorted({child for children in self.nodes for child in children})
        column = {token: at for at, token in enumerate(ids)}
        most = max(map(len, self.nodes))
        children = [[column[child] for child in node] + [-1] * (most - len(node)) for node in self.nodes]
        return Choices(
            _ids(self.at), _ids(self.node), _ids(children), _ids(ids), _ids(self.asked), _ids(self.child), self.per_slot
        )


def _ids(values: Sequence[Any]) -> Tensor:
    return torch.tensor(values, dtype=torch.long)


def plan_targets(
    lengths: Sequence[int], batches: Sequence[Sequence[Row]], objectives: Sequence[Objective] | None = None
) -> Plan:
    """The pass that predicts every row's target: training, and evaluation by loss.

    `lengths` [K] are the soft prompts' lengths, `batches[k]` the rows of slot k, `objectives[k]` what is predicted of them
    (default: all tokens of the targets). What comes behind a row's last prediction is never fed.
    """
    packer = _Packer(lengths)
    for root, rows, objective in zip(packer.roots, batches, objectives or [Objective()] * len(lengths), strict=True):
        before = len(packer.at)
        if not all(source and target for source, target in rows):
            raise ValueError("a row needs at least one input and one target token")
        if rows:
            _pack_targets(packer, root, rows, objective)
        packer.per_slot.append(len(packer.at) - before)
        packer.choices.end_slot()
    return packer.plan()


def _pack_targets(packer: _Packer, root: Group | None, rows: Sequence[Row], objective: Objective) -> None:
    trie = objective.trie
    fed = [len(target) - 1 if objective.text or trie is None else trie.fed_length(tuple(target)) for _, target in rows]
    texts = [source + target[:many] for (source, target), many in zip(rows, fed, strict=True)]
    first = packer.choices.enter(trie) if trie else 0
    at = packer.segments.tokens
    for part in _alike([len(text) for text in texts], root.longest if root else 0):
        packer.segments.add(part, root)
    for (source, target), text in zip(rows, texts, strict=True):
        packer.tokens += text
        last = at + len(source) - 1
        if objective.text:
            packer.at += range(last, at + len(text))
            packer.targets += target
        if trie is not None:
            for node, child in trie.paths[tuple(target)]:
                packer.choices.ask(first + node, last + trie.nodes[node].depth, [child])
        at += len(text)


def _alike(lengths: list[int], before: int) -> list[list[int]]:
    """Rows `[R]` cut where it saves most of attention's padding, which is what a batch of mixed lengths costs: in a group every
    row is computed as long as the longest. Rows come ordered by length, so two groups save most of it."""

    def scores(part: list[int]) -> int:
        return len(part) * max(part) * (before + max(part))

    cut = min(range(1, len(lengths)), key=lambda at: scores(lengths[:at]) + scores(lengths[at:]), default=0)
    if not cut or scores(lengths[:cut]) + scores(lengths[cut:]) > WORTHWHILE * scores(lengths):
        return [lengths]
    return [lengths[:cut], lengths[cut:]]


def plan_labels(lengths: Sequence[int], inputs: Sequence[Sequence[list[int]]], trie: LabelTrie) -> Plan:
    """The pass that predicts every edge of the label trie behind every input: `inputs[k]` are slot k's texts.

    Predictions come slot by slot, row by row, edge by edge. A text is computed once, however many labels continue it.
    """
    packer = _Packer(lengths)
    for root, texts in zip(packer.roots, inputs, strict=True):
        if texts:
            _pack_labels(packer, root, texts, trie)
        packer.per_slot.append(0)
        packer.choices.end_slot()
    return packer.plan()


def _pack_labels(packer: _Packer, root: Group | None, texts: Sequence[list[int]], trie: LabelTrie) -> None:
    group = packer.segments.add([len(text) for text in texts], root)
    for text in texts:
        packer.tokens += text
    many = len(trie.tokens)
    behind = 0
    if many:
        behind = packer.segments.add([many] * len(texts), group, list(range(len(texts))), tree=trie.parents).start
        packer.tokens += trie.tokens * len(texts)
    first, last = packer.choices.enter(trie), group.start - 1
    for row, text in enumerate(texts):
        last += len(text)
        for at, node in enumerate(trie.nodes, first):
            packer.choices.ask(at, last if node.place < 0 else behind + row * many + node.place, range(len(node.children)))


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

    def forward(self, soft_prompts: Sequence[Tensor], plan: Plan) -> Tensor:
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

    def _shared(self, packed: Tensor, plan: Plan, kept: Tensor) -> Tensor:
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

    def _concatenated(self, packed: Tensor, plan: Plan, kept: Tensor) -> Tensor:
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
