"""Checks on the loaded base that the passes of this project are the base's own function, and chooses the pass that is.

The shared prefix replaces a base's attention; concatenation replaces its ids by embeddings and pads rows. For which of
transformers' architectures that is right is written nowhere, and a wrong loss looks like any other. So before anything is
trained or served, three short rows after two random soft prompts are computed by each pass and by a plain forward of
transformers.
The check runs on the real base in its dtype, also partitioned: then every rank has to call it.

Shapes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from transformers import LogitsProcessorList, PreTrainedModel

from ptuning.errors import BaseError
from ptuning.model.input_embedding import InputEmbedding
from ptuning.model.label_trie import LabelTrie
from ptuning.model.packed_batch import PackedBatch
from ptuning.model.packing import Objective, Row, pack_labels, pack_targets
from ptuning.model.prompted_model import PromptedModel
from ptuning.redaction import logger

log = logger(__name__)

LENGTHS, TEXTS, TARGET = (3, 2), ((5, 7), (6,)), 3
"""Virtual tokens of two slots, text tokens of their rows, and tokens of a target."""
COMMON = 3
"""Tokens with which all texts begin: a pass may not confuse tokens that rows share."""
GENERATED = (5, 6)
"""Text tokens of rows after which tokens are generated."""
TOLERANCE = {torch.float32: 2e-3, torch.float64: 1e-6}
"""Difference of two equal functions, as a share of the spread of the logits; others differ by their whole spread."""
ROUGH = 0.2
"""The same in 16 bits."""
TIMES = 3
"""How much more gradients may differ, as a share of their norm."""
STEPS = 4
"""Generated tokens that are compared."""
FAILURES = (NotImplementedError, TypeError, ValueError, AttributeError, KeyError, IndexError, RuntimeError, AssertionError)
"""What an architecture raises that does not know the pass."""


def choose_pass(model: PromptedModel, name: str, gradients: bool = True) -> None:
    """Let the model compute by the fastest pass that is right for its base, called `name` in errors.

    `gradients`: compare the gradients of the soft prompts, too.

    Raises:
        BaseError: the base is not causal, or no pass is right.
    """
    kind = type(model.base).__name__
    rows = _rows(model)
    try:
        _look_up_ids(model, rows, name)
        reference = _Reference(model, rows, gradients)
    except BaseError:
        raise
    except FAILURES as error:
        raise_others(error)
        said = next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
        raise BaseError(
            f"model.path: {name} ({kind}) cannot compute a short text{' and its gradients' * gradients} "
            f"in this version of transformers ({said}); choose another base"
        ) from error
    # The shared prefix with and without limited gradients of the first layer; rows with and without packed layers.
    shared_ways = [(True, True, True), (True, False, True)] if model.shared_prefix else []
    for shared, limited, packed in [*shared_ways, (False, False, True), (False, False, False)]:
        model.shared_prefix, model.first_layer.active = shared, limited
        if not shared:
            model.packed_layers.active = packed
            # Layers that look up ids would get packed states beside the ids of written-out rows.
            if packed and (model.needs_ids or not model.packed_layers.found):
                continue
        if reference.is_met():
            if not shared:
                log.warning("%s: no shared-prefix attention, soft prompts are concatenated row by row", kind)
                model.continues_texts = _continues_texts(model, rows)
            return
    raise BaseError(
        f"model.path: a soft prompt in front of {name} ({kind}) is not computed as its own tokens are, "
        "in this version of transformers; choose another base"
    )


@torch.no_grad()
def _continues_texts(model: PromptedModel, rows: Sequence[Row]) -> bool:
    """Whether labels that continue the base's own cache of texts, which have different lengths, get the scores that they get
    in sequences of their own."""
    source, other = rows[0][0], rows[-1][0]
    trie = LabelTrie(((1, 2, 3), (1, 3, 3), (2, 3, 1), (2, 3, 2), (3, 1)))
    vectors = random_prompts(model, LENGTHS, torch.Generator().manual_seed(4))
    plan = pack_labels(LENGTHS, [[source[:2], source], [other]], trie)
    try:
        model.continues_texts = False
        expected = model(vectors, plan).float().cpu()
        model.continues_texts = True
        found = model(vectors, plan).float().cpu()
    except FAILURES as error:
        raise_others(error)
        log.debug("labels do not continue a cache: %s", error)
        return False
    finally:
        model.continues_texts = False
    apart = (found - expected).abs().max() / max(float(expected.std()), 1.0)
    log.debug("labels after a cache differ by %.1e", apart)
    return bool(apart <= TOLERANCE.get(model.base.dtype, ROUGH / 2))


@torch.no_grad()
def how_it_generates(model: PromptedModel) -> Literal["padded", "alone", "recomputed"]:
    """How transformers' `generate` computes what the base computes without a cache.

    padded: rows of different lengths together, padded on the left; alone: each row by itself (architectures without masks, or
    with positions of their own: RWKV, RoFormer); recomputed: not at all (RoBERTa, transformers 5.23). Checked once per model;
    with a partitioned base, every rank has to call it.
    """
    if model.generates is None:
        draw = torch.Generator().manual_seed(3)
        many = int(model.base.config.get_text_config().vocab_size)
        rows = [torch.randint(many // 8, many, (1, length), generator=draw) for length in GENERATED]
        longest, tolerance = max(GENERATED), TOLERANCE.get(model.base.dtype, ROUGH)
        with model.plain() as base:
            logits: list[Tensor] = []
            for row in rows:
                whole = pad(row, (0, STEPS - 1))  # the tokens that are chosen are 0
                embeddings = _stretched(model, whole, torch.ones_like(whole))
                logits.append(base(**model.inputs(embeddings, whole), use_cache=False).logits[:, -STEPS:].float())
            expected = torch.cat(logits)
        padded = torch.cat([pad(row, (longest - row.shape[1], 0)) for row in rows])
        mask = torch.cat([pad(torch.ones_like(row), (longest - row.shape[1], 0)) for row in rows])
        ways: dict[Literal["padded", "alone"], list[tuple[Tensor, Tensor]]] = {
            "padded": [(padded, mask)],
            "alone": [(row, torch.ones_like(row)) for row in rows],
        }
        model.generates = "recomputed"
        for way, batches in ways.items():
            try:
                found = torch.cat([_generated(model, ids, seen) for ids, seen in batches])
            except FAILURES as error:  # XLM's own preparation of inputs loses a position (5.23)
                raise_others(error)
                log.debug("generating %s failed: %s", way, error)
                continue
            if _apart(found, expected) <= tolerance:
                model.generates = way
                break
    return model.generates


def _stretched(model: PromptedModel, ids: Tensor, mask: Tensor) -> Tensor:
    """Embeddings `[B, T, H]` of ids, the first of every row that is not padding made half as large again: no token has it."""
    device = model.base.device
    embeddings: Tensor = model.base.get_input_embeddings()(ids.to(device))
    first = (mask.cumsum(1) == 1) & (mask == 1)
    return embeddings * (1 + 0.5 * first.to(embeddings))[..., None]


def _generated(model: PromptedModel, ids: Tensor, mask: Tensor) -> Tensor:
    """Logits `[B, STEPS, V]` of the tokens that follow if each is token 0."""
    device = model.base.device

    def always_zero(_: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        scores[:, 0] = float("inf")
        return scores

    embeddings = _stretched(model, ids, mask)
    with model.plain() as base:
        model.embedding.replace(embeddings)
        generating: Any = base  # its type has no generation
        made = generating.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=STEPS,
            do_sample=False,
            pad_token_id=0,
            logits_processor=LogitsProcessorList([always_zero]),
            output_logits=True,
            return_dict_in_generate=True,
        )
    return torch.stack(made.logits, 1).float()


def _rows(model: PromptedModel) -> list[Row]:
    """Random tokens; all texts begin alike."""
    draw = torch.Generator().manual_seed(0)
    many = int(model.base.config.get_text_config().vocab_size)
    texts = [text for slot in TEXTS for text in slot]
    ids = torch.randint(many // 8, many, (len(texts), max(texts) + TARGET), generator=draw)
    ids[:, :COMMON] = ids[0, :COMMON]
    return [(row[:text].tolist(), row[text : text + TARGET].tolist()) for row, text in zip(ids, texts, strict=True)]


def _by_slot(rows: Sequence[Row]) -> list[list[Row]]:
    each = iter(rows)
    return [[next(each) for _ in slot] for slot in TEXTS]


@torch.no_grad()
def random_prompts(model: PromptedModel, lengths: Sequence[int], draw: torch.Generator) -> list[Tensor]:
    """Random soft prompts, as large as the base's own embeddings."""
    sample = model.base.get_input_embeddings()(torch.arange(16, device=model.base.device)).float()
    return [torch.randn(length, sample.shape[1], generator=draw).to(sample) * sample.std() for length in lengths]


