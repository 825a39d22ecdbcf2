"""Prompt tuning of large frozen language models: one frozen model, many soft prompts.

The names below are imported when they are first used (PEP 562): `import ptuning` itself loads nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ptuning.api import (
        Experiment,
        Predictor,
        Registry,
        RunFailed,
        SearchResult,
        Server,
        SoftPrompt,
        TrainResult,
        UserError,
        load,
        plan,
        search,
        serve,
        train,
    )

    __version__: str

__all__ = [
    "Experiment",
    "Predictor",
    "Registry",
    "RunFailed",
    "SearchResult",
    "Server",
    "SoftPrompt",
    "TrainResult",
    "UserError",
    "__version__",
    "load",
    "plan",
    "search",
    "serve",
    "train",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("ptuning")
    if name in __all__:
        from ptuning import api

        return getattr(api, name)
    raise AttributeError(f"module 'ptuning' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
