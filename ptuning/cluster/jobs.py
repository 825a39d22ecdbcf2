"""Jobs on a Ray cluster: sent, followed, found again and stopped over HTTP. The only module that knows Ray's Jobs API.

A job runs `python -m ptuning train FILE ...`, the command that was tried at home, in a working directory that holds the
experiment and what it names (`shipment`). The package itself travels, too, unless the nodes have it installed: as a module of
its own, which Ray keeps by its hash, so that it is uploaded once and the cluster runs the code that the command was typed with.

The driver asks for no CPU of the cluster. If it did, as little as 0.01, a node would be short of a whole one, and workers that
take all CPUs would wait for ever. Ray then starts it on the head node.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import secrets
import shlex
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from ptuning.cluster.job_package import JobPackage, Kind
from ptuning.errors import UserError, suggest

KIND = "ptuning"
"""Key of a job's metadata: what it runs. `experiment` is the name of its experiment."""
APPLICATION = "ptuning"
"""What `ptuning serve` calls its application; one per cluster."""
PACKAGES = "ptuning-packages"
"""Namespace of the actors that keep a served package on the cluster."""
END = f"""
import ray
from ray import serve
serve.delete({APPLICATION!r})
for actor in ray.util.list_named_actors(all_namespaces=True):
    if actor["namespace"] == {PACKAGES!r}:
        ray.kill(ray.get_actor(**actor))
"""
"""The program that ends the application, and what keeps its package."""
PACKAGE = Path(__file__).parent.parent
DASHBOARD = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
"""They would beat the address that Ray's client is given (2.60, dashboard/utils.py)."""
STOPPED = 130
"""Exit code of a job that was stopped, as of a command that was interrupted."""
CONNECT, ANSWER = 10.0, 300.0
"""Seconds that a cluster has to accept a connection, and to answer."""
PATIENCE = 30
"""Attempts in a row to follow a log, a second apart."""


class ClusterError(RuntimeError):
    """The cluster does not answer, or did not do what it was asked to."""


@dataclass(frozen=True)
class Job:
    """What is sent to the cluster."""

    kind: Kind
    name: str
    """The experiment's: the name of the run, the same when it is resumed."""
    flags: tuple[str, ...]
    shipment: JobPackage
    installed: bool
    """Use the package that the nodes have; otherwise this one travels."""

    @property
    def entrypoint(self) -> str:
        experiment = [self.shipment.experiment_name] if self.shipment.experiment else []
        own = {"serve": ["--detach"], "doctor": ["--address", "auto"]}.get(self.kind, [])
        return shlex.join(
            ["python", "-m", "ptuning", self.kind, *experiment, *self.shipment.overrides, *own, *self.flags, "--json"]
        )

    @property
    def metadata(self) -> dict[str, str]:
        return {KIND: self.kind, "experiment": self.name}

    def describe(self) -> dict[str, Any]:
        """All of it, as `--dry-run` shows it. Sizes are in bytes."""
        package = {} if self.installed else {"ptuning/": sum(path.stat().st_size for path in _package_files())}
        return {
            "entrypoint": self.entrypoint,
            "metadata": self.metadata,
            "env": self.shipment.env,
            "resources": {"entrypoint_num_cpus": 0},
            "files": self.shipment.contents | package,
            "overrides": self.shipment.overrides,
            "notes": self.shipment.notes,
        }


