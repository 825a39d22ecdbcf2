"""Requests and responses: the supported part of OpenAI's completions and chat completions, and classification.

Strict: parameters that are unknown or not supported are refused by name, never ignored. Parameters with a neutral value are
accepted at that value, because clients send them. Imports only pydantic.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

Temperature = Annotated[float, Field(ge=0, le=2)]
TopP = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
Seed = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
Stops = Annotated[list[Annotated[str, Field(min_length=1, max_length=1000)]], Field(max_length=16)]
TokenIds = Annotated[list[int], Field(min_length=1)]
Name = Annotated[str, Field(min_length=1, max_length=200)]


class Shape(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class StreamOptions(Shape):
    include_usage: bool = False
    """End the stream with a chunk that contains the usage."""


class TextFormat(Shape):
    type: Literal["text"]


class Body(Shape):
    """Parameters of both completions and chat completions."""

    model: Name
    """A soft prompt's name (its champion), name:3 (a version), or the base's own name."""
    n: Annotated[int, Field(ge=1, le=64)] | None = None
    stop: Annotated[Stops, BeforeValidator(_as_list)] | None = None
    max_tokens: Count | None = None
    temperature: Temperature | None = None
    """Default: 0 for soft prompts with labels, else 1."""
    top_p: TopP | None = None
    seed: Seed | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    constrain: bool | None = None
    """Answer only with one of the soft prompt's labels. Default: true if it has labels."""
    truncate: bool = False
    """Truncate a text that is too long, as in training, instead of refusing it."""
    user: str | None = None
    """An end user of the client; ignored."""
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None

    @model_validator(mode="after")
    def _options_belong_to_streams(self) -> Body:
        if self.stream_options and not self.stream:
            raise ValueError("stream_options: is only used with stream = true")
        return self


class CompletionRequest(Body):
    prompt: str | Annotated[list[str], Field(min_length=1)] | TokenIds | Annotated[list[TokenIds], Field(min_length=1)]
    """Text, to which no template is applied, or token ids of the vocabulary."""
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None


class TextPart(Shape):
    type: Literal["text"]
    text: str


class Message(Shape):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1)]
    name: str | None = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(Body):
    messages: Annotated[list[Message], Field(min_length=1)]
    """A soft prompt that was trained on conversations, and the bare base, take all messages by their chat template. One with a
    plain template takes one user message: its text, or a JSON object if the template has several fields."""
    add_generation_prompt: bool | None = None
    """False only with `continue_final_message`."""
    continue_final_message: bool | None = None
    """Continue the last message, which is the begin of an answer. The response contains the rest."""
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: TextFormat | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> ChatRequest:
        if self.add_generation_prompt is not None and self.add_generation_prompt == bool(self.continue_final_message):
            raise ValueError("add_generation_prompt: is the opposite of continue_final_message; leave it out")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: is only used with logprobs = true")
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens: differs from max_completion_tokens; send one of them")
        return self


Fields = Annotated[dict[Annotated[str, Field(max_length=200)], str], Field(min_length=1, max_length=100)]


class Conversation(Shape):
    messages: Annotated[list[Message], Field(min_length=1)]

    def fields(self) -> dict[str, Any]:
        """As an encoder takes it."""
        return {"messages": [{"role": message.role, "content": message.text} for message in self.messages]}


class ClassifyRequest(Shape):
    model: Name
    input: str | Conversation | Fields | Annotated[list[str | Conversation | Fields], Field(min_length=1)]
    """A text, an object with the template's fields, or a conversation (an object with `messages`); or a list of them."""
    truncate: bool = False


class Usage(Shape):
    prompt_tokens: int
    """Tokens of the text, including the template's own words."""
    completion_tokens: int = 0
    total_tokens: int = 0
    virtual_tokens: int = 0
    """Length of the soft prompt; not included in the other numbers."""
    prompt_tokens_details: dict[str, int] | None = None
    """`cached_tokens`: text and virtual tokens whose keys and values were in the cache."""


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
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


Finish = Literal["stop", "length"]


class CompletionChoice(Shape):
    index: int
    text: str
    finish_reason: Finish | None
    logprobs: CompletionLogprobs | None = None


class ChatMessage(Shape):
    role: Literal["assistant"] = "assistant"
    content: str


class Delta(Shape):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChoice(Shape):
    index: int
    message: ChatMessage
    finish_reason: Finish | None
    logprobs: ChatLogprobs | None = None


class ChunkChoice(Shape):
    index: int
    delta: Delta
    finish_reason: Finish | None = None
    logprobs: ChatLogprobs | None = None


class Envelope(Shape):
    """Fields of every answer."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    answered_by: Answered
    usage: Usage | None = None


class Completion(Envelope):
    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]


class ChatCompletion(Envelope):
    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]


class ChatChunk(Envelope):
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChunkChoice]


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


def complaint(error: ValidationError) -> tuple[str, str | None]:
    """The first problem of a request as one sentence, and the parameter it concerns.

    The sentence never repeats a value from the client, and names of parameters only as printable text.
    """
    problems = error.errors(include_input=False, include_url=False)
    problem = problems[0]
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "json_invalid":
        return f"the body is not valid JSON ({message.removeprefix('Invalid JSON: ')}); send a JSON object", None
    if problem["type"] == "value_error" and not problem["loc"]:
        return message, message.partition(":")[0]
    if not problem["loc"]:
        return "the body is not a JSON object; send one", None
    param = printable(str(problem["loc"][0]))
    if problem["type"] == "extra_forbidden" and len(problem["loc"]) == 1:
        return f"{param}: is not supported; remove it", param
    if problem["type"] == "missing" and len(problem["loc"]) == 1:
        return f"{param}: is missing; send it", param
    # After the parameter's name come nested fields and indices, and names of internal classes, which must not be disclosed.
    where = ".".join([param, *(str(part) for part in problem["loc"][1:] if isinstance(part, int) or part in _FIELDS)])
    if problem["type"] in ("literal_error", "too_long") and param in Body.model_fields:
        return f"{where}: is not supported at this value; remove it", param
    return f"{where}: {message[0].lower()}{message[1:]}", param


_FIELDS = {field for shape in (*Shape.__subclasses__(), *Body.__subclasses__()) for field in shape.model_fields}


def printable(text: str) -> str:
    """Text from a client, made safe for an answer: short and printable."""
    return "".join(letter if letter.isprintable() else "?" for letter in text[:80])
