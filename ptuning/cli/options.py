"""What the commands share: arguments that mean the same everywhere, and how a command ends that cannot go on."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, NoReturn

import typer

from ptuning.config import EMPTY
from ptuning.errors import UserError
from ptuning.redaction import redact, redacted


def fail(message: str, code: int) -> NoReturn:
    """One sentence on stderr, and the exit code: 1 for a run that failed, 2 for wrong input."""
    typer.echo(f"ptuning: {redact(message)}", err=True)
    raise typer.Exit(code)


def non_blank(parameter: typer.CallbackParam, value: Any) -> Any:
    """Refuse blank paths, addresses and names on the command line, as `config.NonBlank` does in an experiment."""
    for text in value if isinstance(value, (list, tuple)) else [value]:
        if isinstance(text, str) and not text.strip():
            given = parameter.metavar or parameter.name if parameter.param_type_name == "argument" else parameter.opts[0]
            fail(f"{given}: {EMPTY}", 2)
    return value


ExperimentArgument = Annotated[str, typer.Argument(metavar="EXPERIMENT", callback=non_blank, help="Experiment file (TOML).")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Overrides, such as train.learning_rate=0.1")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of stdout.")]
Storage = Annotated[
    str, typer.Option("--storage", metavar="FOLDER", callback=non_blank, help="Storage folder whose tracking store to use.")
]
Tracking = Annotated[
    str | None,
    typer.Option("--tracking", metavar="URI", callback=non_blank, help="MLflow server or database to use instead."),
]
BaseOption = Annotated[
    str | None,
    typer.Option("--base", metavar="PATH", callback=non_blank, help="Where its base lies, if not where its card says."),
]


@contextmanager
def busy(what: str) -> Iterator[None]:
    """On a terminal, shows a spinner on stderr during a long operation; elsewhere nothing.

    Nothing may be printed inside: stdout would go to stderr, and lines on stderr would mix with the spinner.
    """
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(what):
        yield


def check_register(name: str | None) -> None:
    """Refuse a `--register` that cannot be a name."""
    from ptuning.registry.registry import check_name

    try:
        if name is not None:
            check_name(name)
    except UserError as error:
        fail(f"--register: {error}", 2)


def _reached(summary: dict[str, Any]) -> str:
    """The last line: what was reached and where it is."""
    order = (
        "test_accuracy",
        "test_macro_f1",
        "test_rouge_l",
        "test_bleu",
        "test_loss",
        "validation_accuracy",
        "validation_loss",
    )
    numbers = [f"{name.replace('_', ' ', 1)} {summary['metrics'][name]:.4f}" for name in order if name in summary["metrics"]]
    return (
        f"{summary['name']}: {', '.join(numbers[:3]) or 'trained'} after {summary['steps']} steps in "
        f"{summary['seconds']:.0f} s; soft prompt in {summary['soft_prompt']}, "
        f"MLflow run {summary['run_id'] or 'not shipped yet'}{_published(summary)}"
    )


def _won(summary: dict[str, Any]) -> str:
    """The last line of a search: the winner, and what any run says."""
    chosen = {key.rpartition(".")[2]: value for key, value in summary["winner"]["values"].items()}
    values = ", ".join(f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in chosen.items())
    trials = ", ".join(f"{many} {state}" for state, many in summary["trials"].items())
    return f"winner {summary['winner']['trial']} ({values}) of {trials}; {_reached(summary)}"


def _published(summary: dict[str, Any]) -> str:
    name = summary.get("registered")
    return f"; registered as {name}, make it champion with: ptuning prompts promote {name}" if name else ""


def finish(summary: dict[str, Any], as_json: bool) -> None:
    """The last line of stdout: the summary of a run or a search, for people or as JSON."""
    if summary.get("unsent"):
        typer.echo(f"{summary['unsent']} records could not be sent to MLflow yet; the next command sends them", err=True)
    shown = redacted(summary)
    typer.echo(json.dumps(shown) if as_json else _won(shown) if "winner" in shown else _reached(shown))
    sys.stdout.flush()
