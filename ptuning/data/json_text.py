"""A JSON text that is read value by value: files may be larger than the memory."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import IO, Any

from ptuning.data.text_lines import LINE_LIMIT, not_utf8, nul_byte, too_long
from ptuning.errors import DataError

_BLOCK = 1 << 16
_SPACE = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder()


class JsonText:
    """A JSON text that is read value by value."""

    def __init__(self, stream: IO[bytes], begin: bytes, source: str, line: int) -> None:
        self._stream = stream
        self._source = source
        self._decode = codecs.getincrementaldecoder("utf-8-sig" if line == 1 else "utf-8")().decode
        self._text = ""
        self._at = 0
        self._ended = False
        self._read_line, self._read_column = line, 0
        self.line = line
        """Of the next value."""
        self._append(begin)

    def peek(self) -> str:
        """The next character that is not a space; "" at the end of the file."""
        while True:
            space = _SPACE.match(self._text, self._at)
            assert space is not None
            self._move(space.end())
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more(_BLOCK):
                return ""

    def take(self, character: str) -> None:
        if self.peek() != character:
            raise self.invalid(f"{character} expected")
        self._move(self._at + 1)

    def value(self) -> Any:
        """The next value."""
        self.peek()
        size = _BLOCK
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
                if end - self._at > LINE_LIMIT:
                    raise too_long(self._source, self.line)
                if end < len(self._text) or self._ended:  # a number at the end may go on
                    self._move(end)
                    return value
                broken = None
            except RecursionError:
                raise self.invalid("too deeply nested") from None
            except json.JSONDecodeError as error:
                broken = error
            # What is incomplete is reported at its end, or at the beginning of its last text.
            wrong = broken is not None and not broken.msg.startswith("Unterminated") and broken.pos < len(self._text) - 16
            if not wrong and len(self._text) - self._at > LINE_LIMIT:
                raise too_long(self._source, self.line)
            if wrong or not self._more(size):
                if broken is None:
                    continue  # the end of the file ends the number
                line = self.line + self._text.count("\n", self._at, broken.pos)
                raise invalid_json(self._source, line, broken.msg[0].lower() + broken.msg[1:])
            size *= 2

    def elements(self) -> Iterator[tuple[int, Any]]:
        """The elements of an array, with their lines."""
        self.take("[")
        if self.peek() != "]":
            while True:
                self.peek()
                line = self.line
                yield line, self.value()
                if self.peek() == "]":
                    break
                self.take(",")
        self.take("]")

    def members(self) -> Iterator[str]:
        """The keys of an object after its brace; the caller takes the value of each."""
        if self.peek() != "}":
            while True:
                key = self.value() if self.peek() == '"' else None
                if not isinstance(key, str):
                    raise self.invalid("a key in quotes expected")
                self.take(":")
                yield key
                if self.peek() == "}":
                    break
                self.take(",")
        self.take("}")

    def invalid(self, problem: str) -> DataError:
        return invalid_json(self._source, self.line, problem)

    def _move(self, to: int) -> None:
        self.line += self._text.count("\n", self._at, to)
        self._at = to

    def _more(self, size: int) -> bool:
        block = self._stream.read(size)
        if not block and self._ended:
            return False
        self._append(block)
        return True

    def _append(self, block: bytes) -> None:
        if b"\0" in block:
            raise nul_byte(self._source, self._read_line + block.count(b"\n", 0, block.index(b"\0")))
        try:
            text = self._decode(block, not block)
        except UnicodeDecodeError as error:
            # The decoder puts bytes of the block before in front of this one.
            kept = len(error.object) - len(block)
            before = error.object[: error.start]
            line = self._read_line + before.count(b"\n")
            column = len(before) - before.rfind(b"\n") - 1
            column += self._read_column - kept if b"\n" not in before else 0
            raise not_utf8(self._source, line, column + 1) from None
        self._ended = not block
        self._read_line += block.count(b"\n")
        self._read_column = len(block) - block.rfind(b"\n") - 1 + (0 if b"\n" in block else self._read_column)
        self._text = self._text[self._at :] + text
        self._at = 0


def invalid_json(source: str, line: int, problem: str) -> DataError:
    problem = f"is not a JSON object ({problem})"
    return DataError(f"{source}, line {line}: {problem}; write one object per line, or an array of objects")


def not_an_object(source: str, line: int) -> DataError:
    return DataError(f"{source}, line {line}: is not a JSON object; write one object per line")
