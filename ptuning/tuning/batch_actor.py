"""The actor that runs the batches of a storage folder: one detached process per cluster, which Ray starts again when it dies.

It asks the replicas through Ray Serve, not through HTTP. It ends when there has been nothing to do for a while; the next batch,
and a server that starts and finds open ones, start it.
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import ray
from pydantic_core import from_json, to_json
from ray import serve

from ptuning.cluster.jobs import APPLICATION
from ptuning.redaction import logger
from ptuning.tuning.actor_name import NAMESPACE
from ptuning.tuning.batch_runner import Answered, BatchRunner, Unreachable
from ptuning.tuning.batch_store import Endpoint

log = logger(__name__)

IDLE_S = 30.0
ATTEMPTS = 5


class ServeReplicas:
    """The replicas of the application on this cluster. `batch_runner.Replicas`."""

    def __init__(self) -> None:
        self._handle: Any = None

    async def unknown(self, models: Sequence[str]) -> list[str]:
        return list(await self._call("unknown_models", list(models)))

    async def answer(self, endpoint: Endpoint, body: dict[str, Any]) -> Answered:
        status, request_id, content = await self._call("answer_line", endpoint, to_json(body))
        return Answered(status, request_id, from_json(content))

    async def _call(self, method: str, *arguments: Any) -> Any:
        try:
            if self._handle is None:
                self._handle = await asyncio.to_thread(serve.get_app_handle, APPLICATION)
            called = getattr(self._handle, method)
            # Not `remote`: there a replica stands still until its caller has taken the answer, so that one runner that hangs
            # would hang the replicas for all clients (Ray 2.60).
            async with called.choose_replica() as replica:
                return await called.dispatch(replica, *arguments)
        except Exception as error:  # Serve raises many types: of a replica that was killed, of an application that is not there
            self._handle = None
            raise Unreachable(type(error).__name__) from error


class BatchActor:
    """See the module."""

    def __init__(self, root: str, places: int) -> None:
        self._root = root
        self._places = places
        self._runner: BatchRunner | None = None
        self._ended = False
        self._loop = asyncio.new_event_loop()
        self._me = ray.get_runtime_context().current_actor
        threading.Thread(target=self._live, name="batches", daemon=True).start()

    def wake(self) -> bool:
        """There may be new batches, or cancellations. False: this process is ending."""
        if self._runner is not None and not self._ended:
            self._loop.call_soon_threadsafe(self._runner.wake)
        return not self._ended

    def _live(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._run())
        self._ended = True
        log.info("there are no batches: their runner ends")
        ray.kill(self._me, no_restart=True)

    async def _run(self) -> None:
        while True:
            self._runner = BatchRunner(self._root, ServeReplicas(), self._places)
            try:
                await self._runner.run(IDLE_S)
                return
            except Exception:  # the storage does not answer, for example
                log.exception("the batches are looked at again")
                await asyncio.sleep(5)


def runner_name(root: str) -> str:
    """The name of the actor for a folder `<storage>/tuning`."""
    return f"batches-{hashlib.sha256(root.encode()).hexdigest()[:16]}"


async def wake(root: str, places: int) -> None:
    """Tell the runner of a folder that there is something new. It is started if it does not run. `places`: lines that it asks
    at once."""
    actor: Any = ray.remote(num_cpus=0, max_restarts=-1)(BatchActor).options(  # its type knows the class only
        name=runner_name(root), namespace=NAMESPACE, lifetime="detached", get_if_exists=True
    )
    for _ in range(ATTEMPTS):
        with suppress(ray.exceptions.RayActorError):  # it has just ended
            if await actor.remote(root, places).wake.remote():
                return
        await asyncio.sleep(0.5)
    raise Unreachable("the runner of batches does not start")
