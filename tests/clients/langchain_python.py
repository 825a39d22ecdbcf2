from typing import Literal

from langchain_openai import ChatOpenAI
from pydantic import BaseModel
from server import KEY, LABELS, TEXT, URL, report


class Kind(BaseModel):
    """What a thing is."""

    kind: Literal["fruit", "tool"]


model = ChatOpenAI(base_url=URL, api_key=KEY, model="fruits", max_retries=0)
answer = model.invoke(TEXT)
assert answer.content in LABELS and answer.usage_metadata["input_tokens"] > 0
assert "".join(chunk.content for chunk in model.stream(TEXT)) == answer.content
ran = []
for method in ("json_schema", "function_calling"):
    assert model.with_structured_output(Kind, method=method).invoke(TEXT).kind == answer.content, method
    ran.append(method)
talk = ChatOpenAI(base_url=URL, api_key=KEY, model="talk", max_tokens=4, max_retries=0)
assert talk.invoke([("system", "be brief"), ("human", TEXT)]).response_metadata["finish_reason"] in ("stop", "length")
responses = ChatOpenAI(base_url=URL, api_key=KEY, model="fruits", use_responses_api=True, max_retries=0)
assert responses.invoke(TEXT).text.strip() in LABELS
report("langchain-openai", "invoke", "stream", *(f"with_structured_output {method}" for method in ran), "responses")
