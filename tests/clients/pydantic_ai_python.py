from typing import Literal

from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider
from server import KEY, LABELS, TEXT, URL, report


class Kind(BaseModel):
    kind: Literal["fruit", "tool"]


provider = OpenAIProvider(base_url=URL, api_key=KEY)
chat = OpenAIChatModel("fruits", provider=provider)
label = Agent(chat).run_sync(TEXT).output
assert label in LABELS
assert Agent(chat, output_type=Kind).run_sync(TEXT).output.kind == label
assert Agent(chat, output_type=NativeOutput(Kind)).run_sync(TEXT).output.kind == label
assert Agent(OpenAIResponsesModel("fruits", provider=provider)).run_sync(TEXT).output == label
turns = Agent(OpenAIChatModel("kinds", provider=provider), system_prompt="be brief")
assert turns.run_sync("more", message_history=turns.run_sync(TEXT).all_messages()).output in LABELS
called = Agent(OpenAIChatModel("kinds", provider=provider), output_type=Kind)
assert called.run_sync("more", message_history=called.run_sync(TEXT).all_messages()).output.kind in LABELS
report("pydantic-ai-slim", "run", "tool output", "native output", "responses", "history")
