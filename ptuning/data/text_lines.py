"""Lines of UTF-8 text, with their numbers. Anything but plain text is refused, at its line and byte."""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO

from ptuning.errors import DataError

LINE_LIMIT = 10_000_000
"""Lines of a text file, and values of a JSON array, must be shorter than this, in bytes."""


def text_lines(stream: IO[bytes], source: str) -> Iterator[tuple[int, str]]:
    """The lines of a text file with their numbers from 1."""
    number = 0
    while line := stream.readline(LINE_LIMIT):
        number += 1
        if len(line) == LINE_LIMIT:
            raise too_long(source, number)
        yield number, decoded(line, source, number)


def decoded(line: bytes, source: str, number: int) -> str:
    """A line as text.

    Raises:
        DataError: it is not plain UTF-8 text.
    """
    if b"\0" in line:
        raise nul_byte(source, number)
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise not_utf8(source, number, error.start + 1) from None


def nul_byte(source: str, number: int) -> DataError:
    return DataError(f"{source}, line {number}: contains a NUL byte; save the file as UTF-8 text")


def not_utf8(source: str, number: int, byte: int) -> DataError:
    """`byte`: the number of the first wrong one in its line, from 1."""
    return DataError(f"{source}, line {number}: is not UTF-8 at byte {byte}; save the file as UTF-8")


def too_long(source: str, number: int) -> DataError:
    return DataError(f"{source}, line {number}: is longer than {LINE_LIMIT // 1_000_000} MB; write one row per line")


def place(source: str, row: int, line: int) -> str:
    """The location of a row in a text file."""
    return f"{source}, row {row}" + (f" (line {line})" if line != row else "")
