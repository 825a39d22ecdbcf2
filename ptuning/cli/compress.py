"""`ptuning compress`: distil a long text prompt into a soft prompt, without an experiment file."""

from __future__ import annotations

from itertools import chain
from typing import Annotated, Any

import typer

from ptuning import api
from ptuning.cli.options import Json, Overrides, Register, Resume, busy, check_register, ended, fail, finish, non_blank
from ptuning.config import Experiment, changed_experiment, with_texts
from ptuning.errors import UserError

HELD_OUT = 0.1
"""Fraction of the rows that measures how close the soft prompt is, and selects the best step."""


def compress(
    text: Annotated[str, typer.Argument(metavar="TEXT", callback=non_blank, help="The text, or a file (.txt, .md).")],
    rows: Annotated[
        str, typer.Option("--rows", metavar="FILE", callback=non_blank, help="Inputs, as data.train; no answers are needed.")
    ],
    overrides: Overrides = None,
    template: Annotated[
        str, typer.Option("--input", metavar="TEMPLATE", help='What follows the text: data.input. "" for conversations.')
    ] = "{text}\n",
    labels: Annotated[
        str,
        typer.Option("--labels", metavar="A,B", help="All labels, if the answer is one of them."),
    ] = "",
    base: Annotated[
        str, typer.Option("--base", metavar="PATH", callback=non_blank, help="The base that reads the text: model.path.")
    ] = "builtin",
    length: Annotated[int, typer.Option("--length", min=1, help="Virtual tokens that take the place of the text.")] = 20,
    resume: Resume = False,
    register: Register = None,
    as_json: Json = False,
) -> None:
    """Distil a text prompt into a soft prompt.

    The soft prompt learns to answer as the base answers after TEXT, from inputs alone. All other settings are those of ptuning
    train with data.teacher.

    Example: ptuning compress rules.txt --rows inputs.jsonl --labels yes,no name=rules
    """
    try:
        settings = compression(text, rows, template, labels, base, length, overrides or [])
    except UserError as error:
        fail(str(error), 2)
    check_register(register)
    named = {"--rows": rows, "--input": template, "--labels": labels, "--base": base, "--length": str(length)}
    with ended(["compress", text, *(overrides or []), *chain.from_iterable(named.items())], settings):
        with busy("starting"):
            api.prepare("train", settings)
        result = api.train(settings, resume=resume, register=register)
    finish(result.as_json(), as_json)


def compression(text: str, rows: str, template: str, labels: str, base: str, length: int, overrides: list[str]) -> Experiment:
    """The experiment of a compression.

    Raises:
        ExperimentError: something is wrong with it.
    """
    data: dict[str, Any] = {"teacher": text, "train": rows, "validation": HELD_OUT}
    if template:
        data["input"] = template
    if labels:
        data["labels"] = [label.strip() for label in labels.split(",")]
        if template:
            data["target"] = "{label}" if template[-1].isspace() else " {label}"
    tables = {"name": "compressed", "model": {"path": base}, "prompt": {"length": length}, "data": data}
    return with_texts(changed_experiment(tables, overrides, "compress"))
