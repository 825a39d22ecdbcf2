"""Two promoters at once, each in a process of its own: it imports nothing that they do not need."""

from __future__ import annotations

from typing import Any

from ptuning.registry.promotions import MovedMeanwhile, PromotionLog
from ptuning.registry.registry import Registry


def race(uri: str, name: str, version: int, tries: int, barrier: Any, results: Any) -> None:
    """One of two promoters: both begin every try with the same view, and each wants its own version."""
    ledger = PromotionLog(Registry(uri), name)
    for attempt in range(tries):
        seen = ledger.state()
        barrier.wait()
        try:
            ledger.promote(2 * attempt + version, seen)
            won = True
        except MovedMeanwhile:
            won = False
        barrier.wait()
        alias = ledger.registry.client.get_registered_model(name).aliases.get("champion")
        results.put((attempt, version, won, alias and int(alias)))
        barrier.wait()
