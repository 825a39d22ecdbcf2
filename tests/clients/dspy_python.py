from typing import Literal

import dspy
from server import KEY, TEXT, URL, report

model = dspy.LM("openai/talk", api_base=URL, api_key=KEY, max_tokens=64, cache=False, num_retries=0)
assert len(model(TEXT)) == 1


class Sort(dspy.Signature):
    """What a thing is."""

    text: str = dspy.InputField()
    kind: Literal["fruit", "tool"] = dspy.OutputField()


schema = {
    "type": "json_schema",
    "json_schema": {
        "name": "x",
        "schema": {"properties": {"kind": {"enum": ["fruit", "tool"]}}, "type": "object", "required": ["kind"]},
    },
}
structured = dspy.LM(
    "openai/talk", api_base=URL, api_key=KEY, max_tokens=64, cache=False, num_retries=0, response_format=schema
)
with dspy.context(lm=structured, adapter=dspy.JSONAdapter()):
    assert dspy.Predict(Sort)(text=TEXT).kind in ("fruit", "tool")
report("dspy", "LM", "Predict with JSONAdapter")
