from typing import Literal

from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel
from server import KEY, LABELS, TEXT, URL, report


class Kind(BaseModel):
    kind: Literal["fruit", "tool"]


how = {"api_base": URL, "api_key": KEY, "is_chat_model": True, "max_retries": 0}
model = OpenAILike(model="fruits", is_function_calling_model=True, **how)
label = model.chat([ChatMessage(role="user", content=TEXT)]).message.content
assert label in LABELS
assert [*model.stream_chat([ChatMessage(role="user", content=TEXT)])][-1].message.content == label
assert model.as_structured_llm(Kind).chat([ChatMessage(role="user", content=TEXT)]).raw.kind == label
assert OpenAILike(model="raw", api_base=URL, api_key=KEY, is_chat_model=False, max_tokens=4).complete(TEXT).text is not None
report("llama-index-llms-openai-like", "chat", "stream", "structured", "complete")
