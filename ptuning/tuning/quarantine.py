"""Finds the run that kills its workers: a job that brings down the group again and again must not hold up its neighbours.

After several failures of workers in a row in which no run has made a step that it had not made before, the runs train one at
a time. A run during whose turn the workers fail as often is the one, and fails; one that goes on has had its turn, and waits
until the others have had theirs. Then all train together again.
"""

from __future__ import annotations

from collections.abc import Sequence

PATIENCE = 3
"""Failures in a row without progress."""


class Quarantine:
    """Decides who trains alone. Not thread-safe."""

    def __init__(self, turn: int) -> None:
        """`turn`: new steps after which a run that trains alone has had its turn."""
        self._turn = turn
        self._failures = 0
        self._made = 0
        self._cleared: set[str] = set()
        self.active = False
        """Runs train one at a time."""

    def broken(self, training: Sequence[str]) -> str | None:
        """Workers have failed while these runs had slots. Returns the run that is to fail, if it is known."""
        self._failures += 1
        self._made = 0
        if self._failures < PATIENCE:
            return None
        if self.active and len(training) == 1:
            self._failures = 0
            return training[0]
        if not self.active and len(training) > 1:
            self.active, self._cleared, self._failures = True, set(), 0
            return None
        return training[0] if len(training) == 1 else None

    def progressed(self, run: str) -> bool:
        """A run has made a step that it had not made before. True: it has had its turn alone."""
        self._failures = 0
        if not self.active:
            return False
        self._made += 1
        if self._made < self._turn:
            return False
        self.over(run)
        return True

    def over(self, run: str) -> None:
        """A run has had its turn, or has ended."""
        self._cleared.add(run)
        self._made = 0

    def release(self, waiting: Sequence[str]) -> bool:
        """Whether all may train together again: none of those that still want a slot has yet to have its turn."""
        if self.active and all(run in self._cleared for run in waiting):
            self.active = False
            self._failures = 0
            return True
        return False
