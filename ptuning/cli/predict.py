"""`ptuning predict`: parse first, import ray and torch inside."""

from __future__ import annotations

import json
import shlex
import sys
from typing import Annotated

import typer

from ptuning import api
from ptuning.cli.options import BaseOption, Json, Storage, Tracking, fail, non_blank
from ptuning.errors import RunFailed, UserError
from ptuning.redaction import redact


def predict(
    name: Annotated[
        str,
        typer.Argument(metavar="NAME", callback=non_blank, help="A soft prompt: name, name:3, name@champion, or a folder."),
    ],
    rows: Annotated[
        list[str],
        typer.Argument(metavar="ROWS", callback=non_blank, help="The table: files, a folder, hub:org/name:split, or s3://."),
    ],
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="TABLE", callback=non_blank, help="A new .parquet, .csv or .jsonl file.")
    ],
    model_column: Annotated[
        str | None,
        typer.Option(
            "--model-column",
            metavar="COLUMN",
            callback=non_blank,
            help="Column with the soft prompt of each row; NAME answers where it is empty.",
        ),
    ] = None,
    probabilities: Annotated[bool, typer.Option("--probabilities", help="Add the probability of every label.")] = False,
    prefix: Annotated[str, typer.Option("--prefix", help="In front of the names of the added columns.")] = "",
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="Processes, each with the base. Default: one per GPU, else 1.")
    ] = None,
    cpus: Annotated[
        float | None,
        typer.Option("--cpus", min=0.1, help="CPUs per worker. Default: this machine's, shared; on a cluster 1."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an output that was begun.")] = False,
    address: Annotated[
        str | None, typer.Option("--address", metavar="ADDRESS", callback=non_blank, help="Ray cluster to connect to.")
    ] = None,
    storage: Storage = None,
    tracking: Tracking = None,
    base: BaseOption = None,
    as_json: Json = False,
) -> None:
    """Answer the rows of a table, and write them with their answers.

    Example: ptuning predict sentiment reviews.csv -o answers.parquet --probabilities
    """
    try:
        result = api.predict(
            name,
            rows,
            output,
            model_column=model_column,
            probabilities=probabilities,
            prefix=prefix,
            workers=workers,
            cpus=cpus,
            resume=resume,
            address=address,
            storage=storage,
            tracking=tracking,
            base=base,
        )
    except UserError as error:
        fail(str(error), 2)
    except RunFailed as error:
        fail(str(error), 1)
    except KeyboardInterrupt:
        given = [each for each in sys.argv[1:] if each != "--resume"]
        fail(f"stopped; continue with: {shlex.join(['ptuning', *given, '--resume'])}", 130)
    for note in result.notes:
        typer.echo(redact(note), err=True)
    typer.echo(json.dumps(result.as_json()) if as_json else redact(str(result)))
