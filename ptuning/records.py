"""Dataclasses that are written as JSON, and read again by other versions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

Record = TypeVar("Record")


def restored(shape: type[Record], plain: Mapping[str, Any]) -> Record:
    """A record of this version or of a later one, whose further keys are ignored.

    Raises:
        TypeError: a key without a default is missing.
    """
    known = {field.name for field in fields(shape)}  # type: ignore[arg-type]  # a dataclass
    return shape(**{key: value for key, value in plain.items() if key in known})
