"""Jobs on a Ray cluster: submitting, following, listing and stopping them over HTTP. The only module that uses Ray's Jobs API.

A job runs `python -m ptuning train FILE ...`, the same command as on a local machine, in a working directory with the
experiment and the files that it names (`job_package`). The package itself is uploaded, too, unless the nodes have it installed:
as a separate module, which Ray caches by its hash. So it is uploaded once, and the cluster runs the code of the submitting
machine.

The driver requests no CPU of the cluster. Even 0.01 CPU would make a node one whole CPU short, and workers that need all CPUs
would wait for ever. Ray then starts the driver on the head node.
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

from ptuning.cluster.job_files import JobPackage
from ptuning.cluster.job_package import Kind
from ptuning.errors import UserError, suggest

KIND = "ptuning"
"""Metadata key of a job: its command. `experiment` is the name of its experiment."""
APPLICATION = "ptuning"
"""Name of the application of `ptuning serve`; one per cluster."""
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
"""The program that ends the application, and the actors that keep its package."""
PACKAGE = Path(__file__).parent.parent
DASHBOARD = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
"""They would override the address that Ray's client is given (2.60, dashboard/utils.py)."""
STOPPED = 130
"""Exit code of a job that was stopped, as of a command that was interrupted."""
CONNECT, ANSWER = 10.0, 300.0
"""Timeouts in seconds for connecting to a cluster, and for its response."""
PATIENCE = 30
"""Consecutive attempts to follow a log, one second apart."""


class ClusterError(RuntimeError):
    """The cluster does not respond, or a request to it failed."""


@dataclass(frozen=True)
class Job:
    """A job to submit."""

    kind: Kind
    name: str
    """The name of the experiment and its run; the same when the run is resumed."""
    flags: tuple[str, ...]
    shipment: JobPackage
    installed: bool
    """Use the package that is installed on the nodes; otherwise this one is uploaded."""

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
        """The complete job, as shown by `--dry-run`. Sizes are in bytes."""
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
        ClusterError: there is no response.
        UserError: the address or the token is wrong.
    """

    def __init__(self, address: str) -> None:
        for module in ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env.packaging"):
            logging.getLogger(f"ray.{module}").setLevel(logging.WARNING)  # they set their own levels when imported
        self.address = _checked(address)
        with self._explained(), _without(DASHBOARD):
            self._client = _Client(self.address)

    def submit(self, job: Job) -> str:
        """Submit a job; returns its id.

        Raises:
            UserError: a job of this run has not finished. Two jobs would write into the same folder.
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
        """Pass new log text to `log` until the job has finished; returns the job's details.

        A broken connection is reopened: no text is lost or repeated.
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
                with suppress(ClusterError, UserError):  # the node with the log may be lost
                    log(self.logs(job)[log.length :])
                return details
            time.sleep(1)

    async def _tail(self, job: str, log: Log) -> None:
        seen = 0
        async for text in self._client.tail_job_logs(job):  # from the beginning
            seen += len(text)
            log(text[max(0, len(text) - max(0, seen - log.length)) :])

    def stop(self, job: str) -> bool:
        """Ask a job to stop cleanly; False if it has already finished. If the job has deployed an application, that is ended.

        Raises:
            ClusterError: the application could not be ended.
        """
        details = self.info(job)
        with self._explained(job):
            stopped = self._client.stop_job(job)
        if (details.metadata or {}).get(KIND) != "serve" or not details.status.is_terminal():
            return stopped
        with self._explained(job):
            # Needs only Ray, so it works with any version of the package that the application was deployed with.
            command = shlex.join(["python", "-P", "-c", END])  # -P: do not import from the folder in which Ray starts it
            ending = self._client.submit_job(entrypoint=command, metadata={KIND: "stop", "experiment": APPLICATION})
        if self.follow(ending, Log(lambda line: None)).status != JobStatus.SUCCEEDED:
            raise ClusterError(f"the application was not ended; see ptuning jobs logs {ending}")
        return True

    @contextmanager
    def _explained(self, job: str | None = None) -> Iterator[None]:
        """Convert an error of Ray's client into one sentence with the fix."""
        try:
            yield
        except AuthenticationError as error:
            if "Authentication required" in str(error):
                raise UserError(
                    f"{self.address}: requires a token (401); set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to its file"
                ) from None
            raise UserError(
                f"{self.address}: refuses the token (403); use the one that the cluster was started with, in "
                "RAY_AUTH_TOKEN_PATH or RAY_AUTH_TOKEN"
            ) from None
        except (requests.RequestException, aiohttp.ClientError, OSError) as error:
            raise ClusterError(
                f"{self.address}: no response ({_reason(error)}); check the address, that the cluster is up, and the tunnel "
                "to its dashboard"
            ) from None
        except RuntimeError as error:
            if job and "404" in str(error):
                known = [each.submission_id for each in self.jobs() if each.submission_id]
                fix = suggest(job, known, "see ptuning jobs list")
                raise UserError(f"{job}: there is no such job on {self.address}; {fix}") from None
            raise ClusterError(f"{self.address}: {str(error).strip().splitlines()[-1]}") from None


class _Client(JobSubmissionClient):
    """A client with timeouts: Ray's own waits for ever."""

    def _do_request(self, method: str, endpoint: str, **details: Any) -> requests.Response:
        return super()._do_request(method, endpoint, timeout=(CONNECT, ANSWER), **details)


def exit_code(details: JobDetails) -> int:
    """The exit code of the job, as in a shell."""
    if details.status == JobStatus.SUCCEEDED:
        return 0
    if details.status == JobStatus.STOPPED:
        return STOPPED
    code = details.driver_exit_code
    if code is None:
        return 1  # it was never started
    return 128 - code if code < 0 else code or 1


def failure(details: JobDetails) -> str:
    """The reason why a job did not succeed, in one sentence; its log has details."""
    if details.status == JobStatus.STOPPED:
        return "was stopped"
    if details.driver_exit_code is not None:
        return f"failed with exit code {exit_code(details)}"
    lines = (details.message or "the cluster gives no reason").strip().splitlines()
    return f"could not be started: {lines[-1].strip()}"


class Log:
    """A job's log, line by line. Its result, a JSON object in the last line, is stored and not shown."""

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
        """The result, if the log ended with one. Only valid at the end of the log."""
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
    """The address in the form that Ray's client expects."""
    whole = address if "://" in address else f"http://{address}"
    parts = urlsplit(whole)
    try:
        good = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1)
    except ValueError:
        good = False
    if not good:
        raise UserError(f"--address: {address} is not the address of a Ray dashboard; write http://HOST:8265")
    return whole.rstrip("/")


@contextmanager
def _without(names: tuple[str, ...]) -> Iterator[None]:
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ |= before


def _reason(error: BaseException) -> str:
    text = f"{error} {error.__context__}"  # Ray's own ConnectionError gives no reason
    known = {
        "Connection refused": "connection refused",
        "not known": "unknown host",
        "name resolution": "unknown host",
        "timed out": "timed out",
        "CERTIFICATE": "its certificate is not trusted",
        "SSL": "it does not speak https",
    }
    return next((reason for words, reason in known.items() if words in text), type(error).__name__)
