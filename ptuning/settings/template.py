"""The syntax of templates: text with columns of a row in braces, as in "Message: {text}\\nLabel:".

{Tweet text}          any column name
{answers.text[0]}     a value inside a column; a column of exactly this name comes first
{input|}              optional: the text after the bar stands in for a missing or null value
{{ and }}             literal braces
{a\\|b}                a bar, a brace or a backslash in the name of a column
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

_TOKEN = re.compile(r"\{\{|\}\}|\{((?:\\.|[^{}\\])*)\}|[{}]", re.DOTALL)
_BAR = re.compile(r"((?:\\.|[^\\|])*)(?:\|(.*))?", re.DOTALL)
_ESCAPE = re.compile(r"\\(.)", re.DOTALL)

_FOREIGN = re.compile(
    r"""\{\{-?\s*([^{}|%]+?)\s*(?:\|[^{}]*)?-?\}\}   # Jinja, Handlebars
    | \$\{([^{}]+)\} | \$(?!\d)(\w+)                 # shell, string.Template
    | %\(([^()]+)\)[sdrf]                            # printf
    | <\|?([^<>|{}\n]+?)\|?> | \[([^\[\]{}\n]+)\]    # placeholders
    | (%s)""",
    re.VERBOSE,
)


@dataclass(frozen=True)
class TemplateField:
    """A value of the row in a template."""

    name: str
    """The column, or a path to a value inside one."""
    default: str | None = None
    """Stands in for a missing or null value. None: the value is required."""


@lru_cache(maxsize=1024)
def parse_template(template: str) -> tuple[str | TemplateField, ...]:
    """The literal texts and the fields of a template, in order.

    Raises:
        ValueError: unbalanced braces, or braces without a name.
    """
    parts: list[str | TemplateField] = []
    end = 0
    for found in _TOKEN.finditer(template):
        literal, end = template[end : found.start()], found.end()
        if found[0] in ("{{", "}}"):
            _add(parts, literal + found[0][0])
            continue
        _add(parts, literal)
        if found[1] is None:
            raise ValueError(f"{template!r}: the {found[0]} at character {found.start() + 1} has no partner; {_LITERAL}")
        else:
            parts.append(_field(template, found[1]))
    _add(parts, template[end:])
    return tuple(parts)


def _add(parts: list[str | TemplateField], text: str) -> None:
    if text and parts and isinstance(parts[-1], str):
        parts[-1] += text
    elif text:
        parts.append(text)


_LITERAL = "write literal braces as {{ and }}"


def _field(template: str, inside: str) -> TemplateField:
    bar = _BAR.fullmatch(inside)
    assert bar is not None
    name, default = (None if part is None else _ESCAPE.sub(r"\1", part) for part in bar.groups())
    if not name or not name.strip():
        raise ValueError(f"{template!r}: {{{inside}}} contains no column name; {_LITERAL}")
    return TemplateField(name, default)


def in_braces(name: str) -> str:
    """A column as a template names it."""
    return "{" + re.sub(r"([{}|\\])", r"\\\1", name) + "}"


def literal(text: str) -> str:
    """The template that is this text for every row."""
    return text.replace("{", "{{").replace("}", "}}")


def template_fields(template: str) -> list[str]:
    """The names of a template's fields in order of appearance, each once.

    Raises:
        ValueError: as `parse_template`.
    """
    return list(dict.fromkeys(part.name for part in parse_template(template) if isinstance(part, TemplateField)))


def template_defaults(template: str) -> dict[str, str]:
    """The optional fields of a template and what stands in for them."""
    fields = (part for part in parse_template(template) if isinstance(part, TemplateField))
    return {field.name: field.default for field in fields if field.default is not None}


def fill(template: str | Sequence[str | TemplateField], texts: Mapping[str, str]) -> str:
    """The template, or its parts, with the texts of its fields."""
    parts = parse_template(template) if isinstance(template, str) else template
    return "".join(part if isinstance(part, str) else texts[part.name] for part in parts)


def in_shell_style(template: str) -> str | None:
    """The first field if every one is written as ${text}: a dollar sign in front of each is not what is meant."""
    parts = parse_template(template)
    before = [parts[at - 1] if at else "" for at, part in enumerate(parts) if isinstance(part, TemplateField)]
    if not before or not all(isinstance(text, str) and text.endswith("$") for text in before):
        return None
    return template_fields(template)[0]


def literal_names(templates: Sequence[str]) -> dict[str, str]:
    """What templates name only as other tools do, which is plain text here: {"subject": "{{ subject }}"}."""
    used = {name for template in templates for name in template_fields(template)}
    found: dict[str, str] = {}
    for match in (match for template in templates for match in _FOREIGN.finditer(template)):
        name = next(group for group in match.groups() if group is not None).strip()
        if name not in used:
            found.setdefault(name, match[0])
    return found


def foreign_spelling(template: str) -> tuple[str, str] | None:
    """A field as other tools write it, which is plain text here, and as it is written here: ("{{ text }}", "{text}")."""
    for found in _FOREIGN.finditer(template):
        name = next(group for group in found.groups() if group is not None)
        if not found[7]:
            return found[0], in_braces(name.strip())
        return found[0], "{text}"
    return None
