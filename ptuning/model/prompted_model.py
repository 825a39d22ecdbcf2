"""`PromptedModel`: K soft prompts of any lengths over one frozen base, in one forward pass.

A `PackedBatch` describes the pass: the arrangement of the tokens (a segment tree), and the predictions: a token of the whole
vocabulary, or a choice among the children of a label trie's node. Training, evaluation by loss and scoring of labels use the
same pass, so they cannot see different tokens. Logits are computed only at positions with a prediction, and only for the tokens
that can be predicted there.

Shapes: K slots, B rows, P soft-prompt tokens, H width, V vocabulary, N packed tokens, M predictions over V, M' choices, Q
comparisons of a node's children (at most C), U tokens that occur in any comparison.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from ptuning import environment
from ptuning.errors import BaseError
from ptuning.model.base import listed_ends
from ptuning.model.first_layer import FirstLayer
from ptuning.model.input_embedding import InputEmbedding
from ptuning.model.label_cache import has_trees, label_logits
from ptuning.model.last_layer import LastLayer
from ptuning.model.output_head import OutputHead
from ptuning.model.packed_batch import Candidates, PackedBatch, PlacedBatch
from ptuning.model.packed_layers import Layout, PackedLayers
from ptuning.model.token_loss import token_nll
from ptuning.model.tree_attention import ATTENTION, tree_mask

CHUNK = 16
"""Tokens of a state space's chunk on a CPU."""


