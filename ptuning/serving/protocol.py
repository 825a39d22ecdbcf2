"""Requests: the supported part of OpenAI's completions, chat completions and responses, and classification.

Strict: parameters that are unknown or not supported are refused by name, never ignored. `neutral` lists the parameters that
are accepted at a value that changes nothing. Imports only pydantic.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Temperature = Annotated[float, Field(ge=0, le=2)]
TopP = Annotated[float, Field(gt=0, le=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
CountOrNone = Annotated[int, Field(ge=0, le=2**31 - 1)]
Seed = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
Stops = Annotated[list[Annotated[str, Field(min_length=1, max_length=1000)]], Field(max_length=16)]
TokenIds = Annotated[list[int], Field(min_length=1)]
Name = Annotated[str, Field(min_length=1, max_length=200)]
Biases = Annotated[
    dict[Annotated[str, Field(pattern=r"^\d{1,9}$")], Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1000)
]


class Shape(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class StreamOptions(Shape):
    include_usage: bool | None = None
    """End the stream with a chunk that contains the usage."""
    continuous_usage_stats: bool | None = None
    """With `include_usage`: every chunk contains the usage so far."""


class Structured(Shape):
    choice: Annotated[list[str], Field(min_length=1, max_length=1000)] | None = None
    """The answer is one of these texts, by their probabilities."""
    json_: Annotated[dict[str, Any] | None, Field(alias="json")] = None
    """The answer is JSON of this schema."""

    @model_validator(mode="after")
    def _one(self) -> Structured:
        if (self.choice is None) == (self.json_ is None):
            raise ValueError("choice: send either this or json")
        return self


class Sampled(Shape):
    """How tokens are chosen, in all routes."""

    model: Name
    """A soft prompt's name (its champion), name:3 (a version), or the base's own name."""
    temperature: Temperature | None = None
    """Default: 0 for soft prompts with labels, else 1."""
    top_p: TopP | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    """Sample from this many most likely tokens; 0 and -1: from all."""
    min_p: Share | None = None
    """Sample from tokens that are at least this fraction as likely as the most likely one."""
    frequency_penalty: Penalty | None = None
    """Subtracted from a token's logit for every time that the answer contains it."""
    presence_penalty: Penalty | None = None
    """Subtracted from the logits of tokens that the answer contains."""
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    """Divides the logits of tokens that the text or the answer contains (negative logits are multiplied). 1: no effect."""
    logit_bias: Biases | None = None
    """Added to the logits of these token ids."""
    stop_token_ids: Annotated[list[CountOrNone], Field(max_length=128)] | None = None
    """Further tokens that end the answer."""
    min_tokens: CountOrNone | None = None
    """No end token and no stop string before this many tokens."""
    ignore_eos: bool | None = None
    """Continue after the end token, up to `max_tokens`."""
    seed: Seed | None = None
    stream: bool | None = None
    constrain: bool | None = None
    """Answer only with one of the soft prompt's labels. Default: true if it has labels."""
    truncate: bool = False
    """Truncate a text that is too long, as in training, instead of refusing it."""
    structured_outputs: Structured | None = None


class Body(Sampled):
    """Parameters of both completions and chat completions."""

    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stop: Annotated[Stops, BeforeValidator(_as_list)] | None = None
    max_tokens: CountOrNone | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _options_belong_to_streams(self) -> Body:
        if self.stream_options and not self.stream:
            raise ValueError("stream_options: is only used with stream = true")
        return self


class CompletionRequest(Body):
    prompt: str | Annotated[list[str], Field(min_length=1)] | TokenIds | Annotated[list[TokenIds], Field(min_length=1)]
    """Text, to which no template is applied, or token ids of the vocabulary."""
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None
    """Begin the answer with the prompt; with `logprobs` also with those of its tokens. `max_tokens` may be 0."""

    @model_validator(mode="after")
    def _something_is_asked(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens: 0 is only used with echo = true")
        return self


class TextPart(Shape):
    type: Literal["text"]
    text: str


class RefusalPart(Shape):
    type: Literal["refusal"]
    refusal: str


Part = Annotated[TextPart | RefusalPart, Field(discriminator="type")]


class CalledFunction(Shape):
    name: str
    arguments: str


class ToolCall(Shape):
    id: str | None = None
    type: Literal["function"] = "function"
    index: int | None = None
    function: CalledFunction


class Message(Shape):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Annotated[list[Part], Field(min_length=1)] | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None

    @property
    def text(self) -> str:
        """Its text. Without any: the arguments of its tool calls, which were the text that the model wrote."""
        if isinstance(self.content, str):
            text = self.content
        else:
            text = "".join(part.text if isinstance(part, TextPart) else part.refusal for part in self.content or ())
        return text or "\n".join(call.function.arguments for call in self.tool_calls or ())

    @property
    def spoken(self) -> dict[str, str]:
        """As a chat template takes it. The result of a tool is a message of the user: no model here was trained with tools."""
        return {"role": "user" if self.role in ("tool", "function") else self.role, "content": self.text}

    @model_validator(mode="after")
    def _has_text(self) -> Message:
        if self.content is None and (self.role != "assistant" or not self.tool_calls):
            raise ValueError("content: is missing; send the text of the message")
        return self


class JsonSchema(Shape):
    name: str | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(Shape):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> ResponseFormat:
        if self.type == "json_schema" and (self.json_schema is None or self.json_schema.schema_ is None):
            raise ValueError("json_schema.schema: is missing; send it")
        return self


class Function(Shape):
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Shape):
    type: Literal["function"]
    function: Function


class NamedFunction(Shape):
    name: str


class NamedTool(Shape):
    type: Literal["function"]
    function: NamedFunction


class ChatRequest(Body):
    messages: Annotated[list[Message], Field(min_length=1)]
    """A soft prompt that was trained on conversations, and the bare base, take all messages by their chat template. One with a
    plain template takes one user message: its text, or a JSON object if the template has several fields."""
    add_generation_prompt: bool | None = None
    """False only with `continue_final_message`."""
    continue_final_message: bool | None = None
    """Continue the last message, which is the begin of an answer. The response contains the rest."""
    max_completion_tokens: CountOrNone | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    """Accepted, but not shown to the model, which answers with text, unless `tool_choice` asks for a call."""
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    """A function's name, or `required` with one tool: the answer is a call of it, whose arguments follow its schema."""

    @model_validator(mode="after")
    def _fits_together(self) -> ChatRequest:
        if self.add_generation_prompt is not None and self.add_generation_prompt == bool(self.continue_final_message):
            raise ValueError("add_generation_prompt: is the opposite of continue_final_message; leave it out")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: is only used with logprobs = true")
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens: differs from max_completion_tokens; send one of them")
        if 0 in (self.max_tokens, self.max_completion_tokens):
            raise ValueError("max_tokens: must be at least 1")
        return self


Fields = Annotated[dict[Annotated[str, Field(max_length=200)], str], Field(min_length=1, max_length=100)]


class Conversation(Shape):
    messages: Annotated[list[Message], Field(min_length=1)]

    def fields(self) -> dict[str, Any]:
        """As an encoder takes it."""
        return {"messages": [message.spoken for message in self.messages]}


class ClassifyRequest(Shape):
    model: Name
    input: str | Conversation | Fields | Annotated[list[str | Conversation | Fields], Field(min_length=1)]
    """A text, an object with the template's fields, or a conversation (an object with `messages`); or a list of them."""
    truncate: bool = False
