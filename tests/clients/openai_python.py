import json
import time
from typing import Literal

import openai
from pydantic import BaseModel
from server import KEY, LABELS, TEXT, URL, report


class Kind(BaseModel):
    kind: Literal["fruit", "tool"]


client = openai.OpenAI(base_url=URL, api_key=KEY, max_retries=0)
messages = [{"role": "user", "content": TEXT}]
assert {"fruits", "talk"} <= {model.id for model in client.models.list()}
answer = client.chat.completions.create(model="fruits", messages=messages)
label = answer.choices[0].message.content
assert label in LABELS
parts = client.chat.completions.create(model="fruits", messages=messages, stream=True)
assert "".join(part.choices[0].delta.content or "" for part in parts) == label
parsed = client.chat.completions.parse(model="fruits", messages=messages, response_format=Kind)
assert parsed.choices[0].message.parsed.kind == label
assert client.responses.create(model="fruits", input=TEXT).output_text == label
assert client.responses.parse(model="fruits", input=TEXT, text_format=Kind).output_parsed.kind == label
with client.responses.stream(model="fruits", input=TEXT) as stream:
    list(stream)
    assert stream.get_final_response().output_text == label
scored = client.completions.create(model="raw", prompt=TEXT, echo=True, logprobs=1, max_tokens=0)
assert scored.choices[0].logprobs.token_logprobs[0] is None
again = [*messages, answer.choices[0].message.model_dump(), {"role": "user", "content": "more"}]
assert client.chat.completions.create(model="talk", messages=again, max_tokens=4).usage.prompt_tokens > 8

lines = [
    {"custom_id": str(n), "method": "POST", "url": "/v1/chat/completions", "body": {"model": "fruits", "messages": messages}}
    for n in range(3)
]
content = "".join(json.dumps(line) + "\n" for line in lines).encode()
file = client.files.create(file=("lines.jsonl", content), purpose="batch")
assert client.files.wait_for_processing(file.id).bytes == len(content) == len(client.files.content(file.id).read())
assert file.id in [each.id for each in client.files.list(purpose="batch")] and client.files.retrieve(file.id) == file
batch = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
while batch.status not in ("completed", "failed"):
    time.sleep(0.5)
    batch = client.batches.retrieve(batch.id)
rows = [json.loads(line) for line in client.files.content(batch.output_file_id).text.splitlines()]
assert [row["response"]["body"]["choices"][0]["message"]["content"] for row in rows] == [label] * 3
assert batch.id in [each.id for each in client.batches.list()]
assert client.files.delete(file.id).deleted
report("openai", "chat", "stream", "parse", "responses", "echo", "conversation", "files", "batches")