@torch.no_grad()
def _look_up_ids(model: PromptedModel, rows: Sequence[Row], name: str) -> None:
    """See whether embeddings say all that ids say, and whether a token depends on later ones.

    Raises:
        BaseError: the base is not causal.
    """
    shorter = min(len(source) + len(target) for source, target in rows)
    ids = torch.tensor([(source + target)[:shorter] for source, target in rows], device=model.base.device)
    with model.plain() as base:
        expected = base(input_ids=ids, use_cache=False).logits
        same = int((ids[0] == ids[1]).long().cumprod(0).sum())
        if _apart(expected[0, :same], expected[1, :same]) > TOLERANCE.get(base.dtype, ROUGH):
            raise BaseError(
                f"model.path: {name} ({type(base).__name__}) is not causal: a token depends on those after it; "
                "choose a decoder, or set is_decoder = true in its config.json if it is one"
            )
        model.embedding.needs_ids = _needs_ids(base, ids, expected)


def _needs_ids(base: PreTrainedModel, ids: Tensor, expected: Tensor) -> bool:
    """Whether embeddings of ids `[B, T]` give other logits than the ids (`expected` `[B, T, V]`)."""
    try:
        embeddings = base.get_input_embeddings()(ids)
        embeddings[:, -1] *= 1.5  # some architectures find out the ids of embeddings that have one (Gemma 4, 5.23)
        found = base(inputs_embeds=embeddings, use_cache=False).logits
    except FAILURES as error:
        raise_others(error)
        return True
    return _apart(found[:, :-1], expected[:, :-1]) > TOLERANCE.get(base.dtype, ROUGH)


