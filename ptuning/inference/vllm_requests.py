"""What vLLM (0.29) is asked for a request, and its answers."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

from ptuning.inference.engine import Running
from ptuning.inference.sampling import Sampling, Token

ROWS, TOKENIZER = "soft_prompt_rows", "tokenizer"
"""Keys of vLLM's `additional_config`: the number of rows for soft prompts, and the folder of the base's tokenizer."""
VECTORS = "vectors"
"""The name of the tensor in what is written into rows."""
REPETITION, FREQUENCY, PRESENCE = "repetition", "frequency", "presence"
GIVEN, SCHEMA, ENDS = "given", "schema", "ends"
"""Keys of a request's `extra_args`: penalties, an answer that is given, a JSON schema and the tokens that end its answer."""
NAMED = 128
"""Most tokens that a request may name (vllm.sampling_params.MAX_LOGPROB_TOKEN_IDS)."""
COLDEST = 0.01
"""Lowest temperature that vLLM draws with; below, the likeliest token is taken."""


def params_of(
    sampling: Sampling,
    new: int,
    ends: Sequence[int],
    changes: dict[str, Any] | None = None,
    named: Sequence[int] | None = None,
) -> Any:
    """vLLM's settings of a request. `named`: tokens whose log-probabilities are reported, instead of the likeliest ones."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=sampling.temperature if sampling.temperature >= COLDEST else 0.0,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        logit_bias=dict(sampling.logit_bias) or None,
        min_tokens=min(sampling.min_tokens, new),
        seed=None if sampling.seed is None else sampling.seed % 2**63,  # -1 is none for vLLM
        max_tokens=new,
        stop_token_ids=list(ends),
        ignore_eos=True,
        detokenize=False,
        logprobs=None if named else sampling.top or 0,
        logprob_token_ids=list(named) if named else None,
        output_kind=RequestOutputKind.DELTA,
        extra_args=changes or None,
    )


def changes_of(running: Running) -> dict[str, Any]:
    """What `vllm_sampling` changes."""
    sampling, grammar = running.request.sampling, running.request.grammar
    changes = {
        REPETITION: (sampling.repetition_penalty, 1.0),
        FREQUENCY: (sampling.frequency_penalty, 0.0),
        PRESENCE: (sampling.presence_penalty, 0.0),
    }
    restricted = {SCHEMA: grammar.schema, ENDS: list(running.ends)} if grammar else {}
    return {name: value for name, (value, without) in changes.items() if value != without} | restricted


def tokens_of(output: Any, top: int | None) -> list[Token | None]:
    """The new tokens of an output; None: its logits were not numbers."""
    (answer,) = output.outputs
    found: list[Token | None] = []
    for token, entries in zip(answer.token_ids, answer.logprobs or (), strict=True):
        own = entries[token].logprob
        if math.isnan(own):
            found.append(None)
            continue
        likely = sorted(entries.items(), key=lambda pair: pair[1].rank)[: top or 0]
        found.append(Token(token, None if top is None else own, tuple((each, entry.logprob) for each, entry in likely)))
    return found


def began_at(output: Any) -> float:
    """When the first step of a request began, by `time.monotonic`."""
    scheduled = output.metrics.scheduled_ts if output.metrics else 0.0
    return float(scheduled) or time.monotonic()
