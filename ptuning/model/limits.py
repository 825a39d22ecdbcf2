"""Sizes that training, serving and the capacity plan have in common."""

from __future__ import annotations

MOST_SLOTS = 32
"""Soft prompts that train side by side, at most."""

PAGE = 16
"""Tokens of a page of the cache. Whole pages are shared; transformers' default of 256 would share no soft prompt."""

STEP_TOKENS = 1024
"""Tokens in one step of a serving replica; longer prefills are spread over several."""

TOKENS = 8192
"""Tokens in one pass of an evaluation, about: a bound on activations."""

LOGITS = 1 << 26
"""Logits in one pass of an evaluation, at most: 256 MiB in fp32."""
