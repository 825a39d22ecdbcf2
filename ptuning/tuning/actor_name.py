"""Where the actor that owns the jobs of a storage folder is found on a cluster. Imports nothing: every replica needs it."""

from __future__ import annotations

import hashlib

NAMESPACE = "ptuning"


def actor_name(storage: str) -> str:
    """The name of the actor in `NAMESPACE`. `storage`: the absolute `compute.storage`."""
    return f"tuning-{hashlib.sha256(storage.encode()).hexdigest()[:16]}"
