"""What the text of an answer may be: free, one of some texts, or JSON of a schema.

A soft prompt with labels answers with a label. A client that asks for JSON with one of the labels in it gets exactly this, from
the same distribution and in the same single pass: the schema only decides how the label is written. So the ways by which client
libraries ask for a class work: a JSON schema, a forced tool, a choice.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ptuning.data.conversations import Message
from ptuning.data.encoder import Encoder
from ptuning.inference.types import RequestError
from ptuning.model.label_trie import Label, LabelTrie
from ptuning.serving.loading import Served
from ptuning.serving.protocol import ChatRequest, NamedTool, Sampled
from ptuning.settings.label_values import canonical
from ptuning.settings.template import template_fields

OPTIONS = 1000
"""Maximum instances of a schema that are told apart as whole texts."""


@dataclass(frozen=True)
class Choice:
    """The answer is one of some texts."""

    labels: tuple[Label, ...]
    """Token ids of each, end token included."""
    trie: LabelTrie | None
    """What is scored, of which the texts may be a part; None: there is no alternative."""
    places: tuple[int, ...]
    """Each text among those of the trie."""
    texts: tuple[str, ...] | None = None
    """What the client is sent instead of the text of the tokens."""

    @cached_property
    def own(self) -> LabelTrie | None:
        """The trie of these texts alone."""
        return LabelTrie(self.labels) if len(self.labels) > 1 else None


@dataclass(frozen=True)
class Tool:
    """The answer is the call of a function."""

    name: str
    named: bool
    """The request names it; False: it requires any call."""


@dataclass(frozen=True)
class Form:
    """The form of an answer."""

    choice: Choice | None = None
    schema: dict[str, Any] | None = None
    """The text is JSON of this schema."""
    tool: Tool | None = None
    param: str = ""
    """The parameter that asks for it."""


@dataclass(frozen=True)
class _Wanted:
    """What a request asks for. `param`: the parameter that does."""

    param: str
    texts: tuple[str, ...] | None = None
    schema: dict[str, Any] | None = None
    tool: Tool | None = None


def form_of(body: Sampled, served: Served, messages: Sequence[Message] | None) -> Form:
    """The form of the answers to a request; `messages`: its conversation, if the model takes conversations.

    Raises:
        RequestError: it cannot be had.
    """
    wanted = _wanted(body)
    labelled = bool(served.labels) if body.constrain is None else body.constrain
    if labelled and not served.labels:
        raise RequestError(f"constrain: {served.id} has no labels; remove it")
    if labelled:
        return Form(_labels(served, wanted), tool=wanted.tool if wanted else None)
    if wanted is None:
        return Form()
    if wanted.texts:
        return Form(_texts(served, wanted.texts, messages, wanted.param), tool=wanted.tool)
    assert wanted.schema is not None
    return Form(schema=wanted.schema, tool=wanted.tool, param=wanted.param)


def _wanted(body: Sampled) -> _Wanted | None:
    found = []
    if body.structured_outputs:
        texts = body.structured_outputs.choice
        found.append(
            _Wanted("structured_outputs", tuple(dict.fromkeys(texts)) if texts else None, body.structured_outputs.json_)
        )
    if isinstance(body, ChatRequest):
        asked = body.response_format
        if asked and asked.type == "json_object":
            found.append(_Wanted("response_format", schema={"type": "object"}))
        elif asked and asked.json_schema and asked.type == "json_schema":
            found.append(_Wanted("response_format", schema=asked.json_schema.schema_))
        tool = _forced(body)
        if tool:
            found.append(tool)
    if len(found) > 1:
        raise RequestError(f"{found[1].param}: cannot be combined with {found[0].param}; send one of them")
    return found[0] if found else None


def _forced(body: ChatRequest) -> _Wanted | None:
    """The tool that must be called."""
    if body.tool_choice in (None, "none", "auto"):
        return None
    tools = {tool.function.name: tool.function for tool in body.tools or ()}
    if isinstance(body.tool_choice, NamedTool):
        name = body.tool_choice.function.name
        if name not in tools:
            raise RequestError("tool_choice: tools does not contain the function that it names; correct one of them")
    elif len(tools) != 1:
        raise RequestError(f"tool_choice: required is supported with one tool only, not {len(tools)}; name the function")
    else:
        (name,) = tools
    schema = tools[name].parameters or {"type": "object", "properties": {}, "additionalProperties": False}
    return _Wanted("tool_choice", schema=schema, tool=Tool(name, isinstance(body.tool_choice, NamedTool)))


def _labels(served: Served, wanted: _Wanted | None) -> Choice:
    assert served.encoder is not None
    trie, labels = served.encoder.label_trie, served.labels
    if wanted is None:
        return Choice(trie.labels, trie, tuple(range(len(labels))))
    pairs = [(text, text) for text in wanted.texts] if wanted.texts else instances(wanted.schema or {})
    if not pairs:
        raise RequestError(
            f"{wanted.param}: {served.id} answers with one of its labels, so the schema must be an enum of them, or an object "
            "with one such field; send constrain = false for another answer"
        )
    known = {canonical(label): at for at, label in enumerate(labels)} | {label: at for at, label in enumerate(labels)}
    found: dict[int, str] = {}
    for value, text in pairs:
        spelled = value if isinstance(value, str) else json.dumps(value)
        at = known.get(spelled, known.get(canonical(spelled)))
        if at is None:
            listed = ", ".join(labels[:10]) + (", ..." if len(labels) > 10 else "")
            raise RequestError(f"{wanted.param}: a value is not one of the labels of {served.id} ({listed}); correct it")
        found.setdefault(at, text)
    places = tuple(found)
    same = all(text == labels[at] for at, text in found.items())
    return Choice(tuple(trie.labels[at] for at in places), trie, places, None if same else tuple(found.values()))


def _texts(served: Served, texts: Sequence[str], messages: Sequence[Message] | None, param: str) -> Choice:
    """A choice among texts other than labels."""
    labels = tuple(tuple(_target(served, text, messages)) for text in texts)
    if len(labels) == 1:
        return Choice(labels, None, (0,))
    try:
        return Choice(labels, LabelTrie(labels), tuple(range(len(labels))))
    except ValueError:
        raise RequestError(
            f"{param}: two of the texts have the same tokens, or one contains an end token; change one"
        ) from None


def _target(served: Served, text: str, messages: Sequence[Message] | None) -> list[int]:
    """The tokens of an answer, with the end token."""
    if messages is not None and served.conversation is not None:
        return served.conversation.answer(messages, {"role": "assistant", "content": text}).target_ids
    encoder: Encoder = served.encoder or served.raw
    fields = template_fields(encoder.template.target)
    if messages is not None and len(fields) == 1:
        return encoder.target_ids({fields[0]: text})
    return served.raw.target_ids({"text": text})


def instances(schema: dict[str, Any]) -> list[tuple[Any, str]] | None:
    """All values of an enum, each with the JSON text that holds it; of an object, if only one field has a choice. None: the
    schema is of another kind. A null is left out."""
    values = _values(schema, schema)
    if values is not None:
        return [(value, json.dumps(value, ensure_ascii=False)) for value in values if value is not None] or None
    root = schema
    schema = _resolved(schema, root)
    fields = schema.get("properties")
    if schema.get("type", "object") != "object" or not isinstance(fields, dict) or not fields:
        return None
    found = {name: _values(each, root) for name, each in fields.items()}
    if any(not each for each in found.values()) or not set(schema.get("required", ())) <= set(found):
        return None
    several = [name for name, each in found.items() if len(each or ()) > 1]
    if len(several) > 1:
        return None
    name = several[0] if several else next(iter(found))
    fixed = {other: (each or [None])[0] for other, each in found.items()}
    return [
        (value, json.dumps(fixed | {name: value}, ensure_ascii=False)) for value in found[name] or () if value is not None
    ] or None


def _values(schema: Any, root: dict[str, Any]) -> list[Any] | None:
    """The values of an enum; None: the schema is of another kind, or has too many."""
    values = list(_listed(_resolved(schema, root), root, 0))
    if not values or ... in values or len(values) > OPTIONS:
        return None
    plain = [value for value in values if not isinstance(value, dict | list)]
    return list({json.dumps(value): value for value in plain}.values()) if len(plain) == len(values) else None


def _listed(schema: dict[str, Any], root: dict[str, Any], depth: int) -> Iterator[Any]:
    """The values of an enum; an ellipsis for what is not one."""
    if "const" in schema:
        yield schema["const"]
    elif isinstance(schema.get("enum"), list):
        yield from schema["enum"]
    elif schema.get("type") == "boolean":
        yield from (True, False)
    elif schema.get("type") == "null":
        yield None
    elif (parts := schema.get("anyOf") or schema.get("oneOf")) and isinstance(parts, list) and depth < 4:
        for part in parts:
            yield from _listed(_resolved(part, root), root, depth + 1)
    else:
        yield ...


def _resolved(schema: Any, root: dict[str, Any]) -> dict[str, Any]:
    """A schema behind references within the document."""
    for _ in range(16):
        if not isinstance(schema, dict):
            return {}
        parts = schema.get("allOf")
        if isinstance(parts, list) and len(parts) == 1:
            schema = parts[0]
            continue
        reference = schema.get("$ref")
        if not isinstance(reference, str):
            return schema
        if not reference.startswith("#"):
            return {}
        schema = root
        for name in reference.removeprefix("#").split("/")[1:]:
            schema = schema.get(name.replace("~1", "/").replace("~0", "~")) if isinstance(schema, dict) else None
    return {}
