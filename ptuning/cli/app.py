"""The command line. It parses first and imports torch and ray later: `--help` answers at once."""

from __future__ import annotations

import atexit
import json
import logging
import os
import sys
import traceback
from typing import Annotated

import typer

from ptuning import api, environment, sys_path
from ptuning.cli import compress, doctor, intervene, jobs, plan, predict, serve, top
from ptuning.cli.options import (
    ExperimentArgument,
    Json,
    Overrides,
    Register,
    Resume,
    busy,
    check_register,
    ended,
    fail,
    finish,
    non_blank,
)
from ptuning.cli.prompts import prompts
from ptuning.cli.tune import tune
from ptuning.config import Experiment, read_experiment
from ptuning.errors import UserError
from ptuning.redaction import redact, redacted

app = typer.Typer(
    name="ptuning",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Prompt tuning of large frozen language models: one frozen model, many soft prompts.",
)

app.add_typer(prompts)


@app.callback()
def ptuning() -> None:
    pass


@app.command()
def train(
    experiment: ExperimentArgument,
    overrides: Overrides = None,
    resume: Resume = False,
    register: Register = None,
    as_json: Json = False,
) -> None:
    """Train one soft prompt on a frozen base, evaluate it and track it.

    Example: ptuning train jobs/sms-spam.toml train.learning_rate=0.05 compute.workers=2
    """
    settings = _read(experiment, overrides)
    check_register(register)
    with ended(["train", experiment, *(overrides or [])], settings):
        with busy("starting"):
            api.prepare("train", settings)
        result = api.train(settings, resume=resume, register=register)
    finish(result.as_json(), as_json)


@app.command()
def search(
    experiment: intervene.SearchArgument,
    overrides: intervene.Words = None,
    resume: Resume = False,
    register: Annotated[
        str | None,
        typer.Option(
            "--register", metavar="NAME", callback=non_blank, help="Publish the winner under this name, not the experiment's."
        ),
    ] = None,
    warm: intervene.Warm = False,
    folder: intervene.Folder = None,
    as_json: Json = False,
) -> None:
    """Search over soft prompts that train side by side on one base.

    The winner is tested and registered. A search that runs takes instructions: its trials are stopped, cloned with other
    settings, or more of them are tried.

    Example: ptuning search jobs/sentiment.toml search.trials=16 'search.length=[5,20]'
    """
    if overrides and overrides[0] in intervene.WORDS:
        if resume or register:
            fail(f"{'--resume' if resume else '--register'}: is nothing for {overrides[0]}; leave it out", 2)
        return intervene.intervene(experiment, overrides, folder or "runs", warm, as_json)
    if warm or folder:
        fail(f"{'--warm' if warm else '--storage'}: is for {'clone' if warm else 'stop, clone and extend'}; leave it out", 2)
    settings = _read(experiment, overrides)
    check_register(register)
    with ended(["search", experiment, *(overrides or [])], settings):
        with busy("starting"):
            api.prepare("search", settings)
        result = api.search(settings, resume=resume, register=register)
    finish(result.as_json(), as_json)


app.command()(compress.compress)
app.command()(predict.predict)
app.command()(serve.serve)
app.command()(serve.ask)
app.command()(serve.compare)
app.add_typer(tune)
app.command()(jobs.submit)
app.add_typer(jobs.jobs)
app.command()(plan.plan)
app.command()(doctor.doctor)
app.command()(top.top)


@app.command()
def config(
    experiment: Annotated[
        str | None, typer.Argument(metavar="EXPERIMENT", callback=non_blank, help="Experiment file (TOML).")
    ] = None,
    overrides: Overrides = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of experiment files.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print it on one line, as other commands do.")] = False,
) -> None:
    """Print the resolved experiment as JSON.

    Every setting is there, with its default where the file has none. Passwords are shown as ***.

    Example: ptuning config jobs/sentiment.toml train.steps=100
    """
    indent = None if as_json else 1
    if schema:
        typer.echo(json.dumps(Experiment.model_json_schema(), indent=indent))
        return
    if experiment is None:
        fail("EXPERIMENT is missing; give the path of an experiment file, or --schema", 2)
    typer.echo(json.dumps(redacted(_read(experiment, overrides).model_dump(mode="json")), indent=indent, ensure_ascii=False))


def main() -> None:
    """Entry point of the `ptuning` command."""
    sys_path.leave_working_folder()
    environment.apply("command")
    code: list[int] = []
    atexit.register(_leave, code)  # first, so that it is called last
    try:
        app()
    except SystemExit as end:
        if isinstance(end.code, int):
            code.append(end.code)
        raise
    except Exception:  # not foreseen: all of it is shown, but for the passwords in addresses
        code.append(1)
        typer.echo(redact(traceback.format_exc()), err=True)
        raise SystemExit(1) from None


def _leave(code: list[int]) -> None:
    """End the process without taking apart what torch, transformers and MLflow have imported: that takes Python 2 s.

    Threads have been waited for, and everybody else's farewell (`atexit`) has been said.
    """
    if code:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code[0])


def _read(path: str, overrides: list[str] | None) -> Experiment:
    try:
        return read_experiment(path, overrides or [])
    except UserError as error:
        fail(str(error), 2)
