"""`ptuning submit` and `ptuning jobs`: parse first, import ray inside."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ptuning import environment
from ptuning.cli.options import ExperimentArgument, Json, Overrides, check_register, fail, finish, non_blank, table
from ptuning.config import read_experiment
from ptuning.errors import UserError

if TYPE_CHECKING:
    from ptuning.cluster.jobs import Cluster, Job

jobs = typer.Typer(name="jobs", no_args_is_help=True, help="Jobs on a Ray cluster: list, logs, stop.")


class What(StrEnum):
    train = "train"
    search = "search"
    serve = "serve"


Address = Annotated[
    str,
    typer.Option(
        "--address",
        metavar="URL",
        envvar="RAY_API_SERVER_ADDRESS",
        callback=non_blank,
        help="The cluster's dashboard, http://HEAD:8265.",
    ),
]
JobId = Annotated[str, typer.Argument(metavar="JOB", callback=non_blank, help="The job's id; `ptuning jobs list` shows it.")]


def submit(
    what: Annotated[What, typer.Argument(metavar="train|search|serve", help="The command to run there.", show_choices=False)],
    experiment: ExperimentArgument,
    address: Address,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run of this name from its newest checkpoint.")] = False,
    register: Annotated[
        str | None, typer.Option("--register", metavar="NAME", callback=non_blank, help="As for train and search.")
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="As for serve.")] = False,
    shared: Annotated[
        list[str] | None,
        typer.Option(
            "--shared",
            metavar="FOLDER",
            callback=non_blank,
            help="A folder that all nodes see as this machine does: nothing in it travels.",
        ),
    ] = None,
    env: Annotated[
        list[str] | None,
        typer.Option("--env", metavar="NAME[=VALUE]", callback=non_blank, help="One more variable for the job. No secrets."),
    ] = None,
    installed: Annotated[
        bool, typer.Option("--installed", help="Run the ptuning that the nodes have installed; else this one travels.")
    ] = False,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Follow the log to the end.")] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be sent, and send nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Run train, search or serve as a job on a Ray cluster.

    Its log is followed, and the exit code is the job's. What is served lives on when its job has ended; `ptuning jobs stop`
    ends it.

    Example: ptuning submit train jobs/sentiment.toml compute.storage=s3://bucket/runs --address http://head:8265
    """
    from ptuning.cluster.job_package import build_package

    flags = {"--resume": resume, f"--register={register}": register is not None, "--insecure": insecure}
    unfit = {"--resume", f"--register={register}"} if what == What.serve else {"--insecure"}
    wrong = [flag for flag in unfit if flags[flag]]
    if wrong:
        fail(f"{wrong[0].partition('=')[0]}: is nothing for {what.value}; leave it out", 2)
    check_register(register)
    with _told():
        name = read_experiment(experiment, overrides or []).name
        shipment = build_package(what.value, experiment, overrides or [], shared=shared or [], env=env or [], here=os.environ)
        from ptuning.cluster.jobs import Cluster, Job

        job = Job(what.value, name, tuple(flag for flag in flags if flags[flag]), shipment, installed)
        if dry_run:
            _describe(job, as_json)
            return
        cluster = Cluster(address)
        for note in shipment.notes:
            _say(note)
        package = "" if installed else ", and this package"
        _say(f"sending {', '.join(shipment.contents)} ({sum(shipment.contents.values()) / 1e3:.0f} kB){package}")
        submitted = cluster.submit(job)
        _say(f"job {submitted}")
        if wait:
            _follow(cluster, submitted, as_json)
        else:
            typer.echo(json.dumps({"job": submitted}) if as_json else submitted)


@jobs.command("list")
def list_jobs(address: Address, as_json: Json = False) -> None:
    """The cluster's jobs, the newest first.

    Example: ptuning jobs list --address http://head:8265
    """
    with _told():
        from ptuning.cluster.jobs import KIND, Cluster, exit_code

        found = Cluster(address).jobs()
    rows: list[dict[str, Any]] = [
        {
            "job": job.submission_id,
            "what": (job.metadata or {}).get(KIND),
            "experiment": (job.metadata or {}).get("experiment"),
            "status": job.status.value.lower(),
            "exit_code": exit_code(job) if job.status.is_terminal() else None,
            "started": job.start_time and job.start_time / 1000,
            "seconds": job.start_time and round((job.end_time or time.time() * 1000) / 1000 - job.start_time / 1000),
        }
        for job in found
    ]
    if as_json:
        typer.echo(json.dumps({"jobs": rows}))
        return
    lines = [("JOB", "WHAT", "EXPERIMENT", "STATUS", "STARTED", "SECONDS")]
    for row in rows:
        started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row["started"])) if row["started"] else "-"
        lines.append(
            (row["job"], row["what"] or "-", row["experiment"] or "-", row["status"], started, str(row["seconds"] or 0))
        )
    typer.echo(table(lines))


