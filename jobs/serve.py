"""Serve the registered soft prompts of a base, ask one of them with OpenAI's client, stop.

python jobs/serve.py jobs/sentiment.toml serve.port=9000
"""

import os
import sys

from openai import OpenAI

import ptuning


def main(path: str = "jobs/sentiment.toml", *overrides: str) -> None:
    experiment = ptuning.Experiment.load(path, *overrides)
    with ptuning.serve(experiment, block=False) as server:
        client = OpenAI(base_url=server.url, api_key=os.environ.get("PTUNING_API_KEY", "none"))
        question = [{"role": "user", "content": "This movie was terrible."}]
        answer = client.chat.completions.create(model=experiment.name, messages=question)  # type: ignore[arg-type]
        print(f"{answer.model}: {answer.choices[0].message.content}")


if __name__ == "__main__":
    main(*sys.argv[1:])
