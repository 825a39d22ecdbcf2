"""Search on new rows, and make the winner champion of a name if it passes the gate: what runs every week.

python jobs/retune.py sentiment jobs/sentiment.toml name=sentiment-2026-12-07 data.train=rows.jsonl

A run needs a name of its own; the versions of all of them get the first name.
"""

import sys

import ptuning


def main(name: str, path: str = "jobs/sentiment.toml", *overrides: str) -> None:
    experiment = ptuning.Experiment.load(path, *overrides)
    result = ptuning.search(experiment, register=name)
    registry = ptuning.Registry(experiment.compute.storage, experiment.tracking.uri)
    try:
        promotion = registry.promote(str(result.registered))
    except ptuning.UserError as refused:
        sys.exit(f"the champion of {name} stays: {refused}")
    print(f"{promotion.version} is champion, test metrics {result.metrics}")


if __name__ == "__main__":
    main(*sys.argv[1:])
