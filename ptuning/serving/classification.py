"""/v1/classify: the probability of every label."""

from __future__ import annotations

import asyncio
import time

from ptuning.inference.engine import Engine
from ptuning.inference.inputs import fields_of, row_ids
from ptuning.inference.jobs import Timed
from ptuning.inference.label_scorer import LABEL_TOKENS, probabilities
from ptuning.inference.types import RequestError
from ptuning.model.label_trie import LabelTrie
from ptuning.serving.answers import Classification, Label, PromptDetails, Usage
from ptuning.serving.loading import Served
from ptuning.serving.protocol import ClassifyRequest, Conversation
from ptuning.serving.replies import envelope
from ptuning.serving.request_record import Record
from ptuning.settings.running import ServeConfig


async def classify(
    body: ClassifyRequest, served: Served, base: str, engine: Engine, limits: ServeConfig, record: Record
) -> Classification:
    """The answer to a request; what it took is in the record.

    Raises:
        UserError: it cannot be answered.
    """
    encoder = served.encoder
    if encoder is None or not served.labels:
        raise RequestError(f"model: {served.id} has no labels; use /v1/chat/completions")
    given = body.input if isinstance(body.input, list) else [body.input]
    texts = [each.fields() if isinstance(each, Conversation) else each for each in given]
    if len(texts) > limits.waiting:
        raise RequestError(f"input: {len(texts)} texts, at most {limits.waiting} are allowed; send fewer")

    def encode() -> list[list[int]]:
        return [row_ids(encoder, fields_of(encoder, text), encoder.input_room, body.truncate) for text in texts]

    rows = await asyncio.to_thread(encode)
    scores = await _scores(served, rows, encoder.label_trie, engine, limits.deadline_s, record)
    data = []
    for index, each in enumerate(scores):
        shares = probabilities(each, served.labels)
        label = max(shares, key=lambda name: shares[name])
        data.append(Label(index=index, label=label, probability=shares[label], probabilities=shares))
    record.prompts = [len(row) for row in rows]
    tokens = sum(record.prompts)
    details = PromptDetails(virtual_tokens=served.length * len(rows))
    spent = Usage(prompt_tokens=tokens, total_tokens=tokens, prompt_tokens_details=details)
    return Classification(**envelope(served, base, "classify"), data=data, usage=spent)


async def _scores(
    served: Served, rows: list[list[int]], trie: LabelTrie, engine: Engine, deadline_s: float, record: Record
) -> list[list[float]]:
    """Log-probabilities of the labels after rows, one pass at a time, so that generation continues in between."""
    portions: list[list[list[int]]] = []
    tokens = LABEL_TOKENS
    for row in rows:
        tokens += len(row) + len(trie.tokens)
        if tokens > LABEL_TOKENS:
            portions.append([])
            tokens = len(row) + len(trie.tokens)
        portions[-1].append(row)
    futures: list[Timed[list[list[float]]]] = []
    begun = time.monotonic()
    try:
        async with asyncio.timeout(deadline_s):
            futures += [engine.choose(served.handle, portion, trie) for portion in portions]
            found = [await asyncio.wrap_future(future) for future in futures]
        record.queued_s = max(0.0, futures[0].began - begun)
    finally:
        for future in futures:
            future.cancel()
    return [row for portion in found for row in portion]
