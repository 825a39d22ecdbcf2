"""What an engine computes without generating: log-probabilities of labels after texts, and of a text's own tokens."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TypeVar

from ptuning.inference.sampling import Token
from ptuning.inference.types import ResidentPrompt
from ptuning.model.label_trie import LabelTrie

Result = TypeVar("Result")


class Timed(Future[Result]):
    """A future that records when its computation began."""

    began = 0.0
    """By `time.monotonic`; 0: it waits."""

    def set_running_or_notify_cancel(self) -> bool:
        self.began = time.monotonic()
        return super().set_running_or_notify_cancel()


@dataclass
class LabelJob:
    """Rows after a soft prompt (None: without one), and the labels to score after each row."""

    handle: ResidentPrompt | None
    rows: Sequence[Sequence[int]]
    trie: LabelTrie
    future: Timed[list[list[float]]] = field(default_factory=Timed)

    @property
    def positions(self) -> int:
        """Number of tokens of text and labels in its pass."""
        return sum(map(len, self.rows)) + len(self.rows) * len(self.trie.tokens)


@dataclass
class TextJob:
    """A text after a soft prompt (None: without one). `top`: how many of the likeliest tokens are reported for each place."""

    handle: ResidentPrompt | None
    ids: Sequence[int]
    top: int
    future: Future[list[Token]] = field(default_factory=Future)

    @property
    def rows(self) -> Sequence[Sequence[int]]:
        return [self.ids]

    @property
    def positions(self) -> int:
        return len(self.ids)


Job = LabelJob | TextJob
