"""Removes confidential parts of a text before it is written, logged or sent: passwords in addresses, and for clients also
paths. Imports nothing else of the package."""

from __future__ import annotations

import logging
import re
import traceback
from typing import Any

HIDDEN = "***"

_NAMES = r"password|passwd|pwd|token|secret|signature|credential|api[_-]?key|access[_-]?key|account[_-]?key|odbc_connect"
_PATTERNS = (
    # SQLAlchemy accepts any characters before the "@", slashes included.
    re.compile(r"(?i)\b((?:postgres|postgresql|mysql|mariadb|mssql|oracle)(?:\+\w+)?://)[^\s\"]*@"),
    # A password may contain slashes, as S3 keys do; text that looks like a port is not a password.
    re.compile(r"(\w://)[^\s/:@\"]*:(?!\d{1,5}(?:[/?#\s\"'\])>,;]|$))[^\s@\"]*@"),
    re.compile(r"(\w://)[^\s/\"]*@"),
)
_PARAMETER = re.compile(rf"(?i)([?&;](?:[^=&\s]*(?:{_NAMES})[^=&\s]*|sig|key|auth)=)[^&\s\"']+")

_ADDRESS = re.compile(r"\b[A-Za-z][\w+.-]*:/{2,}[^\s'\",;)\]>]*")
_PATH = re.compile(r"(?<![\w/.:])(?:~[\w-]*|\.{1,2})?/(?!v1/)[^\s'\",;:)\]>]+")


def redact(text: str) -> str:
    """The text with passwords in addresses replaced by ***."""
    if "://" not in text and "=" not in text:
        return text
    for pattern in _PATTERNS:
        text = pattern.sub(rf"\1{HIDDEN}@", text)
    return _PARAMETER.sub(rf"\1{HIDDEN}", text)


def redacted(value: Any) -> Any:
    """Plain data (dicts, lists, texts and numbers) with every text redacted."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {key: redacted(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(each) for each in value]
    return value


def first_line(error: BaseException, most: int = 200) -> str:
    """The first line of an error's message, redacted and at most `most` characters long, to be part of a sentence; the error's
    type if it has no message."""
    lines = [" ".join(line.split()) for line in redact(str(error)).splitlines() if line.strip()]
    return (lines[0].rstrip(".;") if lines else "")[:most] or type(error).__name__


def placeless(text: str) -> str:
    """The text for readers who must not learn about this machine: redacted, without addresses, paths cut to their last name."""
    text = _ADDRESS.sub(HIDDEN, redact(text))
    return _PATH.sub(lambda found: last_name(found[0]), text)


def last_name(path: str) -> str:
    """The last component of a path or an address, without its query."""
    return path.partition("?")[0].rstrip("/").rpartition("/")[2] or HIDDEN


def logger(name: str) -> logging.Logger:
    """The logger of a module. Its messages and tracebacks are redacted."""
    found = logging.getLogger(name)
    if not any(isinstance(each, _Redacting) for each in found.filters):
        found.addFilter(_Redacting())
    return found


class _Redacting(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = redact(record.getMessage()), ()
        if record.exc_info and not isinstance(record.exc_info, bool):
            # Formatters write this text if it is set, else the original traceback.
            record.exc_text = redact("".join(traceback.format_exception(*record.exc_info)).rstrip())
            record.exc_info = None
        return True
