"""Errors for users: one sentence that states the problem and the fix."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable


class UserError(ValueError):
    """Invalid input. The message is one sentence that names the place and the fix. The command line shows it unchanged."""


class BaseError(UserError):
    """The base is unknown, incomplete, or not a decoder-only language model."""


class TrackingError(UserError):
    """MLflow did not respond (`code` is OFFLINE), returned an error (`code` is MLflow's, such as RESOURCE_DOES_NOT_EXIST), or
    its database cannot be used (`code` is DATABASE)."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


class DataError(UserError):
    """A split cannot be used. The message names the file, the row or line, and the fix."""


class CannotRun(RuntimeError):
    """An error that occurs again at every attempt: a missing package, or an architecture that lacks an operation. Its run ends
    at once, without restarts."""


class RunFailed(RuntimeError):
    """The run was started and did not finish. The message gives the cause and the fix."""


def suggest(
    word: str, known: Iterable[str], otherwise: str, *, alike: float = 0.6, shown: Callable[[str], str] | None = None
) -> str:
    """The end of an error about an unknown name: "did you mean X?" if a known name is similar, else `otherwise`.

    Upper and lower case, and a prefix as in "openai/NAME", are ignored. If `known` is a mapping, only its keys are used: its
    values may be confidential. `alike`: the minimum similarity, from 0 (nothing in common) to 1 (equal); `shown`: formats a
    known name.
    """
    names = list(known)
    lower = {name.lower(): name for name in names} | {name: name for name in names}
    for wanted in (word, word.lower(), word.lower().rpartition("/")[2]):
        close = [wanted] if wanted in lower else difflib.get_close_matches(wanted, lower, n=1, cutoff=alike)
        if close:
            return f"did you mean {(shown or str)(lower[close[0]])}?"
    return otherwise
