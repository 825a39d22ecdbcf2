"""The trace of a request: waiting, prefill, decoding; which version answered, and how many tokens. No text.

Attributes are those of OpenTelemetry's conventions for generative AI where they have one.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

from ptuning.serving.completion import Generation
from ptuning.serving.loading import Served
from ptuning.tracing import Span, wall

OPERATIONS = {"chat": "chat", "completions": "text_completion", "responses": "chat", "classify": "classify"}

LISTED = 16
"""Answers with parts of their own; a request may have hundreds."""


class Measured(Protocol):
    """What is known of a request (`request_record.Record`)."""

    began: float
    route: str
    served: Served | None
    answers: Sequence[Generation]
    n: int
    prompts: Sequence[int]
    queued_s: float | None


def trace(record: Measured, status: int, request: str) -> Span:
    """The span of a request that has just ended. `request`: its id."""
    answers = record.answers
    served = record.served
    values = {
        "gen_ai.operation.name": OPERATIONS.get(record.route, record.route),
        "gen_ai.response.model": served.id if served else None,
        "gen_ai.usage.input_tokens": sum(each.prompt_tokens for each in answers[:: record.n]) + sum(record.prompts),
        "gen_ai.usage.output_tokens": sum(each.completion_tokens for each in answers),
        "http.response.status_code": status,
        "ptuning.content_hash": served.content_hash if served else None,
        "ptuning.virtual_tokens": served.length if served else None,
        "ptuning.cached_tokens": sum(each.cached_tokens for each in answers),
        "ptuning.request_id": request,
    }
    began = wall(record.began)
    parts = [part for answer in answers[:LISTED] for part in _parts(answer)]
    if record.queued_s is not None:  # texts that are classified
        parts.append(Span("queue", began, began + record.queued_s))
        parts.append(Span("choose", began + record.queued_s, time.time()))
    name = f"{values['gen_ai.operation.name']} {served.id}" if served else str(values["gen_ai.operation.name"])
    return Span(name, began, time.time(), values, parts, failed=status >= 500)


def _parts(answer: Generation) -> list[Span]:
    """Where the time of one answer went."""
    began = wall(answer.began)
    computed = began + (answer.queued_s or 0.0)
    parts = [Span("admission and queue", began, computed)] if answer.queued_s is not None else []
    if answer.first:
        first = wall(answer.first)
        parts.append(Span("prefill", computed, first, {"ptuning.cached_tokens": answer.cached_tokens}))
        parts.append(
            Span("decode", first, first + sum(answer.intervals), {"gen_ai.usage.output_tokens": answer.completion_tokens})
        )
    return parts
