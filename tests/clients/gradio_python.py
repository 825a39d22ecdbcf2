import os

os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_SERVER_NAME": "127.0.0.1"}

import gradio
from gradio_client import Client
from server import KEY, LABELS, TEXT, URL, report

for streaming in (False, True):
    page = gradio.load_chat(URL, model="fruits", token=KEY, file_types=None, streaming=streaming, api_name="chat")
    _, address, _ = page.launch(prevent_thread_lock=True, quiet=True)
    try:
        answer = Client(address, verbose=False).predict(TEXT, api_name="/chat")
    finally:
        page.close()
    assert answer in LABELS, answer
report("gradio", "load_chat", "load_chat streamed")
