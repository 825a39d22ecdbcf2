"""What is served, health and metrics."""

from __future__ import annotations

import asyncio

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from ptuning.errors import UserError
from ptuning.redaction import logger
from ptuning.serving.answers import Model, Models
from ptuning.serving.http_request import ApiError, as_api_error, authorize, request_id
from ptuning.serving.replies import json_response
from ptuning.serving.served_models import Served, UnknownModel
from ptuning.serving.service import Service

log = logger(__name__)


class Status:
    """The routes of one replica that ask for no answer."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def models(self, request: Request) -> Response:
        authorize(request, self._service.keys, "inference")
        names = self._service.models.names
        return json_response(Models(data=[self._model(name, served) for name, served in names.items()]))

    async def model(self, name: str, request: Request) -> Response:
        authorize(request, self._service.keys, "inference")
        try:
            return json_response(self._model(name, self._service.models.find(name)))
        except UnknownModel as error:
            return as_api_error(error).response()

    def _model(self, name: str, served: Served) -> Model:
        card = served.card
        return Model(
            id=name,
            created=served.created,
            owned_by="ptuning",
            max_model_len=self._service.engine.longest - served.length,
            soft_prompt=served.id if served.handle else None,
            content_hash=served.content_hash,
            length=served.length or None,
            labels=list(served.labels) or None,
            template=("chat" if card.template.is_chat else card.template.input) if card and card.template else None,
            metrics=card.metrics if card else None,
        )

    async def reload(self, request: Request) -> Response:
        """Check the registry now; returns the served and the refused versions."""
        authorize(request, self._service.keys, "admin")
        try:
            changed = await asyncio.to_thread(self._service.models.sync)
        except UserError as error:
            log.warning("request %s: the registry does not respond, the served versions stay: %s", request_id(), error)
            message = "the registry does not respond, the served versions stay; see the server's log"
            return ApiError(503, message, "server_error", retry_after="5").response()
        models = self._service.models
        return JSONResponse({"changed": changed, "served": sorted(models.names), "refused": dict(models.refused)})

    async def metrics(self, request: Request) -> Response:
        authorize(request, self._service.keys, "admin")
        return Response(self._service.metrics.text(), media_type="text/plain; version=0.0.4")

    async def livez(self) -> Response:
        return JSONResponse({"alive": self._service.alive}, 200 if self._service.alive else 503)

    async def readyz(self) -> Response:
        """Ready: the base is loaded, a test generation has succeeded, and the engine is running."""
        service = self._service
        ready = service.ready and service.alive and not service.draining
        known = {"ready": ready, "soft_prompts": service.engine.residents, "refused": len(service.models.refused)}
        return JSONResponse(known, 200 if ready else 503)
