"""Train a soft prompt, register it, ask it two questions: the Python API in a dozen lines.

python jobs/train.py jobs/sentiment.toml train.steps=100
"""

import sys

import ptuning


def main(path: str = "jobs/sentiment.toml", *overrides: str) -> None:
    experiment = ptuning.Experiment.load(path, *overrides)
    result = ptuning.train(experiment, register=experiment.name)
    print(f"{result.registered}: {result.metrics}")
    with ptuning.Predictor(result.soft_prompt) as predictor:
        texts = ["The food was cold and nobody said sorry.", "I would come back any day."]
        for text, shares in zip(texts, predictor.probabilities(texts), strict=True):
            label = max(shares, key=lambda each: shares[each])
            print(f"{label} ({shares[label]:.2f}): {text}")


if __name__ == "__main__":
    main(*sys.argv[1:])
