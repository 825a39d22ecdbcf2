import asyncio
from typing import Literal

from agents import Agent, OpenAIChatCompletionsModel, OpenAIResponsesModel, Runner, set_tracing_disabled
from openai import AsyncOpenAI
from pydantic import BaseModel
from server import KEY, LABELS, TEXT, URL, report


class Kind(BaseModel):
    kind: Literal["fruit", "tool"]


async def main() -> None:
    client = AsyncOpenAI(base_url=URL, api_key=KEY, max_retries=0)
    responses = OpenAIResponsesModel(model="fruits", openai_client=client)  # the default of the library
    label = (await Runner.run(Agent(name="a", model=responses), TEXT)).final_output
    assert label in LABELS
    assert (await Runner.run(Agent(name="a", model=responses, output_type=Kind), TEXT)).final_output.kind == label
    streamed = Runner.run_streamed(Agent(name="a", model=responses), TEXT)
    assert [event async for event in streamed.stream_events()] and streamed.final_output == label
    chat = OpenAIChatCompletionsModel(model="fruits", openai_client=client)
    assert (await Runner.run(Agent(name="a", model=chat), TEXT)).final_output == label
    kinds = OpenAIResponsesModel(model="kinds", openai_client=client)
    assert (await Runner.run(Agent(name="a", instructions="be brief", model=kinds), TEXT)).final_output in LABELS


set_tracing_disabled(True)
asyncio.run(main())
report("openai-agents", "responses", "output_type", "stream", "chat completions", "instructions")
