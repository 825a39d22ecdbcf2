"""Runs batches: validates their input, asks replicas line by line, writes what is finished, and the files at the end.

A part of the output is written before its lines count. So a runner that takes over knows which lines are finished: it repeats
at most the lines that were being answered, and no line is in the output twice. Batches share a number of places fairly.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import IO, Any, Literal, Protocol

from ptuning.errors import UserError
from ptuning.redaction import logger
from ptuning.tuning.batch_lines import MOST_ERRORS, Line, Survey, lines, survey
from ptuning.tuning.batch_store import BatchError, BatchRecord, BatchStore, Endpoint, LineResult, Spent
from ptuning.tuning.files import FileStore, UnknownFile
from ptuning.tuning.ids import new_id

log = logger(__name__)

ACTIVE = 16
"""Batches that run at once."""
POLL_S = 1.0
"""Seconds between two looks at new batches, cancellations and expiry."""
PART, PART_S = 64, 1.0
"""Finished lines that are written at once, and the seconds after which fewer are."""
TRIES = 3
"""Attempts at a line that fails for a reason that is not its own."""
PAUSE_S, LONGEST_PAUSE_S = 0.2, 5.0
"""Seconds before a line is tried again that no replica has taken; they double up to the second number."""

Outcome = Literal["completed", "expired", "cancelled"]
LEFT: Mapping[Outcome, tuple[str, str]] = {
    "expired": ("batch_expired", "this line was not answered before the batch expired"),
    "cancelled": ("batch_cancelled", "this line was not answered before the batch was cancelled"),
}


class Unreachable(RuntimeError):
    """No replica takes lines at the moment."""


@dataclass(frozen=True)
class Answered:
    """The answer to a line, as HTTP would give it."""

    status: int
    request_id: str
    body: dict[str, Any]


class Replicas(Protocol):
    """The server, as a runner sees it. Both raise `Unreachable`."""

    async def unknown(self, models: Sequence[str]) -> list[str]:
        """The models among these that are not served."""

    async def answer(self, endpoint: Endpoint, body: dict[str, Any]) -> Answered:
        """The answer to a request, when no client waits."""


class Progress:
    """The finished lines of a batch, and those that are not written yet."""

    def __init__(self, store: BatchStore, batch_id: str) -> None:
        self._store = store
        self._id = batch_id
        self._number = 0
        self._waiting: list[LineResult] = []
        self._wrote = time.monotonic()
        self.done: set[int] = set()
        """Lines that are written."""
        self.completed = 0
        self.failed = 0
        self.spent = Spent()
        self._last: list[LineResult] = []
        """The newest part. It grows while it is small: files of one line would be as many as there are lines."""
        for number, results in store.parts(batch_id):
            self._number, self._last = number, results
            self._count(results)

    def add(self, result: LineResult) -> None:
        self._waiting.append(result)

    async def write(self, at_once: bool = False) -> bool:
        """Write what is finished if it is enough, or some time has passed; whether anything was."""
        late = time.monotonic() - self._wrote >= PART_S
        if not self._waiting or not (at_once or late or len(self._waiting) >= PART):
            return False
        results, self._waiting = self._waiting, []
        if len(self._last) >= PART or not self._number:
            self._number, self._last = self._number + 1, []
        self._last = [*self._last, *results]
        await asyncio.to_thread(self._store.write_part, self._id, self._number, self._last)
        self._count(results)
        self._wrote = time.monotonic()
        return True

    def recorded(self, record: BatchRecord) -> BatchRecord:
        return replace(record, completed=self.completed, failed=self.failed, spent=self.spent)

    def _count(self, results: Sequence[LineResult]) -> None:
        for result in results:
            self.done.add(result.line)
            self.completed += result.ok
            self.failed += not result.ok
            self.spent += result.spent


class BatchRunner:
    """All batches of a storage folder. Only one runner may run at a time."""

    def __init__(self, root: str, replicas: Replicas, places: int) -> None:
        """`root`: `<storage>/tuning`; `places`: lines that are asked at once."""
        self._store = BatchStore(root)
        self._files = FileStore(root)
        self._replicas = replicas
        self._width = places
        self._places = asyncio.Semaphore(places)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._woken = asyncio.Event()

    def wake(self) -> None:
        """There may be new batches, or cancellations. In the event loop of `run` only."""
        self._woken.set()

    async def run(self, idle_s: float | None = None) -> None:
        """Run batches as they come, until there have been none for `idle_s` seconds; None: for ever."""
        await asyncio.to_thread(self._store.clear)
        idle_since = time.monotonic()
        try:
            while idle_s is None or self._tasks or time.monotonic() - idle_since < idle_s:
                self._woken.clear()
                await self._look()
                if self._tasks:
                    idle_since = time.monotonic()
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._woken.wait(), POLL_S)
        finally:
            for task in self._tasks.values():
                task.cancel()
            await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def _look(self) -> None:
        self._tasks = {batch_id: task for batch_id, task in self._tasks.items() if not task.done()}
        waiting = {record.id: record for record in await asyncio.to_thread(self._store.open)}
        active = Counter(waiting[batch_id].owner for batch_id in self._tasks if batch_id in waiting)
        new = [record for batch_id, record in waiting.items() if batch_id not in self._tasks]
        while new and len(self._tasks) < ACTIVE:
            record = min(new, key=lambda record: (active[record.owner], record.made_ns))  # the owners take turns
            new.remove(record)
            active[record.owner] += 1
            self._tasks[record.id] = asyncio.create_task(self._batch(record), name=record.id)

    async def _batch(self, record: BatchRecord) -> None:
        """From wherever it is to its end."""
        try:
            if record.status == "validating":
                record = await self._validate(record)
            if record.status in ("in_progress", "cancelling", "finalizing"):
                await self._answer(record)
        except UnknownFile:
            error = BatchError("file_not_found", "the input file was deleted, or has expired", "input_file_id")
            self._store.save(record.moved("failed", errors=[error]))
        except (OSError, UserError) as error:
            log.warning("%s: is tried again: %s", record.id, error)
            await asyncio.sleep(LONGEST_PAUSE_S)
        except Exception:  # no batch may end the others
            log.exception("%s: is tried again", record.id)
            await asyncio.sleep(LONGEST_PAUSE_S)

    # -- validation ----------------------------------------------------------------------------------------------------

    async def _validate(self, record: BatchRecord) -> BatchRecord:
        found = await asyncio.to_thread(self._survey, record)
        errors = found.errors
        if not errors:
            unknown = await self._unknown(record, sorted(found.models))
            message = "body.model: there is no such model; GET /v1/models lists all"
            errors = [BatchError("model_not_found", message, "body.model", found.models[model]) for model in unknown]
        if errors:
            record = record.moved("failed", errors=errors[:MOST_ERRORS], total=found.lines)
        else:
            model = next(iter(found.models)) if len(found.models) == 1 else None
            record = record.moved("in_progress", total=found.lines, model=model)
        self._store.save(record)
        return record

    def _survey(self, record: BatchRecord) -> Survey:
        with self._files.open(record.input_file_id, record.owner) as stream:
            return survey(stream, record.endpoint)

    async def _unknown(self, record: BatchRecord, models: Sequence[str]) -> list[str]:
        pause = PAUSE_S
        while True:
            try:
                return await self._replicas.unknown(models)
            except Unreachable:
                if self._over(record):  # `_run` ends it
                    return []
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_S)

    # -- answers -------------------------------------------------------------------------------------------------------

    async def _answer(self, record: BatchRecord) -> None:
        progress = await asyncio.to_thread(Progress, self._store, record.id)
        outcome: Outcome = "completed"
        if record.status != "finalizing":
            stream = await asyncio.to_thread(self._files.open, record.input_file_id, record.owner)
            with stream:
                outcome = await self._run(record, progress, stream)
            record = progress.recorded(record)
            if outcome == "completed":
                record = record.moved("finalizing")
            elif outcome == "cancelled" and record.cancelling_at is None:
                record = record.moved("cancelling")
            self._store.save(record)
        await asyncio.to_thread(self._finish, record, progress, outcome)
        log.info("%s: %s, %d of %d lines are answered", record.id, outcome, progress.completed, record.total)

    async def _run(self, record: BatchRecord, progress: Progress, stream: IO[bytes]) -> Outcome:
        """Answer the lines that are not finished. Returns how it ended."""
        left = (line for line in lines(stream) if line.number not in progress.done)
        running: set[asyncio.Task[LineResult]] = set()
        looked, more = 0.0, True
        outcome: Outcome = "completed"
        try:
            while more or running:
                if time.monotonic() - looked >= POLL_S:
                    looked = time.monotonic()
                    if over := await asyncio.to_thread(self._over, record):
                        outcome = over
                        break
                while more and len(running) < self._width:
                    line = next(left, None)
                    more = line is not None
                    if line is not None:
                        running.add(asyncio.create_task(self._line(record.endpoint, line)))
                if running:
                    done, running = await asyncio.wait(running, timeout=POLL_S, return_when=asyncio.FIRST_COMPLETED)
                    for task in done:
                        progress.add(task.result())
                if await progress.write():
                    self._store.save(progress.recorded(record))
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
        await progress.write(at_once=True)
        return outcome

    def _over(self, record: BatchRecord) -> Outcome | None:
        if self._store.is_cancelled(record.id):
            return "cancelled"
        return "expired" if time.time() >= record.expires_at else None

    async def _line(self, endpoint: Endpoint, line: Line) -> LineResult:
        pause, tries = PAUSE_S, 1
        async with self._places:
            while True:
                try:
                    answered = await self._replicas.answer(endpoint, line.body)
                except Unreachable:
                    answered = None
                if answered is None or answered.status in (429, 503):
                    await asyncio.sleep(pause)
                    pause = min(2 * pause, LONGEST_PAUSE_S)
                elif answered.status >= 500 and tries < TRIES:
                    tries += 1
                else:
                    return _result(line, answered)

    # -- the files -----------------------------------------------------------------------------------------------------

    def _finish(self, record: BatchRecord, progress: Progress, outcome: Outcome) -> None:
        """Write the files, then the record. It may be called again after a crash at any point."""

        def written(ok: bool) -> Iterator[bytes]:
            for _, results in self._store.parts(record.id):
                yield b"".join(result.output.encode() + b"\n" for result in results if result.ok == ok)
            if not ok and outcome in LEFT:
                yield from self._unanswered(record, progress.done, *LEFT[outcome])

        has_errors = bool(progress.failed) or (outcome in LEFT and len(progress.done) < record.total)
        for has, file_id, name, ok in (
            (bool(progress.completed), record.output_file_id, "output", True),
            (has_errors, record.error_file_id, "errors", False),
        ):
            if has:
                label = f"{record.id}_{name}.jsonl"
                seconds = record.output_seconds
                self._files.write_result(
                    record.owner, label, "batch_output", written(ok), file_id=file_id, expires_after=seconds
                )
        record = progress.recorded(record)
        self._store.save(record.moved(outcome, has_output=bool(progress.completed), has_errors=has_errors))

    def _unanswered(self, record: BatchRecord, done: set[int], code: str, message: str) -> Iterator[bytes]:
        try:
            stream = self._files.open(record.input_file_id, record.owner)
        except UnknownFile:
            return
        with stream:
            for line in lines(stream):
                if line.number not in done:
                    error = {"code": code, "message": message}
                    yield json.dumps(_output(line, None, error), ensure_ascii=False).encode() + b"\n"


def _output(line: Line, response: dict[str, Any] | None, error: dict[str, str] | None) -> dict[str, Any]:
    return {"id": new_id("batch_req", "_"), "custom_id": line.custom_id, "response": response, "error": error}


def _result(line: Line, answered: Answered) -> LineResult:
    response = {"status_code": answered.status, "request_id": answered.request_id, "body": answered.body}
    output = json.dumps(_output(line, response, None), ensure_ascii=False)
    return LineResult(line.number, answered.status == 200, output, _spent(answered.body))


def _spent(body: Mapping[str, Any]) -> Spent:
    """Tokens of an answer of any of the endpoints."""
    usage = body.get("usage") or {}
    details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details") or {}
    return Spent(
        usage.get("prompt_tokens", usage.get("input_tokens", 0)),
        details.get("cached_tokens", 0),
        usage.get("completion_tokens", usage.get("output_tokens", 0)),
    )
