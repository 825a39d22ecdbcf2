import litellm
from server import KEY, LABELS, TEXT, URL, report

how = {"model": "openai/fruits", "api_base": URL, "api_key": KEY, "messages": [{"role": "user", "content": TEXT}]}
answer = litellm.completion(**how)
label = answer.choices[0].message.content
assert label in LABELS and answer.usage.prompt_tokens >= (answer.usage.prompt_tokens_details.cached_tokens or 0)
assert "".join(part.choices[0].delta.content or "" for part in litellm.completion(**how, stream=True)) == label
text = litellm.text_completion(model="text-completion-openai/raw", api_base=URL, api_key=KEY, prompt=TEXT, max_tokens=4)
assert text.choices[0].text is not None
responses = litellm.responses(model="openai/fruits", api_base=URL, api_key=KEY, input=TEXT)
assert responses.output[0].content[0].text == label
report("litellm", "completion", "stream", "text_completion", "responses")
