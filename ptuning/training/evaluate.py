"""Evaluation of soft prompts: label likelihoods, generated text, loss on targets. Rows are split over the workers.

All workers run the same number of passes, because a partitioned base needs all of them in every layer, and get the same
results.

Shapes: K soft prompts, n rows of the split, L labels, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ptuning.data.dataset import Split
from ptuning.data.encoder import Encoder
from ptuning.model.kv_prefix import cache_of
from ptuning.model.limits import LOGITS, TOKENS, scored_tokens
from ptuning.model.packing import kv_slots, pack_labels, pack_targets
from ptuning.model.prompted_model import PromptedModel
from ptuning.model.self_check import how_it_generates
from ptuning.training import metrics
from ptuning.training.distributed import Workers
from ptuning.training.metrics import Classification


@dataclass(frozen=True)
class Evaluation:
    """Metrics of one soft prompt on one split; predictions row by row, as `text`, `target`, `prediction`, and with labels
    `probability`."""

    metrics: dict[str, float]
    predictions: list[dict[str, Any]] = field(default_factory=list)
    classification: Classification | None = None
    """Detailed results of a classification task."""


@torch.no_grad()
def evaluate(
    model: PromptedModel,
    soft_prompts: Sequence[Tensor],
    split: Split,
    encoder: Encoder,
    workers: Workers,
    max_new_tokens: int | None = None,
) -> list[Evaluation]:
    """Evaluate K soft prompts side by side.

    A classification task gives loss (NLL of the label), accuracy, macro-F1 and expected calibration error. A generation task
    gives loss and perplexity, and with `max_new_tokens` also greedy text and its metrics.
    """
    if encoder.template.labels:
        return _classify(model, soft_prompts, split, encoder, workers)
    return _generate(model, soft_prompts, split, encoder, workers, max_new_tokens)


def label_scores(
    model: PromptedModel, soft_prompts: Sequence[Tensor], split: Split, encoder: Encoder, workers: Workers
) -> Tensor:
    """Log-probability of every label after every row's input: `[K, n, L]` float64."""
    trie = encoder.label_trie
    scores = torch.zeros(len(soft_prompts), len(split.lengths), len(trie.labels), dtype=torch.float64)
    sizes = [len(soft_prompt) for soft_prompt in soft_prompts]
    numbers = len(trie.nodes) * len(trie.ids)
    for rows, real in _passes(split, workers, len(sizes), len(trie.tokens), numbers, _scored_tokens(model)):
        inputs = [split.row(row)[0] for row in rows]
        nll = model(soft_prompts, pack_labels(sizes, [inputs] * len(sizes), trie, kv_slots(soft_prompts))).double().cpu()
        if real:
            scores[:, rows] = trie.label_logprobs(-nll.view(len(sizes), len(rows), -1))
    return workers.all_reduce(scores)


def _classify(
    model: PromptedModel, soft_prompts: Sequence[Tensor], split: Split, encoder: Encoder, workers: Workers
) -> list[Evaluation]:
    scores = label_scores(model, soft_prompts, split, encoder, workers).numpy()
    columns = split.rows.select_columns(["text", "label"])[:]  # iterating a column decodes row by row
    truth = np.asarray(columns["label"])
    names = encoder.template.labels or ()
    evaluations = []
    for slot in scores:
        if not np.isfinite(slot).all():  # this soft prompt has diverged; the others are not affected
            evaluations.append(Evaluation({"loss": math.nan, "accuracy": 0.0, "macro_f1": 0.0, "ece": math.nan}))
            continue
        measured = metrics.classification(slot, truth)
        predicted = slot.argmax(1)
        predictions = [
            {"text": text, "target": names[label], "prediction": names[guess], "probability": math.exp(logprob)}
            for text, label, guess, logprob in zip(columns["text"], truth, predicted, slot.max(1), strict=True)
        ]
        numbers = {
            "loss": measured["loss"],
            "accuracy": measured["accuracy"],
            "macro_f1": measured["macro_f1"],
            "ece": measured["ece"],
        }
        evaluations.append(Evaluation(numbers, predictions, measured))
    return evaluations


def _generate(
    model: PromptedModel,
    soft_prompts: Sequence[Tensor],
    split: Split,
    encoder: Encoder,
    workers: Workers,
    max_new_tokens: int | None,
) -> list[Evaluation]:
    losses = _target_losses(model, soft_prompts, split, workers)
    if max_new_tokens is None:
        return [Evaluation({"loss": loss, "perplexity": _perplexity(loss)}) for loss in losses]
    evaluations = []
    answers = generate_rows(model, soft_prompts, split, encoder, workers, max_new_tokens)
    for texts, loss in zip(answers, losses, strict=True):
        measured = metrics.generation(texts, split.rows["references"][:])
        predictions = [
            {"text": text, "target": target.strip(), "prediction": guess}
            for text, target, guess in zip(split.rows["text"][:], split.rows["target_text"][:], texts, strict=True)
        ]
        evaluations.append(Evaluation({"loss": loss, "perplexity": _perplexity(loss), **measured}, predictions))
    return evaluations


