"""One Ray Serve application: replicas of a service behind Serve's HTTP proxy.

Serve's defaults (2.60) are not suitable for production: unbounded queues, no timeouts, and headers by which clients can disable
the existing limits. So the replica enforces the limits (`http_request`, `engine`), and the settings here let all requests reach
it. `proxy` limits what untrusted input can do to Serve's proxy.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import FrameType
from typing import Any

import ray
from ray import serve
from ray.serve import context
from ray.serve.config import HTTPOptions, ProxyLocation

from ptuning import environment
from ptuning.cluster.connection import leave_ray, own_cluster, start_ray
from ptuning.cluster.failures import memory, ray_logs
from ptuning.cluster.jobs import APPLICATION, PACKAGES
from ptuning.cluster.local_paths import absolute
from ptuning.cluster.resources import await_resources, can_grow
from ptuning.config import Experiment
from ptuning.errors import TrackingError, UserError
from ptuning.redaction import logger
from ptuning.serving.auth import Scope, check_address, check_origins, is_loopback, read_keys
from ptuning.serving.deployment import application, gpus_per_replica
from ptuning.tracking.client import database, obeyed, tracking_uri
from ptuning.tracking.database import check_database
from ptuning.tuning.actor import start_tuning, stop_tuning
from ptuning.tuning.group import per_worker

log = logger(__name__)

FLUSH = 0.3
"""Seconds for the proxies to pass on the last bytes."""

_TAKEN = re.compile(r"Failed to bind to address '([^']+)'")

LOOK = 2.0
"""Seconds between looks at a replica's state, for the people who watch the command."""


class Server:
    """A server that runs: one Ray Serve application. Leave the `with` block or call `stop` to end it.

    Raises:
        UserError: the keys or the base are wrong, the address is open without keys, or the cluster lacks resources.
    """

    def __init__(
        self, experiment: Experiment, *, insecure: bool = False, say: Callable[[str], None] = lambda line: None
    ) -> None:
        self._experiment, keys = _prepared(experiment, insecure, say)
        environment.apply("proxy")  # for the processes of a cluster that is started here
        self._running = True
        self._started_here = start_ray(self._experiment)
        self._ours = APPLICATION not in serve.status().applications
        """False while what would be ended is another command's."""
        try:
            say("starting; a replica loads the base first")
            self.handle = _run(self._experiment, keys, say)
            _start_tuning(self._experiment, say)
        except BaseException:
            self._end()
            raise
        self._ours = True
        if not keys:
            say("without API keys: anyone who reaches this address may use the server")

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def __repr__(self) -> str:
        return f"Server({self.url!r}, {'running' if self._running else 'stopped'})"

    @property
    def url(self) -> str:
        """The base URL for OpenAI clients."""
        return _url(self._experiment)

    def stop(self) -> None:
        """Refuse new requests, answer those that have begun, then end the application and a cluster that was started for it."""
        if self._running:
            try:
                _drain(self.handle, self._experiment.serve.drain_s)
            finally:
                self._end()

    def _end(self) -> None:
        self._running = False
        if self._ours and not (self._started_here and own_cluster()):  # a cluster of its own ends as a whole
            with suppress(Exception):  # it never started, or the cluster was lost: the error is already reported
                serve.delete(APPLICATION)
            with suppress(Exception):
                stop_tuning(self._experiment)
        if self._started_here:
            leave_ray()


