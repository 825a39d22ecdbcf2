from haystack.components.generators.chat import OpenAIChatGenerator
from haystack.dataclasses import ChatMessage
from haystack.utils import Secret
from server import KEY, LABELS, TEXT, URL, report

parts = []
how = {"api_key": Secret.from_token(KEY), "api_base_url": URL, "model": "fruits"}
answer = OpenAIChatGenerator(**how).run([ChatMessage.from_user(TEXT)])["replies"][0]
assert answer.text in LABELS
streamed = OpenAIChatGenerator(**how, streaming_callback=lambda part: parts.append(part.content))
assert streamed.run([ChatMessage.from_user(TEXT)])["replies"][0].text == answer.text == "".join(part or "" for part in parts)
report("haystack-ai", "run", "stream")
