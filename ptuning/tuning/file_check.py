"""Checks a file of training rows line by line while it arrives: JSON objects, all of one known shape.

The shapes are those of `data.conversations` (`messages`, `prompt` with `completion`) and plain fields, from which templates
make texts. What a template needs is not known yet: the user of the file checks that.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Mapping
from typing import Any

from ptuning.data.conversations import KNOWN, ChatRows, answer_of, read
from ptuning.data.text_lines import LINE_LIMIT
from ptuning.errors import DataError, UserError

PAIR = ("prompt", "completion")
_COLUMNS = tuple(name for name in KNOWN if name not in PAIR)
_PLAIN = (str, int, float, bool, type(None))


class FileError(UserError):
    """A file cannot be taken. The message names line and key."""


class Lines:
    """Splits a file that arrives in blocks into lines, none longer than `LINE_LIMIT`."""

    def __init__(self) -> None:
        self.number = 0
        """Of the last line, from 1."""
        self._rest = bytearray()

    def feed(self, block: bytes) -> Iterator[bytes]:
        """The lines that end in this block.

        Raises:
            FileError: a line is too long.
        """
        begin = 0
        while (end := block.find(b"\n", begin)) >= 0:
            self._rest += block[begin:end]
            yield self._take()
            begin = end + 1
        self._rest += block[begin:]
        if len(self._rest) >= LINE_LIMIT:
            raise FileError(
                f"line {self.number + 1}: is longer than {LINE_LIMIT // 1_000_000} MB; write one JSON object per line"
            )

    def end(self) -> Iterator[bytes]:
        """The last line, if nothing ends it."""
        if self._rest:
            yield self._take()

    def _take(self) -> bytes:
        line = bytes(self._rest)
        self._rest.clear()
        self.number += 1
        return line


class TrainingLines:
    """The check of one file. `feed` it block by block, then `end` it."""

    def __init__(self) -> None:
        self.rows = 0
        self._lines = Lines()
        self._chat: ChatRows | None = None

    def feed(self, block: bytes) -> None:
        """Raises:
        FileError: a line is wrong.
        """
        for line in self._lines.feed(block):
            self._check(line)

    def end(self) -> None:
        """Raises:
        FileError: the last line is wrong, or there are no rows.
        """
        for line in self._lines.end():
            self._check(line)
        if not self.rows:
            raise FileError("the file has no rows; write one JSON object per line")

    def _check(self, line: bytes) -> None:
        number = self._lines.number
        if not line.strip():
            return
        try:
            row = json_object(line, number)
            if not self.rows:
                self._chat = _shape_of(row)
            self.rows += 1
            if self._chat is None:
                _check_fields(row)
            else:
                _check_conversation(self._chat, row)
        except FileError:
            raise
        except DataError as error:
            raise FileError(f"line {number}: {error}") from None


def json_object(line: bytes, number: int) -> dict[str, Any]:
    """A line as a JSON object.

    Raises:
        FileError: it is none.
    """
    if number == 1 and line.startswith((codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise FileError("line 1: begins with a byte order mark; save the file as UTF-8 without BOM")
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise FileError(f"line {number}: is not UTF-8 at byte {error.start + 1}; save the file as UTF-8") from None
    try:
        found = json.loads(text, parse_constant=_refuse_constant)
        if b"\\u" in line:
            json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise FileError(f"line {number}: contains a lone surrogate (half a character); correct it") from None
    except (ValueError, RecursionError) as error:
        reason = "too deeply nested" if isinstance(error, RecursionError) else str(error)
        if isinstance(error, json.JSONDecodeError):
            reason = error.msg[:1].lower() + error.msg[1:]
        raise FileError(f"line {number}: is not valid JSON ({reason}); write one JSON object per line") from None
    if not isinstance(found, dict):
        raise FileError(f"line {number}: is not a JSON object; write one JSON object per line")
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _shape_of(row: Mapping[str, Any]) -> ChatRows | None:
    """What the rows are, from the first one; None: plain fields."""
    for column in _COLUMNS:
        value = row.get(column)
        if column in row and (column == "messages" or isinstance(value, list)):
            first = value[0] if isinstance(value, list) and value and isinstance(value[0], Mapping) else {}
            keys = ("from", "value") if "from" in first and "role" not in first else ("role", "content")
            return ChatRows((column,), *keys, optional=("system", "tools"))
    return ChatRows(PAIR, optional=("system", "tools")) if set(PAIR) & set(row) else None


def _check_conversation(chat: ChatRows, row: Mapping[str, Any]) -> None:
    missing = next((column for column in chat.columns if column not in row), None)
    if missing is not None:
        listed = ", ".join(f"'{name}'" for name in list(row)[:8]) or "none"
        raise DataError(f"the field '{missing}' is missing (found: {listed}); write all rows in the same form")
    messages = read(chat.texts(row)["messages"])
    if len(chat.columns) > 1:
        if not answer_of(messages).strip():
            raise DataError(f"the field '{chat.columns[1]}' is empty; write the answer that is to be learned")
    elif messages[-1]["role"] != "assistant":
        raise DataError(
            f"the last message of '{chat.columns[0]}' is of the {messages[-1]['role']}; end with the assistant's answer"
        )


def _check_fields(row: Mapping[str, Any]) -> None:
    if not row:
        raise DataError("is an empty object; write at least one field")
    for name, value in row.items():
        texts = isinstance(value, list) and all(isinstance(each, str) for each in value)
        if not isinstance(value, _PLAIN) and not texts:
            kind = "a list" if isinstance(value, list) else "an object"
            raise DataError(f"the field '{name[:80]}' is {kind}, not a text; write it as text")