def run_server(experiment: Experiment, *, insecure: bool = False, say: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM, then drain.

    Raises:
        UserError: as `Server`.
    """
    with Server(experiment, insecure=insecure, say=say) as server:
        say(f"serving at {server.url}, stop with Ctrl-C")
        limits = experiment.serve
        from_zero = isinstance(limits.replicas, tuple) and not limits.replicas[0]
        _follow(_number(say) if from_zero else _served(server.handle, say))
        say("stopping")


def deploy(experiment: Experiment, *, insecure: bool, say: Callable[[str], None]) -> dict[str, Any]:
    """Deploy the application on a cluster, and return. It continues when this process and its job have ended.

    On loopback there is one proxy, on the head node; on other addresses there is one on every node with a replica.

    Raises:
        UserError: as in `run_server`, or there is no cluster: one that is started here would end with this process.
    """
    experiment, keys = _prepared(experiment, insecure, say)
    if not (experiment.compute.address or os.environ.get("RAY_ADDRESS")):
        raise UserError("compute.address: there is no cluster that could keep serving; set it, or serve without --detach")
    start_ray(experiment)
    try:
        keep = _keep_package()
        state = _run(experiment, keys, say).state.remote().result(timeout_s=60)
        _start_tuning(experiment, say)
        keep()
    finally:
        ray.shutdown()
    for line in _news({}, state):
        say(line)
    return {"url": _url(experiment), "application": APPLICATION, "served": sorted(state["served"])}


def _prepared(experiment: Experiment, insecure: bool, say: Callable[[str], None]) -> tuple[Experiment, dict[str, Scope]]:
    if note := obeyed(experiment):
        say(note)
    experiment = absolute(experiment)
    try:  # a server can start without its registry: with the set that it served last
        path = database(tracking_uri(experiment))
        if path and path.exists():
            check_database(path)
    except TrackingError as error:
        say(f"warning: {error}")
    keys = read_keys(experiment.serve.keys)
    check_address(experiment.serve.host, keys, insecure)
    check_origins(experiment.serve.cors_origins, keys)
    return experiment, keys


def _run(experiment: Experiment, keys: Mapping[str, Scope], say: Callable[[str], None]) -> Any:
    """Start the application on the cluster that this process is connected to, or replace it, and wait until it is ready.

    One that cannot start takes nothing away: what was served before goes on if there was room for both.
    """
    _await_resources(experiment, say)
    _check_address(experiment.serve.host, experiment.serve.port)
    logging.getLogger("ray.serve").addFilter(lambda record: record.levelno >= logging.WARNING)  # its level is set anew
    limits = experiment.serve
    try:
        serve.start(
            proxy_location=ProxyLocation.HeadOnly if is_loopback(limits.host) else ProxyLocation.EveryNode,
            http_options=HTTPOptions(host=limits.host, port=limits.port, request_timeout_s=limits.deadline_s + 30),
        )
        return serve.run(application(experiment, keys, _surge(experiment)), name=APPLICATION, route_prefix="/")
    except Exception as error:  # Serve raises many types: of the replica, of a proxy, of its controller, of a timeout
        raise UserError(f"the server did not start: {_reason(error)}; Ray's own logs are in {ray_logs()}") from None


def _start_tuning(experiment: Experiment, say: Callable[[str], None]) -> None:
    """Let the tuning service go on, with the settings of now."""
    if experiment.tuning.workers:
        start_tuning(experiment)
        say(f"jobs train in {experiment.tuning.slots} slots")
    else:
        stop_tuning(experiment)


def _url(experiment: Experiment) -> str:
    return f"http://{experiment.serve.host}:{experiment.serve.port}/v1"


def _drain(handle: Any, most_s: float) -> None:
    """Make every replica refuse new requests with 503 and complete those in flight.

    Deleting the application also completes them, but then Serve's proxies answer 404 (2.60), which clients treat as their own
    error and do not retry.
    """
    until = time.monotonic() + most_s
    while _replicas() and time.monotonic() < until:
        try:
            left = handle.broadcast("drain").results(timeout_s=5)
        except Exception as error:  # a replica that is replaced, or a controller that starts again
            log.debug("a replica was not reached: %s", error)
        else:
            if not any(left):
                break
        time.sleep(0.05)
    time.sleep(FLUSH)


class _Keeper:
    """Does nothing, and lives as long as the application.

    Ray 2.60 keeps the files of a job while the job, or an actor that may outlive it, uses them. Between the end of the only
    replica and the start of the next one there would be none: the files go, and only nodes that have them unpacked can go on.
    """


def _keep_package() -> Callable[[], None]:
    """Keep the files of this job for replicas to come; what is returned lets go of those of earlier deployments."""
    before = [actor for actor in ray.util.list_named_actors(all_namespaces=True) if actor["namespace"] == PACKAGES]
    name = uuid.uuid4().hex
    ray.remote(num_cpus=0)(_Keeper).options(name=name, namespace=PACKAGES, lifetime="detached", max_restarts=-1).remote()

    def let_go() -> None:
        for each in before:
            with suppress(ValueError):  # it has ended meanwhile
                ray.kill(ray.get_actor(**each))

    return let_go


def _follow(look: Callable[[], None]) -> None:
    """Look again and again until a signal."""
    stopped = threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        stopped.set()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        while not stopped.is_set():
            look()
            stopped.wait(LOOK)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _served(handle: Any, say: Callable[[str], None]) -> Callable[[], None]:
    """Says what is served and refused whenever it changes."""
    known: dict[str, Any] = {}

    def look() -> None:
        nonlocal known
        try:
            state = handle.state.remote().result(timeout_s=10)
        except Exception as error:  # a replica that is replaced at this moment; Serve sees to it
            log.debug("no replica told its state: %s", error)
            return
        for line in _news(known, state):
            say(line)
        known = state

    return look


def _number(say: Callable[[str], None]) -> Callable[[], None]:
    """Says how many replicas there are whenever it changes. To ask one of them would keep it."""
    known = -1

    def look() -> None:
        nonlocal known
        if (many := _replicas()) != known:
            say(f"{many} replica{'s' if many != 1 else ''}" + ("" if many else ", the next request starts one"))
        known = many

    return look


def _replicas() -> int:
    """How many replicas answer."""
    there = serve.status().applications.get(APPLICATION)
    states = [each.replica_states for each in there.deployments.values()] if there else []
    return sum(many for each in states for state, many in each.items() if state == "RUNNING")


def _news(known: dict[str, Any], state: dict[str, Any]) -> list[str]:
    before, refused = known.get("served", {}), known.get("refused", {})
    lines = [f"{name}: {who}" for name, who in state["served"].items() if before.get(name) != who]
    lines += [f"{name}: is no longer served" for name in before if name not in state["served"]]
    return lines + [f"refused: {why}" for who, why in state["refused"].items() if refused.get(who) != why]


def _check_address(host: str, port: int) -> None:
    """A Serve that runs on the cluster keeps its address: it would ignore another one, with a line in a log (2.60)."""
    client = context._get_global_client(raise_if_no_controller_running=False)
    there = client.http_config if client else None
    if there is not None and (there.host, there.port) != (host, port):
        raise UserError(
            f"serve.port: Ray Serve already runs on this cluster and listens at {there.host}:{there.port}; set serve.host and "
            "serve.port to that, or end it on the cluster with: serve shutdown"
        )


def _await_resources(experiment: Experiment, say: Callable[[str], None]) -> None:
    """Serve would wait for them for ever, without a word."""
    limits = experiment.serve
    least = max(1, limits.replicas if isinstance(limits.replicas, int) else limits.replicas[0])  # the first one starts at once
    each = {"CPU": limits.cpus_per_replica, "GPU": gpus_per_replica(limits)}
    fixes = {kind: f"lower serve.replicas or serve.{kind.lower()}s_per_replica" for kind in each}
    await_resources(least, each, f"serve.replicas: {least} replicas", fixes, experiment.compute.wait_s, say)
    workers, jobs, have = experiment.tuning.workers, per_worker(experiment), ray.cluster_resources()
    for kind, amount in each.items() if workers and not can_grow() else ():
        if least * amount + workers * jobs[kind] > have.get(kind, 0):
            raise UserError(
                f"tuning.workers: {workers} workers with {jobs[kind]:g} {kind} each beside {least} replicas need "
                f"{least * amount + workers * jobs[kind]:g}, the cluster has {have.get(kind, 0):g}; lower tuning.workers, "
                f"compute.{kind.lower()}s_per_worker or serve.{kind.lower()}s_per_replica"
            )


def _surge(experiment: Experiment) -> int:
    """New replicas begin before old ones end if there is room for one more; without room, Serve (2.60) would wait for ever."""
    limits, free = experiment.serve, ray.available_resources()
    gpus = gpus_per_replica(limits)
    fits = limits.cpus_per_replica <= free.get("CPU", 0) and gpus <= free.get("GPU", 0)
    return 100 if fits else 0


def _reason(error: Exception) -> str:
    """The last line that a person wrote: by a replica, which Serve (2.60) keeps beside its error, or by Serve."""
    told: list[str] = []
    with suppress(Exception):  # the controller may be what failed
        application = serve.status().applications.get(APPLICATION)
        told = [deployment.message for deployment in application.deployments.values()] if application else []
    text = "\n".join([str(error) or type(error).__name__, *told])
    if found := _TAKEN.search(text):
        return f"serve.port: {found[1]} is taken by another program; end it, or choose another port"
    lines = [line.strip() for line in text.splitlines() if "Error: " in line]
    return memory(text) or (lines[-1].partition("Error: ")[2] if lines else text.strip().splitlines()[0])