class PromptedModel(nn.Module):
    """A frozen base that runs packed batches.

    Soft prompts are arguments, not parameters of this module: ZeRO-3 may partition the base, while the soft prompts, a few
    thousand numbers, stay whole on every rank.
    """

    def __init__(self, base: PreTrainedModel) -> None:
        super().__init__()
        self.base = base.requires_grad_(False).eval()
        self.selects = "logits_to_keep" in inspect.signature(base.forward).parameters
        """The base computes logits at selected positions. A few do not (Whisper, TrOCR, xLSTM; transformers 5.23)."""
        environment.apply("torch")
        # On Hopper and newer, torch prefers cuDNN's attention (2.9, sdp_utils.cpp: check_prefer_cudnn_attention). It builds a
        # plan for every new shape (0.4 s and more), and rows are packed without padding: nearly every step has new shapes.
        torch.backends.cuda.enable_cudnn_sdp(False)
        _remove_dropout(base)
        _shorten_chunks(base)
        _keep_gradients(base)
        self.head = OutputHead(base)
        layers = getattr(base.config.get_text_config(), "num_hidden_layers", 0)
        self.first_layer = FirstLayer(base, layers)
        self.last_layer = LastLayer(base, layers)
        self.embedding = InputEmbedding(base)
        self._plain_attention = base.config._attn_implementation
        configs = (base.generation_config, base.config.get_text_config())
        self.ends = tuple(listed_ends(*(getattr(config, "eos_token_id", None) for config in configs)))
        """Token ids that end a text, by the configs of the base."""
        # What a base's generation config asks for (a penalty for repetition, say) would act here, and not in serving.
        base.generation_config = GenerationConfig()
        kinds = set(getattr(base.config, "layer_types", None) or ["full_attention"])
        self._shared_prefix = False
        self._packed_layers: PackedLayers | None = None
        self.generates: Literal["padded", "alone", "recomputed"] | None = None
        """How transformers' `generate` is right for this base (`self_check.how_it_generates`); None: not checked yet."""
        self.kv_shape: tuple[int, int, int] | None = None
        """Layers, key heads and their width of a key-value prefix (`kv_prefix.kv_shape`); None: not checked yet."""
        self.shared_prefix = base._supports_attention_backend and kinds <= {"full_attention", "sliding_attention"}
        if not self.shared_prefix:
            self._pack_layers()  # now, before others register hooks on the same modules
        self.continues_texts = False
        """Labels may continue the base's own cache of a text (`self_check`), if soft prompts are concatenated."""

    @property
    def shared_prefix(self) -> bool:
        """True if a soft prompt is computed once per pass and shared by its rows, False for plain concatenation."""
        return self._shared_prefix

    @shared_prefix.setter
    def shared_prefix(self, shared: bool) -> None:
        if shared != self._shared_prefix:
            self.base.set_attn_implementation(ATTENTION if shared else self._plain_attention)
        self._shared_prefix = shared

    @property
    def needs_ids(self) -> bool:
        """The base looks up more than its input embedding by token id."""
        return self.embedding.needs_ids

    @contextmanager
    def plain(self) -> Iterator[PreTrainedModel]:
        """The base with transformers' own attention, for passes of its own."""
        shared = self.shared_prefix
        self.shared_prefix = False
        if self._packed_layers:
            self._packed_layers.forget()
        try:
            yield self.base
        finally:
            self.shared_prefix = shared

    def checkpoint_gradients(self) -> None:
        """Recompute activations in the backward pass: less memory, about half more compute.

        Raises:
            BaseError: transformers cannot do that with this base.
        """
        try:
            self.base.activation_checkpointing_enable({"use_reentrant": False})
        except ValueError:
            name = type(self.base).__name__
            raise BaseError(f"train.gradient_checkpointing: {name} does not support it; set it to false") from None
        for module in self.base.modules():
            # transformers checkpoints layers only in training mode.
            if getattr(module, "gradient_checkpointing", False) or hasattr(module, "_gradient_checkpointing_func"):
                module.training = True

    @property
    def cascades(self) -> bool:
        """Whether passes need the levels of `cascade_attention`: on GPUs, where it computes the tree's attention."""
        return self.shared_prefix and self.base.device.type not in ("cpu", "meta") and self.base.dtype.itemsize == 2

    def forward(self, soft_prompts: Sequence[Tensor] | Tensor, plan: PackedBatch, placed: PlacedBatch | None = None) -> Tensor:
        """Negative log-likelihood of every prediction, `[M + M']` fp32: tokens of the text over the whole vocabulary, then
        choices over the children of their nodes.

        `soft_prompts[k]` is `[P_k, H]` (P_k may be 0), or `[P_k, layers, 2, heads, d]` for a slot that the plan has as a
        key-value prefix; neighbours `[P_k, H]` may be one tensor. `placed`: the plan on the base's device, if it is there
        already.
        """
        placed = placed or plan.placed(self.base.device, self.cascades)
        packed = self._packed(soft_prompts, plan, placed)
        choices = plan.choices
        with self.head.only(placed.ids if choices and not len(plan.at) else None):
            logits = self._logits(packed, plan, placed)
        parts = []
        if len(plan.at) or not choices:
            nll = token_nll(logits if placed.rows is None else logits.index_select(0, placed.rows), placed.targets)
            parts.append(nll if placed.candidates is None else nll + _other_tokens(logits, placed, placed.candidates))
        if choices:
            parts.append(choice_nll(logits.index_select(0, placed.choice_rows).float(), placed))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @torch.no_grad()
    def text_logits(self, soft_prompts: Sequence[Tensor], plan: PackedBatch) -> Tensor:
        """Logits `[M, V]` of every prediction of a token of the text. `plan` has no choices."""
        placed = plan.placed(self.base.device, self.cascades)
        logits = self._logits(self._packed(soft_prompts, plan, placed), plan, placed)
        return logits if placed.rows is None else logits.index_select(0, placed.rows)

    def _packed(self, soft_prompts: Sequence[Tensor] | Tensor, plan: PackedBatch, placed: PlacedBatch) -> Tensor:
        """Soft prompts and text, `[N, H]`."""
        text = self.base.get_input_embeddings()(placed.tokens)
        given = [soft_prompts] if isinstance(soft_prompts, Tensor) else soft_prompts
        packed = torch.cat([*(each.to(text) for each in given if len(each) and each.ndim == 2), text])
        segments = plan.segments
        segments.prefixes = [each.movedim(0, 3) for each in given if each.ndim > 2]
        if segments.prefixes and not self.shared_prefix:
            raise NotImplementedError("a key-value prefix without the shared-prefix attention")
        segments.trained = None if text.requires_grad else len(packed) - len(text)
        segments.read, segments.levels = placed.read, placed.levels
        return packed

    def _logits(self, packed: Tensor, plan: PackedBatch, placed: PlacedBatch) -> Tensor:
        if self.shared_prefix:
            return self._shared(packed, plan, placed)
        if self.continues_texts and has_trees(plan) and not torch.is_grad_enabled():
            return label_logits(self, packed, plan, plan.kept)
        return self._concatenated(packed, plan, plan.kept)

    def inputs(self, embeddings: Tensor, ids: Tensor) -> dict[str, Tensor]:
        """What a pass of the base begins with: embeddings `[B, T, H]` of ids `[B, T]`, in which virtual tokens are 0."""
        return self.embedding.inputs(embeddings, ids)

    def _shared(self, packed: Tensor, plan: PackedBatch, placed: PlacedBatch) -> Tensor:
        """Logits at the packed positions `kept`, `[kept, V or U]`; every segment is computed once."""
        with self.head.at(None if self.selects else placed.kept):
            out = self.base(
                **self.inputs(packed[None], plan.ids[None] if self.needs_ids else placed.tokens),
                position_ids=placed.positions[None],
                attention_mask=tree_mask(plan.segments, packed.device),
                use_cache=False,
                segments=plan.segments,
                **({"logits_to_keep": placed.kept} if self.selects else {}),
            )
        return _selected(out.logits, placed.kept)

    @property
    def packed_layers(self) -> PackedLayers:
        """What computes a token once in a concatenated pass; its hooks are only on bases that need it."""
        return self._packed_layers or self._pack_layers()

    def _pack_layers(self) -> PackedLayers:
        layers = getattr(self.base.config.get_text_config(), "num_hidden_layers", 0)
        self._packed_layers = PackedLayers(self.base, layers)
        return self._packed_layers

    def _concatenated(self, packed: Tensor, plan: PackedBatch, kept: Tensor) -> Tensor:
        """The same by concatenation: every sequence is written out in full and padded on the right."""
        device = packed.device
        index, lengths = plan.segments.sequences()
        valid = torch.arange(index.shape[1])[None] < lengths[:, None]
        layout = Layout(index, valid, plan.positions)
        flat = layout.first[kept]  # any sequence that contains the token will do
        places, keeping = flat, {}
        if self.selects:
            rows, columns = flat // index.shape[1], flat % index.shape[1]
            wanted, column = torch.unique(columns, return_inverse=True)
            places, keeping = rows * len(wanted) + column, {"logits_to_keep": wanted.to(device)}
        with self.packed_layers.layout(layout, packed), self.head.at(places):
            out = self.base(
                **self.inputs(layout.written_out(packed[None]), plan.ids[index]),
                attention_mask=valid.long().to(device),
                use_cache=False,
                **keeping,
            )
        return _selected(out.logits, places.to(device))