@jobs.command()
def logs(
    job: JobId,
    address: Address,
    follow: Annotated[bool, typer.Option("--follow", help="Follow it to the end; the exit code is then the job's.")] = False,
    as_json: Json = False,
) -> None:
    """Print the log of a job.

    Example: ptuning jobs logs sentiment-20260102-030405-ab12 --follow --address http://head:8265
    """
    with _told():
        from ptuning.cluster.jobs import Cluster

        cluster = Cluster(address)
        if follow:
            _follow(cluster, job, as_json)
        else:
            text = cluster.logs(job)
            typer.echo(json.dumps({"job": job, "log": text}) if as_json else text, nl=as_json)


@jobs.command()
def stop(
    job: JobId,
    address: Address,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until it has ended.")] = True,
    as_json: Json = False,
) -> None:
    """Stop a job cleanly: its run can be resumed.

    For a serving job, the application it has deployed is ended.

    Example: ptuning jobs stop sentiment-20260102-030405-ab12 --address http://head:8265
    """
    with _told():
        from ptuning.cluster.jobs import Cluster

        cluster = Cluster(address)
        stopped = cluster.stop(job)
        details = cluster.info(job)
        while wait and not details.status.is_terminal():
            time.sleep(0.5)
            details = cluster.info(job)
        status = details.status.value.lower()
    if as_json:
        typer.echo(json.dumps({"job": job, "stopped": stopped, "status": status}))
    elif not stopped:
        typer.echo(f"{job}: had already ended ({status})")
    else:
        typer.echo(f"{job}: what it served has ended" if status == "succeeded" else f"{job}: {status}")


def _follow(cluster: Cluster, job: str, as_json: bool) -> None:
    """Show a job's log until it is over; ends with its exit code and its result."""
    from ptuning.cluster.jobs import Log, exit_code, failure

    log = Log(_say)
    while True:
        try:
            details = cluster.follow(job, log)
            break
        except KeyboardInterrupt:
            again = f"ptuning jobs logs {job} --follow --address {cluster.address}"
            if not _asked_to_stop():
                fail(f"{job} goes on; follow it with: {again}", 130)
            _say(f"stopping {job}")
            cluster.stop(job)
    result, code = log.result(), exit_code(details)
    if code:
        fail(f"{job} {failure(details)}", code)
    if result is None:
        return
    if "metrics" in result:
        finish(result, as_json)
    else:
        typer.echo(json.dumps(result) if as_json else ", ".join(f"{key} {value}" for key, value in result.items()))


def examine(experiment: str | None, overrides: list[str], address: str) -> list[dict[str, Any]]:
    """What `ptuning doctor` finds as a job on the cluster behind a dashboard."""
    with _told():
        from ptuning.cluster.job_package import build_package
        from ptuning.cluster.jobs import Cluster, Job, Log, failure

        shipment = build_package("doctor", experiment, overrides, shared=[], env=[], here=os.environ)
        cluster = Cluster(address)
        submitted = cluster.submit(Job("doctor", "doctor", (), shipment, installed=False))
        _say(f"job {submitted}")
        said: list[str] = []
        log = Log(said.append)
        details = cluster.follow(submitted, log)
        result = log.result()
    if result is None or "findings" not in result:
        fail(f"{submitted} {failure(details)}: {next(filter(None, reversed(said)), 'its log is empty')}", 1)
    found: list[dict[str, Any]] = result["findings"]
    return found


def _asked_to_stop() -> bool:
    """Ctrl-C may mean either. Without a terminal the user cannot be asked, and a job must not end by accident."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    try:
        return typer.prompt("\ndetach from the job, or stop it? [detach/stop]", default="detach", err=True).strip() == "stop"
    except (typer.Abort, KeyboardInterrupt):
        return False


def _describe(job: Job, as_json: bool) -> None:
    what = job.describe()
    if as_json:
        typer.echo(json.dumps(what))
        return
    typer.echo(f"entrypoint  {what['entrypoint']}")
    typer.echo("resources   the driver: no CPU, on the head node")
    for kind, entries in (("env", what["env"]), ("file", what["files"])):
        for name, value in sorted(entries.items()):
            typer.echo(f"{kind:10}  {name}={value}" if kind == "env" else f"{kind:10}  {name}  {value:,} bytes")
    for note in what["notes"]:
        typer.echo(f"note        {note}")


def _say(line: str) -> None:
    typer.echo(line, err=True)


@contextmanager
def _told() -> Iterator[None]:
    """Errors as one sentence."""
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        environment.apply("token")
    from ptuning.cluster.jobs import ClusterError

    try:
        yield
    except UserError as error:
        fail(str(error), 2)
    except ClusterError as error:
        fail(str(error), 1)
