"""Answers, as clients see them. Imports only pydantic."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

from ptuning.serving.protocol import Shape


class PromptDetails(Shape):
    cached_tokens: int = 0
    """Tokens of the text whose keys and values were in the cache."""
    virtual_tokens: int = 0
    """Tokens of the soft prompt, for every prompt. Not included in the other numbers."""


class Usage(Shape):
    prompt_tokens: int
    """Tokens of the text, including the template's own words. Each prompt counts once, regardless of n."""
    completion_tokens: int = 0
    total_tokens: int
    prompt_tokens_details: PromptDetails


class Answered(Shape):
    """Who has answered."""

    soft_prompt: str | None
    """name:version; None: the bare base."""
    content_hash: str | None
    base: str


class TopLogprob(Shape):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Shape):
    content: list[TokenLogprob]


class CompletionLogprobs(Shape):
    tokens: list[str]
    token_logprobs: list[float | None]
    """None: of the first token of a prompt."""
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


Finish = Literal["stop", "length", "tool_calls"]


class CompletionChoice(Shape):
    index: int
    text: str
    finish_reason: Finish | None
    logprobs: CompletionLogprobs | None = None


class FunctionCall(Shape):
    name: str | None = None
    arguments: str


class Call(Shape):
    """A call of a function, or a piece of one."""

    index: int | None = None
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionCall


class ChatMessage(Shape):
    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    tool_calls: list[Call] | None = None


class Delta(Shape):
    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[Call] | None = None


class ChatChoice(Shape):
    index: int
    message: ChatMessage
    finish_reason: Finish | None
    logprobs: ChatLogprobs | None = None


class ChunkChoice(Shape):
    index: int
    delta: Delta
    finish_reason: Finish | None
    logprobs: ChatLogprobs | None = None


class Head(Shape):
    """Fields of every answer, and of every chunk of a stream."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    usage: Usage | None = None


class Envelope(Head):
    answered_by: Answered


class Completion(Envelope):
    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]


class ChatCompletion(Envelope):
    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]


class Chunk(Head):
    answered_by: Answered | None = None
    """Only in the first chunk of a stream."""


class CompletionChunk(Chunk):
    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]


class ChatChunk(Chunk):
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChunkChoice]


class OutputDetails(Shape):
    reasoning_tokens: int = 0


class ResponseUsage(Shape):
    input_tokens: int
    input_tokens_details: PromptDetails
    output_tokens: int
    output_tokens_details: OutputDetails = OutputDetails()
    total_tokens: int


class ResponseObject(Shape):
    """The answer of /v1/responses."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: Literal["in_progress", "completed", "incomplete"]
    model: str
    output: list[dict[str, Any]]
    """One message, or one call of a function."""
    error: None = None
    incomplete_details: dict[str, str] | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    metadata: dict[str, str] = {}
    parallel_tool_calls: bool = False
    previous_response_id: None = None
    reasoning: dict[str, None] = {"effort": None, "summary": None}
    store: Literal[False] = False
    temperature: float | None = None
    text: dict[str, Any]
    tool_choice: Any
    tools: list[dict[str, Any]]
    top_p: float | None = None
    truncation: str
    usage: ResponseUsage | None = None
    user: None = None
    answered_by: Answered


class ResponseEvent(Shape):
    """An event of a stream of /v1/responses; `type` says which fields it has."""

    type: str
    sequence_number: int


class Label(Shape):
    index: int
    label: str
    probability: float
    probabilities: dict[str, float]


class Classification(Envelope):
    object: Literal["list"] = "list"
    data: list[Label]


class Model(Shape):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    max_model_len: int
    """Maximum tokens of text and answer together."""
    soft_prompt: str | None = None
    """The name:version that answers under this id."""
    content_hash: str | None = None
    length: int | None = None
    """Virtual tokens."""
    labels: list[str] | None = None
    template: str | None = None
    """Its input with fields in braces; `chat`: it takes conversations."""
    metrics: dict[str, float] | None = None


class Models(Shape):
    object: Literal["list"] = "list"
    data: list[Model]


class ErrorDetail(Shape):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(Shape):
    error: ErrorDetail


def events(*shapes: type[BaseModel]) -> dict[str, Any]:
    """The description of a stream of events in an OpenAPI document."""
    references = [{"$ref": f"#/components/schemas/{shape.__name__}"} for shape in shapes]
    text = "Server-sent events: `data: ` and one JSON object each; after chunks of completions `data: [DONE]`."
    return {"text/event-stream": {"schema": {"type": "string", "description": text, "x-event": {"anyOf": references}}}}
