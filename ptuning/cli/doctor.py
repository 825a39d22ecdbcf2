"""`ptuning doctor`: checks this machine or cluster."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from ptuning.cli import jobs
from ptuning.cli.options import Json, Overrides, busy, fail, non_blank, table
from ptuning.config import read_experiment
from ptuning.errors import UserError


def doctor(
    experiment: Annotated[
        str | None, typer.Argument(metavar="EXPERIMENT", callback=non_blank, help="Experiment file (TOML).")
    ] = None,
    overrides: Overrides = None,
    address: Annotated[
        str | None,
        typer.Option(
            "--address",
            callback=non_blank,
            help="Ray cluster: http://HEAD:8265 (its dashboard), HEAD:6379 (from inside), or auto (on this machine).",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Check this machine or cluster.

    Every line is ok, or a warning or an error with its fix.

    Example: ptuning doctor jobs/sentiment.toml --address http://head:8265
    """
    try:
        settings = read_experiment(experiment, overrides or []) if experiment else None
        if address and address.startswith(("http://", "https://")):
            from ptuning.cluster.node_checks import Finding

            findings = [Finding(**found) for found in jobs.examine(experiment, overrides or [], address)]
        else:
            with busy("looking"):
                from ptuning.cluster.doctor import examine

                findings = examine(settings, address)
    except UserError as error:
        fail(str(error), 2)
    wrong = [finding for finding in findings if finding.state == "wrong"]
    if as_json:
        typer.echo(json.dumps({"ok": not wrong, "findings": [asdict(finding) for finding in findings]}))
    else:
        texts = [f"{each.text}; {each.fix}" if each.fix else each.text for each in findings]
        rows = [(f"{each.state:5}", each.where, each.what, text) for each, text in zip(findings, texts, strict=True)]
        typer.echo(table(rows))
    if wrong:
        raise typer.Exit(1)