def _target_losses(model: PromptedModel, soft_prompts: Sequence[Tensor], split: Split, workers: Workers) -> list[float]:
    """Mean negative log-likelihood per target token of each soft prompt."""
    sums = torch.zeros(len(soft_prompts) + 1, dtype=torch.float64)
    sizes = [len(soft_prompt) for soft_prompt in soft_prompts]
    longest = int(split.lengths.max())
    for rows, real in _passes(split, workers, len(sizes), 0, longest * _vocabulary(model), _scored_tokens(model)):
        batch = [split.row(row) for row in rows]
        plan = pack_targets(sizes, [batch] * len(sizes), kv=kv_slots(soft_prompts))
        nll = model(soft_prompts, plan).double().cpu()
        if real:
            sums[:-1] += torch.stack([part.sum() for part in nll.split(plan.per_slot)])
            sums[-1] += plan.per_slot[0]
    totals = workers.all_reduce(sums).tolist()
    return [total / totals[-1] for total in totals[:-1]]


def generate_rows(
    model: PromptedModel,
    soft_prompts: Sequence[Tensor],
    split: Split,
    encoder: Encoder,
    workers: Workers,
    max_new_tokens: int,
) -> list[list[str]]:
    """Greedy text of each soft prompt for every row, up to the end token or `max_new_tokens`, in the order of the split.

    The rows of several soft prompts are one batch: a token takes about as long for all of them as for one, and a partitioned
    base is gathered once for it.
    """
    together = max(1, TOKENS // (int(split.lengths.max()) + max_new_tokens))
    own: list[tuple[int, int, str]] = []
    for first in range(0, len(soft_prompts), together):
        some = list(enumerate(soft_prompts))[first : first + together]
        for rows, real in _passes(split, workers, len(some), max_new_tokens, _vocabulary(model), TOKENS):
            wanted = [(slot, row) for slot, _ in some for row in rows]
            texts = greedy(
                model,
                [soft_prompts[slot] for slot, _ in wanted],
                [split.row(row)[0] for _, row in wanted],
                encoder,
                max_new_tokens,
                together=workers.size > 1,
            )
            if real:
                own += [(*where, text) for where, text in zip(wanted, texts, strict=True)]
    everything = sorted(each for part in workers.all_gather(own) for each in part)
    return [[text for at, _, text in everything if at == slot] for slot in range(len(soft_prompts))]


@torch.no_grad()
def greedy(
    model: PromptedModel,
    soft_prompts: Tensor | Sequence[Tensor],
    inputs: Sequence[list[int]],
    encoder: Encoder,
    max_new_tokens: int,
    *,
    together: bool = False,
) -> list[str]:
    """Greedy continuations of `inputs`, each after its soft prompt (or all after one), by transformers' `generate`; stripped
    text.

    `together`: workers that share a base continue until the last of them has finished, because each layer needs all of them.
    """
    given = [soft_prompts] * len(inputs) if isinstance(soft_prompts, Tensor) else list(soft_prompts)
    how = how_it_generates(model)
    if how == "padded":
        return _by_kind(model, given, inputs, encoder, max_new_tokens, together)
    calls = max(Workers.current().all_gather(len(inputs))) if together else len(inputs)
    padding = [0] * (calls - len(inputs))
    rows = [(given[at], inputs[at]) for at in [*range(len(inputs)), *padding]]
    texts = []
    for soft_prompt, row in rows:
        if how == "recomputed" and soft_prompt.ndim == 2:
            texts.append(_recomputed(model, soft_prompt, row, encoder, max_new_tokens, together))
        else:
            texts += _greedy(model, [soft_prompt], [row], encoder, max_new_tokens, together)
    return texts[: len(inputs)]


def _by_kind(
    model: PromptedModel,
    soft_prompts: Sequence[Tensor],
    inputs: Sequence[list[int]],
    encoder: Encoder,
    max_new_tokens: int,
    together: bool,
) -> list[str]:
    """`_greedy` for soft prompts of several kinds: a batch has embeddings, or prefixes of one length."""
    groups: dict[int, list[int]] = {}
    for at, each in enumerate(soft_prompts):
        groups.setdefault(len(each) if each.ndim > 2 else 0, []).append(at)
    texts = [""] * len(inputs)
    for rows in groups.values():
        found = _greedy(
            model, [soft_prompts[at] for at in rows], [inputs[at] for at in rows], encoder, max_new_tokens, together
        )
        for at, text in zip(rows, found, strict=True):
            texts[at] = text
    return texts


def _recomputed(
    model: PromptedModel, soft_prompt: Tensor, ids: list[int], encoder: Encoder, max_new_tokens: int, together: bool
) -> str:
    """Greedy text without any cache. `together`: all workers make the same number of passes."""
    ends = {encoder.end, encoder.tokenizer.eos_token_id, *model.ends}
    made: list[int] = []
    with model.plain() as base:
        for _ in range(max_new_tokens):
            row = torch.tensor([[0] * len(soft_prompt) + ids + made], device=base.device)
            embeddings = base.get_input_embeddings()(row)
            embeddings[0, : len(soft_prompt)] = soft_prompt.to(embeddings)
            made.append(int(base(**model.inputs(embeddings, row), use_cache=False).logits[0, -1].argmax()))
            if made[-1] in ends and not together:
                break
    first = next((at for at, token in enumerate(made) if token in ends), len(made))
    return str(encoder.tokenizer.decode(made[:first], skip_special_tokens=True)).strip()


def _greedy(
    model: PromptedModel,
    soft_prompts: Sequence[Tensor],
    inputs: Sequence[list[int]],
    encoder: Encoder,
    max_new_tokens: int,
    together: bool,
) -> list[str]:
    device = model.base.device
    if soft_prompts[0].ndim > 2:
        return _continued(model, soft_prompts, inputs, encoder, max_new_tokens, together)
    embed = model.base.get_input_embeddings()
    # One call for all rows: a partitioned base gathers at every call, and workers may have different numbers of rows.
    text = embed(torch.tensor([token for ids in inputs for token in ids], device=device))
    texts = text.split([len(ids) for ids in inputs])
    rows = [torch.cat([soft_prompt.to(text), row]) for soft_prompt, row in zip(soft_prompts, texts, strict=True)]
    longest = max(len(row) for row in rows)
    # Padding is on the left, because `generate` continues at the right end.
    embeds = torch.stack([torch.cat([row.new_zeros(longest - len(row), row.shape[1]), row]) for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    ids_of_text = torch.tensor([[0] * (longest - len(ids)) + ids for ids in inputs], device=device)
    with model.plain():
        # Ids, because not every architecture continues embeddings (Falcon-H1, 5.23).
        model.embedding.replace(embeds)
        return _generated(model, ids_of_text, mask, encoder, max_new_tokens, together)


def _continued(
    model: PromptedModel,
    prefixes: Sequence[Tensor],
    inputs: Sequence[list[int]],
    encoder: Encoder,
    max_new_tokens: int,
    together: bool,
) -> list[str]:
    """`_greedy` after key-value prefixes of one length: they are the cache that `generate` continues."""
    device, length = model.base.device, len(prefixes[0])
    longest = max(map(len, inputs))
    # `generate` leaves out as many leading ids as the cache has tokens.
    ids = torch.tensor([[0] * (length + longest - len(row)) + row for row in inputs], device=device)
    mask = torch.tensor([[1] * length + [0] * (longest - len(row)) + [1] * len(row) for row in inputs], device=device)
    cache = cache_of([each.to(device) for each in prefixes], model.base.dtype)
    with model.plain():
        return _generated(model, ids, mask, encoder, max_new_tokens, together, past_key_values=cache)


def _generated(
    model: PromptedModel,
    ids: Tensor,
    mask: Tensor,
    encoder: Encoder,
    max_new_tokens: int,
    together: bool,
    **more: Any,
) -> list[str]:
    ends = {encoder.end, encoder.tokenizer.eos_token_id, *model.ends}
    generating: Any = model.base  # its type has no generation
    made = generating.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=sorted(ends),
        pad_token_id=encoder.end,
        # transformers detects this itself only while an HfDeepSpeedConfig exists (generation/utils.py).
        synced_gpus=together,
        **more,
    )
    return [text.strip() for text in encoder.tokenizer.batch_decode(made[:, ids.shape[1] :], skip_special_tokens=True)]


def _passes(split: Split, workers: Workers, slots: int, extra: int, logits: int, most: int) -> Iterator[tuple[list[int], bool]]:
    """This worker's rows in each pass, longest rows first; False for a pass without rows of its own, which the other workers
    need.

    `extra`: additional tokens per row; `logits`: logits computed per row; `most`: tokens of a pass.
    """
    order = np.argsort(-split.lengths, kind="stable")
    start = 0
    while start < len(order):
        tokens = slots * (int(split.lengths[order[start]]) + extra)
        fitting = max(1, min(most // tokens, LOGITS // (slots * logits)))
        chunk = order[start : start + fitting * workers.size]
        start += len(chunk)
        mine = chunk[workers.rank :: workers.size].tolist()
        yield (mine, True) if mine else ([int(chunk[0])], False)


def _scored_tokens(model: PromptedModel) -> int:
    return scored_tokens(model.base.device.type != "cpu")


def _vocabulary(model: PromptedModel) -> int:
    return int(model.base.config.get_text_config().vocab_size)


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))
