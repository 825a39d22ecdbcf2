"""Values of rows and labels that mean the same: JSON's true is Python's True and TOML's true; pandas writes 0 as 0.0."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Any

_NUMBER = re.compile(r"[-+]?(?:0|[1-9]\d{0,30})(?:\.\d{1,30})?")
"""A number as JSON, TOML and pandas write it. 007 is a code."""


def label_text(value: Any) -> Any:
    """A label of an experiment file as text: `false` is "false", 0 is "0". Other values are returned as they are."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, int | float) else value


def canonical(text: str) -> str:
    """The same text for all spellings of a truth value or a number: "True" and "true", "0" and "0.0"."""
    if text.lower() in ("true", "false"):
        return text.lower()
    if _NUMBER.fullmatch(text):
        number = Decimal(text)
        plain = f"{number:f}"
        return "0" if not number else plain.rstrip("0").rstrip(".").lstrip("+") if "." in plain else plain.lstrip("+")
    return text


def spellings(labels: Mapping[str, str]) -> dict[str, str]:
    """Canonical value of a row -> label, from values of rows -> labels."""
    return {canonical(value): label for value, label in labels.items()}


def ordered(labels: Iterable[str]) -> list[str]:
    """Labels in the order of numbers if all are numbers, else of texts."""
    listed = list(labels)
    if all(_NUMBER.fullmatch(label) for label in listed):
        return sorted(listed, key=Decimal)
    return sorted(listed)
