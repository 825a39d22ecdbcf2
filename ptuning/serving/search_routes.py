"""The routes of searches: what runs in the server's storage, and instructions to it. The drivers are elsewhere: what is told
goes through the search's folder (`searching.interventions`)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from ptuning import storage
from ptuning.errors import UserError
from ptuning.redaction import placeless
from ptuning.searching.interventions import SearchFolder, instruct, searches
from ptuning.searching.trial_store import Intervention, TrialRecord, TrialStore
from ptuning.serving.auth import Caller
from ptuning.serving.http_request import ApiError, authorize, read_body, refuse
from ptuning.serving.search_objects import (
    SearchDetails,
    SearchInstruction,
    SearchIntervention,
    SearchList,
    SearchSummary,
    SearchTrial,
)
from ptuning.serving.service import Service
from ptuning.settings.fields import NAME

UNKNOWN = "there is no such search in the storage of this server; GET /v1/admin/searches lists them"
UNREADABLE = "the storage does not respond, nothing was changed; ask again in a moment"

Found = TypeVar("Found")


class SearchRoutes:
    """The routes of one replica."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._folder = service.runs

    async def searches(self, request: Request) -> Response:
        """The searches in the storage of this server."""
        authorize(request, self._service.keys, "admin")
        found = await _read(lambda: [_summary(name, search, search.trials()) for name, search in searches(self._folder)])
        return JSONResponse(SearchList(data=found).model_dump())

    async def search(self, name: str, request: Request) -> Response:
        """Trials of a search with their curves, and what people told it."""
        authorize(request, self._service.keys, "admin")
        return JSONResponse((await _read(lambda: self._details(name))).model_dump())

    async def tell(self, name: str, request: Request) -> Response:
        """Stop a trial, clone one with other settings, or add trials. The search's driver takes it within some seconds: its
        answer is in the search's `interventions`."""
        try:
            caller = authorize(request, self._service.keys, "admin")
            body = await read_body(request, SearchInstruction, self._service.limits)
            return JSONResponse((await _read(lambda: self._tell(name, body, caller))).model_dump())
        except Exception as error:  # any error must become a response in OpenAI's format
            return await refuse(request, error, 4 * self._service.limits.max_body_kb * 1024)

    def _open(self, name: str) -> SearchFolder:
        if not NAME.fullmatch(name):  # it becomes a part of a path
            raise ApiError(404, UNKNOWN, "invalid_request_error", code="search_not_found")
        try:
            return SearchFolder(storage.join(self._folder, name))
        except storage.StorageError:
            raise
        except UserError:
            raise ApiError(404, UNKNOWN, "invalid_request_error", code="search_not_found") from None

    def _details(self, name: str) -> SearchDetails:
        search = self._open(name)
        store = search.trials()
        told = [*store.interventions, *search.pending()]
        seen = {each.id: each for each in reversed(told)}  # one may be in both for a moment: the ledger's counts
        metric = search.experiment.metric
        return SearchDetails(
            **_summary(name, search, store).model_dump(),
            data=[_trial(entry, metric) for entry in store.entries.values()],
            interventions=[_intervention(each) for each in sorted(seen.values(), key=lambda each: each.at)],
        )

    def _tell(self, name: str, body: SearchInstruction, caller: Caller) -> SearchIntervention:
        search = self._open(name)
        try:
            told = instruct(
                body.action,
                trial=body.trial,
                changes=body.changes,
                warm=body.warm,
                more=body.more,
                by=f"key {caller.owner[:8]}",
            )
            search.tell(told)
        except storage.StorageError:
            raise
        except UserError as error:
            raise ApiError(400, _public(str(error)), "invalid_request_error") from None
        return _intervention(told)


async def _read(work: Callable[[], Found]) -> Found:
    try:
        return await asyncio.to_thread(work)
    except (storage.StorageError, OSError):
        raise ApiError(503, UNREADABLE, "server_error", retry_after="5") from None


def _public(text: str) -> str:
    return placeless(text).replace("--warm", "warm")


def _summary(name: str, search: SearchFolder, store: TrialStore) -> SearchSummary:
    metric = search.experiment.metric
    sign = -1 if metric == "loss" else 1
    entries = list(store.entries.values())
    reached = [(sign * value, entry.run) for entry in entries for _, value in _curve(entry, metric)]
    best = max(reached, default=None, key=lambda each: each[0])
    status = search.status
    if status == "running" and not search.driven:
        status = "interrupted"
    return SearchSummary(
        name=name,
        status=status,  # type: ignore[arg-type]
        metric=metric,
        trials=len(entries),
        ended=sum(entry.status != "running" for entry in entries),
        best=sign * best[0] if best else None,
        best_trial=best[1] if best else None,
    )


def _curve(entry: TrialRecord, metric: str) -> list[tuple[int, float]]:
    return [(each["step"], each["values"][metric]) for each in entry.results if metric in each["values"]]


def _trial(entry: TrialRecord, metric: str) -> SearchTrial:
    return SearchTrial(
        run=entry.run,
        status=entry.status,
        finalist=entry.finalist,
        step=entry.step,
        settings=entry.values,
        origin=entry.origin,
        curve=_curve(entry, metric),
        message=placeless(entry.message) if entry.message else None,
    )


def _intervention(told: Intervention) -> SearchIntervention:
    return SearchIntervention(
        id=told.id,
        action=told.action,
        by=told.by,
        created_at=int(told.at),
        trial=told.trial,
        changes=told.changes,
        warm=told.warm,
        more=told.more,
        taken=told.taken,
        answer=_public(told.answer),
    )
