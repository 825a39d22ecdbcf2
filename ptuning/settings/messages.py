"""What is wrong with an experiment, as one sentence that names the key and the fix."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from ptuning.errors import suggest
from ptuning.settings.fields import NonBlank
from ptuning.settings.foreign_keys import advice


def sentence(root: type[BaseModel], error: ValidationError) -> str:
    """The first problem of a validation as `table.key: problem; fix`."""
    problem, *others = error.errors()
    where: list[str] = []
    for part in problem["loc"]:  # after the keys come list indices and names of union branches
        if part not in _known_keys(root, where):
            break
        where.append(str(part))
    path = ".".join(where)
    if problem["type"] == "extra_forbidden":
        key, known = str(problem["loc"][-1]), _known_keys(root, where)
        fix = advice(key, ".".join(where), _dotted_keys(root), isinstance(problem["input"], dict))
        fix = fix or suggest(key, known, f"known here: {', '.join(sorted(known))}", shown=lambda name: ".".join([*where, name]))
        return f"{'.'.join([*where, key])}: unknown key; {fix}"
    if problem["type"] == "missing" and isinstance(problem["loc"][-1], str):
        return f"{path}: is missing; set it"
    if problem["type"] == "model_type":
        return f"{path}: is not a table (got {problem['input']!r}); write [{path}] and its keys below it"
    if problem["type"] in ("tuple_type", "list_type"):
        return f"{path}: is not a list (got {problem['input']!r}); write a list: {_as_list(problem['input'])}"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        # Validators of a whole table name the key themselves: "key: ...".
        return f"{path}{'.' if path and re.match(r'[a-z_.]+: ', message) else ': ' if path else ''}{message}"
    # In a union of "auto" and numbers, "auto" is a branch of its own with an error of its own.
    words = [each for each in others if each["loc"][:-1] == problem["loc"][:-1] and each["type"] == "literal_error"]
    message += "".join(f" or {each['ctx']['expected']}" for each in words)
    expected = [each["ctx"]["expected"] for each in (problem, *words) if each["type"] == "literal_error"]
    choices = re.findall(r"'(.+?)'", " ".join(expected))
    fix = suggest(str(problem["input"]), choices, "change the value", shown=quoted)
    return f"{path}: {message[0].lower()}{message[1:]} (got {problem['input']!r}); {fix}"


def quoted(name: str) -> str:
    """A name in TOML quotes. The name must not contain quotes."""
    return f'"{name}"'


def _known_keys(root: type[BaseModel], tables: Sequence[str]) -> list[str]:
    table = _table(root, tables)
    return list(table.model_fields) if table else []


def _dotted_keys(root: type[BaseModel], tables: Sequence[str] = ()) -> Iterator[str]:
    for name in _known_keys(root, tables):
        path = [*tables, name]
        yield ".".join(path)
        yield from _dotted_keys(root, path)


def _as_list(value: Any) -> str:
    """A value as the TOML list that was probably meant: texts are split at commas."""
    parts = [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else [value]
    return json.dumps(parts, ensure_ascii=False, default=str)


def takes_text(root: type[BaseModel], keys: Sequence[str]) -> bool:
    table = _table(root, keys[:-1])
    field = table.model_fields.get(keys[-1]) if table else None
    return field is not None and field.annotation in (str, NonBlank, str | None, NonBlank | None)


def _table(root: type[BaseModel], tables: Sequence[str]) -> type[BaseModel] | None:
    """The class of a table, or None if there is no such table."""
    table = root
    for name in tables:
        field = table.model_fields.get(name)
        kinds = (field.annotation, *get_args(field.annotation)) if field else ()  # a table may be optional
        tables_here = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if not tables_here:
            return None
        table = tables_here[0]
    return table
