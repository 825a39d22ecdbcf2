"""Prompt tuning of large frozen language models: one frozen model, many soft prompts.

The names below are imported when they are first used (PEP 562): `import ptuning` itself imports nothing, not even from the
standard library, because a command must not import a file of that name from the working folder (`sys_path`).
"""

TYPE_CHECKING = False  # type checkers take this name for True, as typing's
if TYPE_CHECKING:
    from ptuning.api import (
        Experiment,
        Predictor,
        PredictResult,
        Registry,
        RunFailed,
        SearchResult,
        Server,
        SoftPrompt,
        TrainResult,
        UserError,
        load,
        plan,
        predict,
        search,
        serve,
        train,
    )

    __version__: str

__all__ = [
    "Experiment",
    "PredictResult",
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
    "predict",
    "search",
    "serve",
    "train",
]


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version

        return version("ptuning")
    if name in __all__:
        from ptuning import api

        return getattr(api, name)
    raise AttributeError(f"module 'ptuning' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
