"""`ptuning search NAME stop|clone|extend`: tells a search what to do, and what became of it."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from ptuning.cli.options import busy, fail, non_blank
from ptuning.errors import UserError

if TYPE_CHECKING:
    from ptuning.searching.interventions import SearchFolder
    from ptuning.searching.trial_store import Intervention

WORDS = ("stop", "clone", "extend")
SearchArgument = Annotated[
    str, typer.Argument(metavar="EXPERIMENT", callback=non_blank, help="Experiment file (TOML), or the name of a search.")
]
Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE", help="Overrides; or, to a search that runs: stop TRIAL, clone TRIAL KEY=VALUE ..., extend +N."
    ),
]
Warm = Annotated[bool, typer.Option("--warm", help="With clone: go on from the trial's newest checkpoint.")]
Folder = Annotated[
    str | None,
    typer.Option(
        "--storage", metavar="FOLDER", callback=non_blank, help="With stop, clone, extend: the search's storage. Default: runs."
    ),
]
ANSWER_S = 30.0
"""Seconds to wait for the driver's answer: it looks every second."""


def intervene(name: str, words: Sequence[str], folder: str, warm: bool, as_json: bool) -> None:
    """`name`: of the search; `words`: one of `WORDS` and what belongs to it; `folder`: the storage."""
    from ptuning import storage
    from ptuning.searching.interventions import SearchFolder, parse

    try:
        told = parse(words[0], words[1:], warm=warm)  # type: ignore[arg-type]
        search = SearchFolder(storage.join(folder, name))
        search.tell(told)
        with busy("waiting for the search"):
            done = _wait(search, told)
    except UserError as error:
        fail(str(error), 2)
    if as_json:
        typer.echo(json.dumps(asdict(done or told)))
    elif done is None:
        typer.echo(f"{name}: no driver has answered; one takes it as soon as it runs, at the latest with --resume")
    elif done.taken:
        typer.echo(f"{name}: {done.answer}")
    if done is not None and not done.taken:
        fail(done.answer, 1)


def _wait(search: SearchFolder, told: Intervention) -> Intervention | None:
    until = time.monotonic() + (ANSWER_S if search.driven else 0)
    while (done := search.outcome(told)) is None and time.monotonic() < until:
        time.sleep(0.5)
    return done
