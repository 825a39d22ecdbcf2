"""Limits shared by training, serving and the capacity plan."""

from __future__ import annotations

MOST_SLOTS = 32
"""Maximum number of soft prompts that train side by side."""

PAGE = 16
"""Tokens per page of the cache. Only whole pages are shared; with transformers' default of 256 no soft prompt would be
shared."""

STEP_TOKENS = 1024
"""Tokens in one step of a serving replica; longer prefills take several steps."""

TOKENS = 8192
"""Approximate number of tokens in one pass of an evaluation; limits the activations."""

CPU_TOKENS = 2048
"""The same on a CPU, if nothing is generated. Activations of more tokens do not fit into the cache, and malloc returns them to
the system after every operation: page faults were a quarter of the time of an evaluation."""

LOGITS = 1 << 26
"""Maximum number of logits in one pass of an evaluation: 256 MiB in fp32."""


def scored_tokens(gpu: bool) -> int:
    """Approximate number of tokens in one pass that generates nothing."""
    return TOKENS if gpu else CPU_TOKENS
