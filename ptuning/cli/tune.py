"""`ptuning tune`: jobs of the tuning service of a running server, as OpenAI's clients start and follow them."""

from __future__ import annotations

import json
import time
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ptuning.cli.options import Json, fail, non_blank, table
from ptuning.cli.server_client import LOCAL_URL, Url, request, upload

JOBS = "fine_tuning/jobs"
ENDED = ("succeeded", "failed", "cancelled")
LOOK_S = 1.0
"""Seconds between two looks at a job that is followed."""
OF_METHOD = ("labels", "template", "system")
"""Settings that are not among the hyperparameters."""


class _Starting(TyperGroup):
    """`ptuning tune FILE` is `ptuning tune start FILE`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, "--help"):
            args = ["start", *args]
        return super().parse_args(ctx, args)


tune = typer.Typer(
    name="tune", cls=_Starting, no_args_is_help=True, help="Tuning jobs of a running server: start, list, events, cancel, ..."
)

JobId = Annotated[str, typer.Argument(metavar="JOB", callback=non_blank, help="The job's id; `ptuning tune list` shows it.")]
Limit = Annotated[int, typer.Option("--limit", min=1, max=1000, help="At most this many.")]


@tune.command()
def start(
    file: Annotated[str, typer.Argument(metavar="FILE", callback=non_blank, help="Training rows (JSONL).")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE", help="Settings of the job, such as n_epochs=3 prompt_length=20 labels=auto template.input=..."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="NAME", callback=non_blank, help="What to begin with. Default: the server's base."),
    ] = None,
    suffix: Annotated[
        str | None, typer.Option("--suffix", metavar="NAME", callback=non_blank, help="Name of the result in the registry.")
    ] = None,
    validation: Annotated[
        str | None,
        typer.Option("--validation", metavar="FILE", callback=non_blank, help="Validation rows. Default: a tenth of the rows."),
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Seed of the job.")] = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Follow the job to its end.")] = True,
    url: Url = LOCAL_URL,
    as_json: Json = False,
) -> None:
    """Tune a soft prompt on a running server.

    The file is sent there, and the job is followed to its end. `start` may be left out. An API key with the scope tuning comes
    from PTUNING_API_KEY.

    Example: ptuning tune start reviews.jsonl --suffix sentiment
    """
    asked: dict[str, Any] = {"model": model or _base(url)} | _method(settings or [])
    sent: list[str] = []
    for name, path in (("training_file", file), ("validation_file", validation)):
        if path is not None:
            asked[name] = upload(url, path, "fine-tune", lambda message, code: _give_back(url, sent, message, code))["id"]
            sent.append(asked[name])
    asked |= {name: value for name, value in (("suffix", suffix), ("seed", seed)) if value is not None}
    job = request(url, JOBS, asked, lambda message, code: _give_back(url, sent, message, code), patient=True)
    _say(f"job {job['id']}")
    if wait:
        _follow(url, job["id"], as_json)
    else:
        typer.echo(json.dumps(job) if as_json else job["id"])


@tune.command("list")
def list_jobs(limit: Limit = 20, url: Url = LOCAL_URL, as_json: Json = False) -> None:
    """The jobs of your key, the newest first.

    Example: ptuning tune list --limit 50
    """
    jobs = request(url, f"{JOBS}?limit={limit}", patient=True)["data"]
    if as_json:
        typer.echo(json.dumps({"jobs": jobs}))
        return
    rows = [("JOB", "STATUS", "MODEL", "RESULT", "CREATED")]
    for job in jobs:
        created = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(job["created_at"]))
        rows.append((job["id"], job["status"], job["model"], job["fine_tuned_model"] or "-", created))
    typer.echo(table(rows))


@tune.command()
def events(
    job: JobId,
    follow: Annotated[
        bool, typer.Option("--follow", help="Follow them to the job's end; the exit code is then its own.")
    ] = False,
    limit: Limit = 1000,
    url: Url = LOCAL_URL,
    as_json: Json = False,
) -> None:
    """What happened to a job, the oldest first.

    Example: ptuning tune events ftjob-0123456789abcdefghijklmn --follow
    """
    if follow:
        _follow(url, job, as_json)
        return
    found = _events(url, job, limit)
    if as_json:
        typer.echo(json.dumps({"events": found}))
    else:
        for each in found:
            typer.echo(_line(each))


@tune.command()
def cancel(job: JobId, url: Url = LOCAL_URL, as_json: Json = False) -> None:
    """End a job. Its checkpoints stay.

    Example: ptuning tune cancel ftjob-0123456789abcdefghijklmn
    """
    _act(url, job, "cancel", as_json)


@tune.command()
def pause(job: JobId, url: Url = LOCAL_URL, as_json: Json = False) -> None:
    """Stop a job at a checkpoint, and free its slots.

    Example: ptuning tune pause ftjob-0123456789abcdefghijklmn
    """
    _act(url, job, "pause", as_json)


@tune.command()
def resume(job: JobId, url: Url = LOCAL_URL, as_json: Json = False) -> None:
    """Continue a paused job.

    Example: ptuning tune resume ftjob-0123456789abcdefghijklmn
    """
    _act(url, job, "resume", as_json)


def _base(url: str) -> str:
    """The name of the server's base."""
    models = request(url, "models")["data"]
    return str(next((model["id"] for model in models if not model.get("soft_prompt")), "base"))


