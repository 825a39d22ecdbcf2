"""The errors that people see: one sentence that says what is wrong and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable


class UserError(ValueError):
    """Bad input. The message is one sentence that names the place and the fix; the command line shows it as it is."""


class BaseError(UserError):
    """The base is unknown, incomplete, or no decoder-only language model."""


class RunFailed(RuntimeError):
    """The run was started and did not reach its end. The message says why and what to do."""


def suggest(
    word: str, known: Iterable[str], otherwise: str, *, alike: float = 0.6, shown: Callable[[str], str] | None = None
) -> str:
    """How a sentence about an unknown name ends: "did you mean X?" if one that is known is close to it, else `otherwise`.

    Another case, or something in front as in "openai/NAME", is close. Of a mapping only the keys are looked at: whatever they
    stand for may not be for the reader. `alike`: 1 for the same word, 0 for one that has nothing in common; `shown`: how a
    known name is written, if not as it is.
    """
    names = list(known)
    lower = {name.lower(): name for name in names} | {name: name for name in names}
    for wanted in (word, word.lower(), word.lower().rpartition("/")[2]):
        close = [wanted] if wanted in lower else difflib.get_close_matches(wanted, lower, n=1, cutoff=alike)
        if close:
            return f"did you mean {(shown or str)(lower[close[0]])}?"
    return otherwise
