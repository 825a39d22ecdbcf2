"""What the commands share: arguments that mean the same everywhere, and how a command ends that cannot go on."""

from __future__ import annotations

from typing import Annotated, NoReturn

import typer

ExperimentArgument = Annotated[str, typer.Argument(metavar="EXPERIMENT", help="Experiment file (TOML).")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, such as train.learning_rate=0.1")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of stdout.")]
Storage = Annotated[str, typer.Option("--storage", metavar="FOLDER", help="Storage folder whose tracking store to use.")]
Tracking = Annotated[str | None, typer.Option("--tracking", metavar="URI", help="MLflow server or database to use instead.")]
BaseOption = Annotated[
    str | None, typer.Option("--base", metavar="PATH", help="Where its base lies, if not where its card says.")
]


def fail(message: str, code: int) -> NoReturn:
    """One sentence on stderr, and the exit code: 1 for a run that failed, 2 for wrong input."""
    typer.echo(f"ptuning: {message}", err=True)
    raise typer.Exit(code)
