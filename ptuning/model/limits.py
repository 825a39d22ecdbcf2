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

LOGITS = 1 << 26
"""Maximum number of logits in one pass of an evaluation: 256 MiB in fp32."""
