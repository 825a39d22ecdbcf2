"""/v1/responses: its requests as chat requests, and its answers, complete or as a stream of events.

Stateless: nothing is stored, so each request contains the whole conversation. What chat completions can do, this route can do.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, model_validator
from pydantic_core import to_json

from ptuning.serving.answers import Answered, ErrorBody, ResponseObject, ResponseUsage, Usage
from ptuning.serving.completion import Piece
from ptuning.serving.loading import Served
from ptuning.serving.protocol import ChatRequest, Count, Name, Sampled, Shape
from ptuning.serving.replies import CompletionReply, call_id, chat_logprob
from ptuning.serving.structured import Tool


class InputPart(Shape):
    type: Literal["input_text", "output_text", "text"]
    text: str


class Refusal(Shape):
    type: Literal["refusal"]
    refusal: str


class Item(Shape):
    """A message, the call of a function, or the result of one."""

    type: Literal["message", "function_call", "function_call_output"] = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | Annotated[list[Annotated[InputPart | Refusal, Field(discriminator="type")]], Field(min_length=1)] | None = (
        None
    )
    call_id: str | None = None
    arguments: str | None = None
    output: str | Annotated[list[InputPart], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _is_whole(self) -> Item:
        needed = {"message": ("role", "content"), "function_call": ("arguments",), "function_call_output": ("output",)}[
            self.type
        ]
        for name in needed:
            if getattr(self, name) is None:
                raise ValueError(f"{name}: is missing; send it with every {self.type.replace('_', ' ')}")
        return self

    @property
    def message(self) -> dict[str, Any]:
        """As a message of a chat request."""
        if self.type == "function_call":
            return {"role": "assistant", "content": self.arguments}
        if self.type == "function_call_output":
            return {"role": "tool", "content": _text(self.output)}
        return {"role": self.role, "content": _text(self.content)}


def _text(content: str | Sequence[InputPart | Refusal] | None) -> str:
    if isinstance(content, str):
        return content
    return "".join(part.text if isinstance(part, InputPart) else part.refusal for part in content or ())


class Format(Shape):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class TextOptions(Shape):
    format: Format | None = None
    verbosity: Literal["medium"] | None = None


class FunctionTool(Shape):
    type: Literal["function"]
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionChoice(Shape):
    type: Literal["function"]
    name: str


class ResponsesRequest(Sampled):
    input: str | Annotated[list[Item], Field(min_length=1)]
    """A text of the user, or the whole conversation. Nothing is stored, so there is no `previous_response_id`."""
    instructions: str | None = None
    """A system message before the conversation."""
    max_output_tokens: Count | None = None
    text: TextOptions | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=128)] | None = None
    """As in chat completions: not shown to the model, unless `tool_choice` asks for a call."""
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | None = None
    truncation: Literal["auto", "disabled"] | None = None
    """auto: as `truncate`."""
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    stream_options: dict[str, Any] | None = None

    def as_chat(self) -> ChatRequest:
        """The same request of chat completions.

        Raises:
            ValidationError: the two do not agree.
        """
        given = self.model_dump(include=set(Sampled.model_fields), exclude_none=True, by_alias=True)
        messages = [{"role": "system", "content": self.instructions}] if self.instructions else []
        if isinstance(self.input, str):
            messages.append({"role": "user", "content": self.input})
        else:
            messages += [item.message for item in self.input]
        logprobs = "message.output_text.logprobs" in (self.include or ()) or bool(self.top_logprobs)
        given |= {"messages": messages, "truncate": self.truncate or self.truncation == "auto"}
        given |= {"logprobs": True, "top_logprobs": self.top_logprobs or 0} if logprobs else {}
        given |= {"max_tokens": self.max_output_tokens} if self.max_output_tokens else {}
        if self.text and self.text.format:
            form = self.text.format.model_dump(exclude_none=True, by_alias=True)
            kind = form.pop("type")
            given["response_format"] = {"type": kind} | ({"json_schema": form} if kind == "json_schema" else {})
        if self.tools:
            functions = [tool.model_dump(exclude_none=True, exclude={"type"}) for tool in self.tools]
            given["tools"] = [{"type": "function", "function": function} for function in functions]
        if isinstance(self.tool_choice, FunctionChoice):
            given["tool_choice"] = {"type": "function", "function": {"name": self.tool_choice.name}}
        elif self.tool_choice:
            given["tool_choice"] = self.tool_choice
        return ChatRequest.model_validate(given)


class ResponsesReply(CompletionReply):
    """Answers of /v1/responses, to one request."""

    prefix = "resp"

    def __init__(self, served: Served, base: str, told: bool, body: ResponsesRequest, tool: Tool | None) -> None:
        super().__init__(served, base, told, None, tool)
        self._body = body
        self._number = 0
        self._pieces: list[Piece] = []
        self._item_id = f"{'fc' if tool else 'msg'}_{uuid.uuid4().hex}"
        self._call_id = call_id()

    def whole(self, answers: Sequence[Sequence[Piece]], spent: Usage) -> BaseModel:
        (pieces,) = answers
        status = "incomplete" if pieces[-1].finish == "length" else "completed"
        return self._response(status, [self._item(pieces, status)], spent)

    def begin(self) -> bytes:
        response = self._response("in_progress", [], None).model_dump()
        head = [self._send("response.created", response=response), self._send("response.in_progress", response=response)]
        item = self._item((), "in_progress")
        if not self._tool:
            item["content"] = []
        head.append(self._send("response.output_item.added", output_index=0, item=item))
        if not self._tool:
            part = self._item((), "in_progress")["content"][0]
            head.append(self._send("response.content_part.added", **self._place, part=part))
        return b"".join(head)

    def chunk(self, index: int, piece: Piece, spent: Usage | None = None) -> bytes:
        self._pieces.append(piece)
        if not piece.text and not piece.tokens:
            return b""
        if self._tool:
            place = {"item_id": self._item_id, "output_index": 0}
            return self._send("response.function_call_arguments.delta", **place, delta=piece.text)
        return self._send("response.output_text.delta", **self._place, delta=piece.text, logprobs=self._logprobs([piece]))

    def end(self, spent: Usage) -> bytes:
        response = self.whole([self._pieces], spent).model_dump()
        (item,) = response["output"]
        if self._tool:
            place = {"item_id": self._item_id, "output_index": 0, "name": item["name"]}
            sent = [self._send("response.function_call_arguments.done", **place, arguments=item["arguments"])]
        else:
            (part,) = item["content"]
            text = {"text": part["text"], "logprobs": part["logprobs"]}
            sent = [self._send("response.output_text.done", **self._place, **text)]
            sent.append(self._send("response.content_part.done", **self._place, part=part))
        sent.append(self._send("response.output_item.done", output_index=0, item=item))
        sent.append(self._send(f"response.{response['status']}", response=response))
        return b"".join(sent)

    def failed(self, error: ErrorBody) -> bytes:
        found = error.error
        return self._send("error", code=found.code, message=found.message, param=found.param, error=found)

    @property
    def _place(self) -> dict[str, Any]:
        return {"item_id": self._item_id, "output_index": 0, "content_index": 0}

    def _send(self, kind: str, **values: Any) -> bytes:
        data = to_json({"type": kind, "sequence_number": self._number} | values)
        self._number += 1
        return b"event: " + kind.encode() + b"\ndata: " + data + b"\n\n"

    def _item(self, pieces: Sequence[Piece], status: str) -> dict[str, Any]:
        text = "".join(piece.text for piece in pieces)
        if self._tool:
            call = {"call_id": self._call_id, "name": self._tool.name, "arguments": text}
            return {"type": "function_call", "id": self._item_id, "status": status} | call
        part = {"type": "output_text", "text": text, "annotations": [], "logprobs": self._logprobs(pieces)}
        return {"type": "message", "id": self._item_id, "status": status, "role": "assistant", "content": [part]}

    def _logprobs(self, pieces: Sequence[Piece]) -> list[dict[str, Any]]:
        return [chat_logprob(token).model_dump() for piece in pieces for token in piece.tokens] if self._told else []

    def _response(self, status: Any, output: list[dict[str, Any]], spent: Usage | None) -> ResponseObject:
        body, answered = self._body, self._envelope["answered_by"]
        assert isinstance(answered, Answered)
        form = body.text.format if body.text and body.text.format else Format(type="text")
        choice = body.tool_choice
        return ResponseObject(
            id=self._envelope["id"].replace("-", "_"),
            created_at=self._envelope["created"],
            status=status,
            model=self._envelope["model"],
            output=output,
            instructions=body.instructions,
            max_output_tokens=body.max_output_tokens,
            incomplete_details={"reason": "max_output_tokens"} if status == "incomplete" else None,
            temperature=body.temperature,
            top_p=body.top_p,
            text={"format": form.model_dump(exclude_none=True, by_alias=True)},
            tool_choice=choice.model_dump() if isinstance(choice, FunctionChoice) else choice or "auto",
            tools=[tool.model_dump() for tool in body.tools or ()],
            truncation=body.truncation or "disabled",
            usage=_used(spent) if spent else None,
            answered_by=answered,
        )


def _used(spent: Usage) -> ResponseUsage:
    return ResponseUsage(
        input_tokens=spent.prompt_tokens,
        input_tokens_details=spent.prompt_tokens_details,
        output_tokens=spent.completion_tokens,
        total_tokens=spent.total_tokens,
    )
