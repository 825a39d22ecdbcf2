"""The routes of administrators: what is known of a soft prompt, and its promotion."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Annotated, Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse
from pydantic import Field

from ptuning.errors import TrackingError
from ptuning.model.soft_prompt import public_base
from ptuning.redaction import placeless
from ptuning.registry import gate
from ptuning.registry.inspection import inspect_version
from ptuning.registry.promotions import PromotionLog
from ptuning.registry.registry import RegistryError, parse_reference
from ptuning.serving.http_request import ApiError, authorize, read_body, refuse
from ptuning.serving.protocol import Name, Shape
from ptuning.serving.service import Service


class PromoteRequest(Shape):
    model: Name
    """The version, name:3."""
    force: bool = False
    """Promote it even if it does not pass the checks; a tag records this."""


class RollbackRequest(Shape):
    model: Name
    """The name."""


class Moved(Shape):
    """A champion."""

    champion: str
    """The version that is served under the name now."""
    findings: Annotated[list[str], Field(max_length=100)] = []
    """What `force` overrode."""


class Lineage(Shape):
    run_id: str
    data: dict[str, str]
    """Fingerprints of the splits."""
    parent: str | None
    """Content hash of the soft prompt that it began with."""
    parent_versions: list[str]


class Promotion(Shape):
    kind: str
    by: str
    time_ms: int


class Inspected(Shape):
    """What is known of a version, as `ptuning prompts show` says it."""

    name: str
    version: int
    aliases: list[str]
    state: str | None
    forced: str | None
    """What a forced promotion overrode."""
    card: dict[str, Any]
    """Its public part."""
    lineage: Lineage
    promotions: list[Promotion]
    norms: dict[str, float]
    nearest_words: list[list[tuple[str, float]]] | None
    """For each virtual token the words with the highest cosine."""
    missing: str | None
    """Why there are no nearest words."""


class AdminRoutes:
    """The routes of one replica. `moved`: called after a champion was moved, so that the replicas look at once."""

    def __init__(self, service: Service, moved: Callable[[], Awaitable[Any]]) -> None:
        self._service = service
        self._registry = service.models.registry
        self._moved = moved

    async def prompt(self, name: str, request: Request) -> Response:
        """Card, lineage, promotions and nearest words of a version."""
        authorize(request, self._service.keys, "admin")
        try:
            return JSONResponse(await asyncio.to_thread(self._inspected, name))
        except RegistryError as error:
            raise ApiError(404, str(error), "invalid_request_error", "model", code="model_not_found") from None

    async def promote(self, request: Request) -> Response:
        """Make a version champion if it passes the checks of `ptuning prompts promote`."""
        return await self._move(request, PromoteRequest, self._promote)

    async def rollback(self, request: Request) -> Response:
        """Make the previous champion of a name champion again."""
        return await self._move(request, RollbackRequest, self._rollback)

    async def _move(self, request: Request, shape: type[Any], move: Callable[[Any], Moved]) -> Response:
        try:
            authorize(request, self._service.keys, "admin")
            body = await read_body(request, shape, self._service.limits)
            try:
                moved = await asyncio.to_thread(move, body)
            except TrackingError:
                message = "the registry does not respond, nothing was changed; ask again in a moment"
                raise ApiError(503, message, "server_error", retry_after="5") from None
            await self._moved()
            return JSONResponse(moved.model_dump())
        except Exception as error:  # any error must become a response in OpenAI's format
            return await refuse(request, error, 4 * self._service.limits.max_body_kb * 1024)

    def _promote(self, body: PromoteRequest) -> Moved:
        reference = parse_reference(body.model)
        if reference.version is None:
            raise RegistryError(f"model: {reference} is not a single version; write {reference.name}:3")
        self._service.models.find(str(reference))  # checked and tested on the base of this server
        try:
            done = gate.promote(self._registry, reference, force=body.force, tested=True)
        except gate.GateError as error:
            raise gate.GateError(str(error).replace("use --force to", "send force to")) from None
        return Moved(champion=str(done.version), findings=done.findings)

    def _rollback(self, body: RollbackRequest) -> Moved:
        name = parse_reference(body.model).name
        state = PromotionLog(self._registry, name).rollback()
        return Moved(champion=f"{name}:{state.champion}")

    def _inspected(self, name: str) -> dict[str, Any]:
        found = inspect_version(self._registry, name, str(self._service.base.folder))
        public = replace(found, card=found.card.public())
        told = public.as_json()
        told["card"]["base"] = public_base(found.card.base)
        told["missing"] = placeless(found.missing) if found.missing else None
        for move in told["promotions"]:
            move["by"] = str(move["by"]).partition("@")[0]  # without the name of a machine
        return told
