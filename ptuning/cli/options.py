"""What the commands share: arguments that mean the same everywhere, and how a command ends that cannot go on."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, NoReturn

import typer

from ptuning.config import Experiment
from ptuning.errors import RunFailed, UserError
from ptuning.redaction import redact, redacted
from ptuning.settings.fields import EMPTY


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
Register = Annotated[
    str | None,
    typer.Option(
        "--register", metavar="NAME", callback=non_blank, help="Publish the result as the newest version of this name."
    ),
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the run of this name from its newest checkpoint.")]
Storage = Annotated[
    str | None,
    typer.Option(
        "--storage",
        metavar="FOLDER",
        callback=non_blank,
        help="Storage folder whose tracking store to use. Default: MLFLOW_TRACKING_URI, else runs.",
    ),
]
Tracking = Annotated[
    str | None,
    typer.Option("--tracking", metavar="URI", callback=non_blank, help="MLflow server or database to use instead."),
]
BaseOption = Annotated[
    str | None,
    typer.Option("--base", metavar="PATH", callback=non_blank, help="The location of its base, if it differs from the card."),
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


@contextmanager
def ended(command: Sequence[str], settings: Experiment) -> Iterator[None]:
    """How a run that does not reach its end leaves the command: a sentence and an exit code. `command`: the words after
    `ptuning` that start it."""
    try:
        yield
    except RunFailed as error:
        fail(str(error), 1)
    except UserError as error:
        fail(str(error), 2)
    except KeyboardInterrupt:
        from ptuning.training.run_record import has_begun

        # What was stopped before it began has nothing to resume.
        resume = ["--resume"] if has_begun(settings) else []
        fail(f"stopped; continue with: {shlex.join(['ptuning', *command, *resume])}", 130)


def check_register(name: str | None) -> None:
    """Refuse a `--register` that cannot be a name."""
    from ptuning.registry.registry import check_name

    try:
        if name is not None:
            check_name(name)
    except UserError as error:
        fail(f"--register: {error}", 2)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def finish(reached: Mapping[str, Any], as_json: bool) -> None:
    """The last line of stdout: what a run or a search reached (`TrainResult.as_json`), for people or as JSON."""
    from ptuning.training.result import describe

    if reached.get("unsent"):
        typer.echo(f"{reached['unsent']} records could not be sent to MLflow yet; the next command sends them", err=True)
    shown = redacted(dict(reached))
    typer.echo(json.dumps(shown) if as_json else describe(shown))
    sys.stdout.flush()