class Cluster:
    """The Jobs API of one cluster.

    Raises:
        ClusterError: nobody answers there.
        UserError: the address or the token is wrong.
    """

    def __init__(self, address: str) -> None:
        for module in ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env.packaging"):
            logging.getLogger(f"ray.{module}").setLevel(logging.WARNING)  # they set their own levels when imported
        self.address = _checked(address)
        with self._explained(), _without(DASHBOARD):
            self._client = _Client(self.address)

    def submit(self, job: Job) -> str:
        """Send a job; returns its id.

        Raises:
            UserError: a job of this run is not over. Two would write into the same folder.
        """
        for other in self.jobs():
            same = (other.metadata or {}) == job.metadata and job.kind in ("train", "search")
            if same and not other.status.is_terminal():
                raise UserError(
                    f"{job.name}: job {other.submission_id} of this name is {other.status.value.lower()}; follow it with "
                    f"ptuning jobs logs {other.submission_id} --follow, or choose another name with name={job.name}-2"
                )
        with tempfile.TemporaryDirectory(prefix="ptuning-") as folder, self._explained():
            job.shipment.pack(Path(folder))
            environment: dict[str, Any] = {"working_dir": folder, "env_vars": job.shipment.env}
            if not job.installed:
                environment |= {"py_modules": [str(PACKAGE)], "excludes": ["__pycache__"]}
            return self._client.submit_job(
                entrypoint=job.entrypoint,
                submission_id=f"{job.name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}",
                runtime_env=environment,
                metadata=job.metadata,
            )

    def jobs(self) -> list[JobDetails]:
        """All jobs that were submitted to the cluster, the newest first."""
        with self._explained():
            known = [job for job in self._client.list_jobs() if job.submission_id]
        return sorted(known, key=lambda job: job.start_time or 0, reverse=True)

    def info(self, job: str) -> JobDetails:
        with self._explained(job):
            return self._client.get_job_info(job)

    def logs(self, job: str) -> str:
        with self._explained(job):
            return self._client.get_job_logs(job)

    def follow(self, job: str, log: Log) -> JobDetails:
        """Pass on what `log` has not got yet, as it grows, until the job is over; returns what became of it.

        A connection that breaks is made again: nothing is missed or told twice.
        """
        failures = 0
        while True:
            before = log.length
            try:
                with self._explained(job):
                    asyncio.run(self._tail(job, log))
            except ClusterError:
                failures = 0 if log.length > before else failures + 1
                if failures > PATIENCE:
                    raise
            details = self.info(job)
            if details.status.is_terminal():
                with suppress(ClusterError, UserError):  # the node with the log may be gone
                    log(self.logs(job)[log.length :])
                return details
            time.sleep(1)

    async def _tail(self, job: str, log: Log) -> None:
        seen = 0
        async for text in self._client.tail_job_logs(job):  # from the beginning
            seen += len(text)
            log(text[max(0, len(text) - max(0, seen - log.length)) :])

    def stop(self, job: str) -> bool:
        """Ask a job to end in order; False if it is over already. A served application is what is left of its job: it ends.

        Raises:
            ClusterError: the application could not be ended.
        """
        details = self.info(job)
        with self._explained(job):
            stopped = self._client.stop_job(job)
        if (details.metadata or {}).get(KIND) != "serve" or not details.status.is_terminal():
            return stopped
        with self._explained(job):
            # Needs Ray only, so it works whatever package the application was made with.
            command = shlex.join(["python", "-P", "-c", END])  # -P: whatever lies in the folder where Ray starts it
            ending = self._client.submit_job(entrypoint=command, metadata={KIND: "stop", "experiment": APPLICATION})
        if self.follow(ending, Log(lambda line: None)).status != JobStatus.SUCCEEDED:
            raise ClusterError(f"the application was not ended; see ptuning jobs logs {ending}")
        return True

    @contextmanager
    def _explained(self, job: str | None = None) -> Iterator[None]:
        """Turn what Ray's client raises into one sentence with the fix."""
        try:
            yield
        except AuthenticationError as error:
            if "Authentication required" in str(error):
                raise UserError(
                    f"{self.address}: asks for a token (401); set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH, a file with it"
                ) from None
            raise UserError(
                f"{self.address}: refuses the token (403); take the one that the cluster was started with, in "
                "RAY_AUTH_TOKEN_PATH or RAY_AUTH_TOKEN"
            ) from None
        except (requests.RequestException, aiohttp.ClientError, OSError) as error:
            raise ClusterError(
                f"{self.address}: nobody answers ({_reason(error)}); check the address, that the cluster is up, and the tunnel "
                "to its dashboard"
            ) from None
        except RuntimeError as error:
            if job and "404" in str(error):
                known = [each.submission_id for each in self.jobs() if each.submission_id]
                fix = suggest(job, known, "see ptuning jobs list")
                raise UserError(f"{job}: there is no such job on {self.address}; {fix}") from None
            raise ClusterError(f"{self.address}: {str(error).strip().splitlines()[-1]}") from None


class _Client(JobSubmissionClient):
    """With limits in time: Ray's own waits for ever."""

    def _do_request(self, method: str, endpoint: str, **details: Any) -> requests.Response:
        return super()._do_request(method, endpoint, timeout=(CONNECT, ANSWER), **details)


def exit_code(details: JobDetails) -> int:
    """The job's, as a shell would give it."""
    if details.status == JobStatus.SUCCEEDED:
        return 0
    if details.status == JobStatus.STOPPED:
        return STOPPED
    code = details.driver_exit_code
    if code is None:
        return 1  # it was never started
    return 128 - code if code < 0 else code or 1


def failure(details: JobDetails) -> str:
    """Why a job did not succeed, in one sentence; its log says more."""
    if details.status == JobStatus.STOPPED:
        return "was stopped"
    if details.driver_exit_code is not None:
        return f"failed with exit code {exit_code(details)}"
    lines = (details.message or "the cluster does not say why").strip().splitlines()
    return f"could not be started: {lines[-1].strip()}"


class Log:
    """A job's log, line by line. Its result, a JSON object in the last line, is kept and not shown."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.length = 0
        """Characters so far."""
        self._say = say
        self._rest = ""
        self._held: str | None = None

    def __call__(self, text: str) -> None:
        self.length += len(text)
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._line(line)

    def result(self) -> dict[str, Any] | None:
        """To be asked when the log has ended: the result, if it ended with one."""
        if self._rest:
            self._line(self._rest)
            self._rest = ""
        with suppress(ValueError):
            result: dict[str, Any] = json.loads(self._held or "")
            return result
        if self._held is not None:
            self._say(self._held)
        return None

    def _line(self, line: str) -> None:
        if self._held is not None:
            self._say(self._held)
        self._held = line if line.startswith("{") else None
        if self._held is None:
            self._say(line)


def _package_files() -> list[Path]:
    return [path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts]


def _checked(address: str) -> str:
    """The address as Ray's client wants it."""
    whole = address if "://" in address else f"http://{address}"
    parts = urlsplit(whole)
    try:
        good = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1)
    except ValueError:
        good = False
    if not good:
        raise UserError(f"--address: {address} is no address of a Ray dashboard; write http://HOST:8265")
    return whole.rstrip("/")


@contextmanager
def _without(names: tuple[str, ...]) -> Iterator[None]:
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ |= before


def _reason(error: BaseException) -> str:
    text = f"{error} {error.__context__}"  # Ray's own ConnectionError does not say why
    known = {
        "Connection refused": "connection refused",
        "not known": "unknown host",
        "name resolution": "unknown host",
        "timed out": "timed out",
        "CERTIFICATE": "its certificate is not trusted",
        "SSL": "it does not speak https",
    }
    return next((reason for words, reason in known.items() if words in text), type(error).__name__)