@torch.no_grad()
def find_input(base: PreTrainedModel) -> InputEmbedding:
    """How a plain model is given soft prompts, without a `PromptedModel`."""
    embedding = InputEmbedding(base)
    many = int(base.config.get_text_config().vocab_size)
    ids = torch.randint(many // 8, many, (1, GENERATED[0]), generator=torch.Generator().manual_seed(5)).to(base.device)
    embedding.needs_ids = _needs_ids(base, ids, base(input_ids=ids, use_cache=False).logits)
    return embedding


class _Reference:
    """Plain forwards of transformers, to which passes are compared."""

    def __init__(self, model: PromptedModel, rows: Sequence[Row], gradients: bool) -> None:
        self._model = model
        drawn = random_prompts(model, LENGTHS, torch.Generator().manual_seed(1))
        self._vectors = [vectors.requires_grad_(gradients) for vectors in drawn]
        self._gradients = gradients
        # Labels that part at their first token, and at their last.
        labels = [(*target[:-1], 0) for _, target in rows] + [tuple(target) for _, target in rows]
        self._trie = LabelTrie(tuple(dict.fromkeys(labels)))
        objective = Objective(self._trie)
        self._plan: PackedBatch = pack_targets(LENGTHS, _by_slot(rows), [objective] * len(LENGTHS))
        self._nll, self._spread = self._compute(rows)
        self._gradient = self._derive(self._nll)
        self._nll = self._nll.detach()

    def _derive(self, nll: Tensor) -> Tensor:
        """The gradient of the soft prompts, flat."""
        if not self._gradients:
            return torch.zeros(1)
        return torch.cat([each.flatten() for each in torch.autograd.grad(nll.sum(), self._vectors)]).float().cpu()

    def _compute(self, rows: Sequence[Row]) -> tuple[Tensor, float]:
        """The predictions of `PackedBatch` by one plain forward. Rows are filled up on the right: what is not masked is not
        seen by the tokens before it either."""
        model = self._model
        slots = [slot for slot, texts in enumerate(TEXTS) for _ in texts]
        tokens = [[0] * LENGTHS[slot] + source + target for slot, (source, target) in zip(slots, rows, strict=True)]
        longest = max(map(len, tokens))
        ids = torch.tensor([row + row[-1:] * (longest - len(row)) for row in tokens], device=model.base.device)
        with model.plain() as base, torch.set_grad_enabled(self._gradients):
            text = base.get_input_embeddings()(ids)
            vectors = [self._vectors[slot] for slot in slots]
            embeddings = torch.stack(
                [torch.cat([each.to(row), row[len(each) :]]) for each, row in zip(vectors, text, strict=True)]
            )
            logits = base(**model.inputs(embeddings, ids), use_cache=False).logits.float().cpu()
        texts: list[list[Tensor]] = [[] for _ in LENGTHS]
        chosen: list[list[Tensor]] = [[] for _ in LENGTHS]
        for slot, whole, row, (_, target) in zip(slots, tokens, logits, rows, strict=True):
            at = row[len(whole) - TARGET - 1 : len(whole) - 1]
            texts[slot].append(cross_entropy(at, torch.tensor(target), reduction="none"))
            for node, child in self._trie.paths[tuple(target)]:
                children = list(self._trie.nodes[node].children)
                chosen[slot].append(-torch.log_softmax(at[self._trie.nodes[node].depth][children], -1)[child])
        parts = [*itertools.chain(*texts), torch.stack([*itertools.chain(*chosen)])]
        return torch.cat(parts), float(logits.detach().std(-1).mean())

    def is_met(self) -> bool:
        """Whether the model's pass computes the same predictions and gradients."""
        try:
            with torch.set_grad_enabled(self._gradients):
                nll = self._model(self._vectors, self._plan).float().cpu()
                gradient = self._derive(nll)
        except FAILURES as error:
            raise_others(error)
            log.debug("the pass failed: %s", error)
            return False
        tolerance = TOLERANCE.get(self._model.base.dtype, ROUGH)
        apart = float((nll.detach() - self._nll).abs().max()) / max(self._spread, 1e-6)
        steeper = float((gradient - self._gradient).norm()) / max(float(self._gradient.norm()), 1e-6)
        log.debug("predictions differ by %.1e, gradients by %.1e", apart, steeper)
        return apart <= tolerance and steeper <= TIMES * tolerance  # not so if either is not a number


def raise_others(error: Exception) -> None:
    """Raise what is not the architecture's: no memory, or a lost worker (gloo raises a plain RuntimeError)."""
    if isinstance(error, (torch.OutOfMemoryError, torch.distributed.DistError)) or "gloo/transport" in str(error):
        raise error


def _apart(one: Tensor, two: Tensor) -> float:
    difference = (one.float() - two.float()).abs().max() / max(float(two.float().std(-1).mean()), 1e-6)
    return float(difference) if bool(difference.isfinite()) else float("inf")