def _selected(logits: Tensor, places: Tensor) -> Tensor:
    """Logits `[M, V or U]` at flat places `[M]` of `[B, T, V or U]`, unless they are that already (`OutputHead.at`)."""
    return logits[0] if logits.shape[:2] == (1, len(places)) else logits.flatten(0, 1).index_select(0, places)


def _other_tokens(logits: Tensor, placed: PlacedBatch, candidates: Candidates) -> Tensor:
    """What has to be added to the negative log-likelihoods of the targets, `[M]` fp32, so that they are cross-entropies to the
    candidates: sum of share * (logit of the target - logit of the candidate). The sum over the vocabulary is the same."""
    rows = candidates.of if placed.rows is None else placed.rows[candidates.of]
    apart = logits[rows, placed.targets[candidates.of]].float() - logits[rows, candidates.ids].float()
    return torch.zeros(len(placed.targets), device=logits.device).index_add(0, candidates.of, candidates.shares * apart)


def choice_nll(logits: Tensor, choices: PlacedBatch) -> Tensor:
    """Logits `[Q, U or V]` fp32 of every comparison -> negative log-likelihood of every choice, `[M']`."""
    columns = choices.columns
    if logits.shape[1] != len(choices.ids):  # of the whole vocabulary
        columns = choices.ids[columns]
    among = logits.gather(1, columns).masked_fill(choices.hidden, -math.inf)  # [Q, C]
    return -torch.log_softmax(among, -1).flatten().index_select(0, choices.chosen)


def _shorten_chunks(base: PreTrainedModel) -> None:
    """On a CPU, let state spaces scan in short chunks. A scan gives the same for any length, but pads rows to whole chunks, and
    computes a square of scores for each: configs have 256, which suits the kernels of GPUs."""
    if base.device.type == "cpu":
        for module in base.modules():
            length: Any = getattr(module, "chunk_size", None)
            if hasattr(module, "A_log") and isinstance(length, int):
                setattr(module, "chunk_size", min(length, CHUNK))  # noqa: B010 (mypy: a module's attributes are modules)


def _keep_gradients(base: PreTrainedModel) -> None:
    """xLSTM (transformers 5.23) computes rows above this length in parts and, outside of training, without gradients."""
    config = base.config.get_text_config()
    if hasattr(config, "max_inference_chunksize"):
        config.max_inference_chunksize = 2**31


def _remove_dropout(base: PreTrainedModel) -> None:
    """Remove dropout: a frozen base must be the same function in training, evaluation and serving."""
    # Falcon reads its dropout rate from the config in every pass, most other models from their modules.
    for owner in (base.config.get_text_config(), *base.modules()):
        for name, value in vars(owner).items():
            if "drop" in name and isinstance(value, float):
                setattr(owner, name, 0.0)
        if isinstance(owner, nn.Dropout):
            owner.p = 0.0