def _method(settings: list[str]) -> dict[str, Any]:
    """`method` of a job from KEY=VALUE. Values are JSON, or else text."""
    supervised: dict[str, Any] = {}
    for setting in settings:
        key, separator, text = setting.partition("=")
        if not separator or not key.strip():
            fail(f"{setting}: is not a setting; write KEY=VALUE, such as n_epochs=3", 2)
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        *tables, last = key.strip().split(".")
        if not tables and last not in OF_METHOD:
            tables = ["hyperparameters"]
        place = supervised
        for name in tables:
            place = place.setdefault(name, {})
            if not isinstance(place, dict):
                fail(f"{setting}: {name} was given another value; give one of them", 2)
        place[last] = value
    return {"method": {"type": "supervised", "supervised": supervised}} if supervised else {}


def _give_back(url: str, sent: list[str], message: str, code: int) -> Any:
    """A job that was refused leaves no files on the server."""
    for file in sent:
        request(url, f"files/{file}", delete=True, say=lambda ignored, number: fail(message, code))
    fail(message, code)


def _act(url: str, job: str, what: str, as_json: bool) -> None:
    found = request(url, f"{JOBS}/{job}/{what}", post=True, patient=True)
    typer.echo(json.dumps(found) if as_json else f"{found['id']}: {found['status']}")


def _events(url: str, job: str, limit: int = 1000) -> list[dict[str, Any]]:
    """The newest events of a job, the oldest of them first."""
    return list(request(url, f"{JOBS}/{job}/events?limit={limit}", patient=True)["data"])[::-1]


def _follow(url: str, job: str, as_json: bool) -> None:
    """Show the events of a job until it has ended; ends with its exit code."""
    shown: set[str] = set()
    try:
        while True:
            found = request(url, f"{JOBS}/{job}", patient=True)
            for each in _events(url, job):
                if each["id"] not in shown:
                    shown.add(each["id"])
                    _say(_line(each))
            if found["status"] in ENDED:
                break
            time.sleep(LOOK_S)
    except KeyboardInterrupt:
        fail(
            f"{job} goes on; follow it with: ptuning tune events {job} --follow, or end it with: ptuning tune cancel {job}", 130
        )
    if as_json:
        typer.echo(json.dumps(found))
    elif found["status"] == "succeeded":
        typer.echo(found["fine_tuned_model"])
        _say(f'ask it with: ptuning ask {found["fine_tuned_model"]} "..."')
    if found["status"] != "succeeded":
        reason = (found.get("error") or {}).get("message")
        fail(f"{job} {found['status']}{f': {reason}' if reason else ''}", 1)


def _line(event: dict[str, Any]) -> str:
    level = "" if event["level"] == "info" else f"{event['level']}: "
    return f"{time.strftime('%H:%M:%S', time.localtime(event['created_at']))}  {level}{event['message']}"


def _say(line: str) -> None:
    typer.echo(line, err=True)
