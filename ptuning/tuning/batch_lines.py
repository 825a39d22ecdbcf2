"""The lines of a batch's input: checked as a whole before any of them runs, then read one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

from ptuning.data.text_lines import LINE_LIMIT
from ptuning.tuning.batch_store import BatchError, Endpoint
from ptuning.tuning.file_check import FileError, json_object

MOST_LINES = 50_000
MOST_ERRORS = 100
"""Errors that are reported of one file."""
MOST_ID = 512
"""Characters of a custom_id."""
KEYS = ("custom_id", "method", "url", "body")


@dataclass(frozen=True)
class Line:
    """A request of a batch."""

    number: int
    """From 1, as text editors count."""
    custom_id: str
    body: dict[str, Any]


class Survey:
    """What is wrong with an input, and which models it asks."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.errors: list[BatchError] = []
        self.models: dict[str, int] = {}
        """Model -> the first line that asks it."""
        self.lines = 0
        self._endpoint = endpoint
        self._ids: set[str] = set()

    def check(self, line: bytes, number: int) -> None:
        """Record the first thing that is wrong with a line."""
        try:
            self._check(line, number)
        except _Wrong as error:
            code, message, param = error.args
            self.errors.append(BatchError(code, message, param, number))

    def _check(self, line: bytes, number: int) -> None:
        if len(line) == LINE_LIMIT:
            raise _Wrong("invalid_json_line", f"is longer than {LINE_LIMIT // 1_000_000} MB; write one request per line", None)
        try:
            row = json_object(line, number)
        except FileError as error:
            raise _Wrong("invalid_json_line", str(error).partition(": ")[2], None) from None
        for key in KEYS:
            if row.get(key) is None:
                raise _Wrong("missing_required_parameter", f"{key}: is missing; send it", key)
        unknown = next((_shown(key) for key in row if key not in KEYS), None)
        if unknown is not None:
            raise _Wrong("invalid_request", f"{unknown}: is not supported; remove it", unknown)
        self._check_id(row["custom_id"])
        if row["method"] != "POST":
            raise _Wrong("invalid_method", "method: must be POST", "method")
        if row["url"] != self._endpoint:
            raise _Wrong("invalid_url", f"url: must be {self._endpoint}, the endpoint of the batch", "url")
        self._check_body(row["body"], number)

    def _check_id(self, custom: Any) -> None:
        if not isinstance(custom, str) or not 0 < len(custom) <= MOST_ID:
            raise _Wrong("invalid_request", f"custom_id: must be a string with 1 to {MOST_ID} characters", "custom_id")
        if custom in self._ids:
            raise _Wrong("duplicate_custom_id", "custom_id: occurs twice; give every line its own", "custom_id")
        self._ids.add(custom)

    def _check_body(self, body: Any, number: int) -> None:
        if not isinstance(body, dict):
            raise _Wrong("invalid_request", "body: must be an object", "body")
        if body.get("stream"):
            raise _Wrong("streaming_unsupported", "body.stream: a batch has no streams; leave it out", "body.stream")
        model = body.get("model")
        if not isinstance(model, str) or not model:
            raise _Wrong("missing_required_parameter", "body.model: is missing; send it", "body.model")
        self.models.setdefault(model, number)


class _Wrong(Exception):
    """Of a line: code, message and parameter."""


def survey(stream: IO[bytes], endpoint: Endpoint) -> Survey:
    """Check all lines. Whether the models are known is not checked here."""
    found = Survey(endpoint)
    for number, line in _numbered(stream):
        found.lines += 1
        if found.lines > MOST_LINES:
            found.errors.append(BatchError("too_many_lines", f"the file has more than {MOST_LINES} lines; split it"))
            break
        found.check(line, number)
        if len(found.errors) >= MOST_ERRORS:
            break
    if not found.lines:
        found.errors.append(BatchError("empty_file", "the file has no lines; write one request per line"))
    return found


def lines(stream: IO[bytes]) -> Iterator[Line]:
    """The lines of an input that was checked."""
    for number, line in _numbered(stream):
        row = json_object(line, number)
        yield Line(number, row["custom_id"], row["body"])


def _numbered(stream: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    number = 0
    while line := stream.readline(LINE_LIMIT):
        number += 1
        if line.strip():
            yield number, line


def _shown(key: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in key[:80])
