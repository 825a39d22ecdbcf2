"""The jobs of the actor that owns them, as a replica asks about them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray.exceptions import RayActorError

from ptuning.tuning.actor_name import NAMESPACE
from ptuning.tuning.answers import STARTING, Answer

ANSWERED_S = 30.0
"""Seconds in which the actor must answer."""
SILENT = "the tuning service does not respond; ask again in a moment"


class RemoteJobs:
    """`AskedJobs` by the actor of a name, which is a `JobAnswers`. It may be starting, or hang."""

    def __init__(self, name: str) -> None:
        self._name = name

    async def create_job(self, owner: str, admin: bool, body: Mapping[str, Any]) -> Answer:
        return await self._ask(lambda actor: actor.create_job.remote(owner, admin, body))

    async def list_jobs(
        self, owner: str | None, after: str | None, limit: int, metadata: Mapping[str, str] | None, none: bool
    ) -> Answer:
        return await self._ask(lambda actor: actor.list_jobs.remote(owner, after, limit, metadata, none))

    async def get_job(self, owner: str | None, job: str) -> Answer:
        return await self._ask(lambda actor: actor.get_job.remote(owner, job))

    async def cancel_job(self, owner: str | None, job: str) -> Answer:
        return await self._ask(lambda actor: actor.cancel_job.remote(owner, job))

    async def pause_job(self, owner: str | None, job: str) -> Answer:
        return await self._ask(lambda actor: actor.pause_job.remote(owner, job))

    async def resume_job(self, owner: str | None, job: str) -> Answer:
        return await self._ask(lambda actor: actor.resume_job.remote(owner, job))

    async def events_of(self, owner: str | None, job: str, after: str | None, limit: int) -> Answer:
        return await self._ask(lambda actor: actor.events_of.remote(owner, job, after, limit))

    async def checkpoints_of(self, owner: str | None, job: str, after: str | None, limit: int) -> Answer:
        return await self._ask(lambda actor: actor.checkpoints_of.remote(owner, job, after, limit))

    async def _ask(self, call: Callable[[Any], Any]) -> Answer:
        try:
            actor = await asyncio.to_thread(ray.get_actor, self._name, NAMESPACE)
            answer: Answer = await asyncio.wait_for(call(actor), ANSWERED_S)
        except TimeoutError:
            return 503, {"message": SILENT}
        except (ValueError, RayActorError):  # ValueError: there is no actor of this name yet
            return 503, {"message": STARTING}
        return answer
