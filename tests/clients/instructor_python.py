from typing import Literal

import instructor
import openai
from pydantic import BaseModel
from server import KEY, LABELS, TEXT, URL, report


class Kind(BaseModel):
    """What a thing is."""

    kind: Literal["fruit", "tool"]


messages = [{"role": "user", "content": TEXT}]
stock = openai.OpenAI(base_url=URL, api_key=KEY, max_retries=0)
label = stock.chat.completions.create(model="fruits", messages=messages).choices[0].message.content
ran = []
for mode in (instructor.Mode.TOOLS, instructor.Mode.TOOLS_STRICT, instructor.Mode.JSON_SCHEMA):
    try:
        client = instructor.from_openai(stock, mode=mode)
    except (ValueError, AttributeError):
        continue
    found = client.chat.completions.create(model="fruits", messages=messages, response_model=Kind, max_retries=1)
    assert found.kind == label, (mode, found)
    ran.append(mode.name)
plain = instructor.from_openai(stock).chat.completions.create(
    model="fruits", messages=messages, response_model=Literal["fruit", "tool"], max_retries=1
)
assert plain == label and label in LABELS
assert "TOOLS" in ran
report("instructor", *ran, "Literal")
