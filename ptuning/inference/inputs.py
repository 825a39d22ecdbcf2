"""From a request's text to token ids, by the `Encoder` that training used."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ptuning.data.encoder import Encoder
from ptuning.data.row import look_up, root
from ptuning.inference.types import RequestError
from ptuning.settings.data import Template
from ptuning.settings.template import template_defaults, template_fields

RAW = Template(input="{text}", target="{text}", truncate="error", special_tokens="tokens")
"""Text as it is: the client writes the whole input, special tokens included."""


def fields_of(encoder: Encoder, text: str | Mapping[str, str]) -> dict[str, str]:
    """A text, or an object as a mapping or as JSON text -> the template's fields.

    Raises:
        RequestError: the fields are not those of the template.
    """
    wanted = template_fields(encoder.template.input)
    optional = template_defaults(encoder.template.input)
    required = [name for name in wanted if name not in optional] or wanted[:1]
    if isinstance(text, str) and len(wanted) <= 1:
        return dict.fromkeys(wanted, text)
    fields: Any = text
    if isinstance(text, str):
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError):
            fields = None
    if isinstance(fields, Mapping):
        found = {name: look_up(fields, name) for name in wanted if _has(fields, name)}
        known = {root(name, fields) for name in wanted}
        if set(fields) <= known and set(required) <= set(found) and all(isinstance(value, str) for value in found.values()):
            return found
    if isinstance(text, str) and len(required) == 1:
        return {required[0]: text}
    listed = ", ".join(f"{name} (optional)" if name in optional else name for name in wanted)
    raise RequestError(f"the template has the fields {listed}; send a JSON object with a text for each")


def _has(fields: Mapping[str, Any], name: str) -> bool:
    try:
        look_up(fields, name)
    except KeyError:
        return False
    return True


def row_ids(encoder: Encoder, fields: Mapping[str, str], room: int, truncate: bool) -> list[int]:
    """The token ids of a row in at most `room` tokens.

    Raises:
        RequestError, DataError: the row is too long and must not be truncated, or has no text.
    """
    if not truncate or encoder.template.truncate == "error":
        size = len(encoder.input_ids(fields))
        if size > room:
            raise too_long(size, room)
    return encoder.fitted_ids(fields, room)


def too_long(size: int, room: int) -> RequestError:
    return RequestError(f"the text has {size} tokens, {room} fit; shorten the text or lower max_tokens")
