"""Search over soft prompts that share one base, look at the leaderboard, promote the winner.

python jobs/search.py jobs/sentiment.toml name=found search.trials=8
"""

import sys

import ptuning


def main(path: str = "jobs/sentiment.toml", *overrides: str) -> None:
    experiment = ptuning.Experiment.load(path, *overrides)
    result = ptuning.search(experiment)
    for trial in result.leaderboard[:5]:
        print(trial["rank"], trial["trial"], trial["prompt.length"], trial[experiment.metric])
    registry = ptuning.Registry(experiment.compute.storage, experiment.tracking.uri)
    promotion = registry.promote(str(result.registered))
    print(f"{promotion.version} is champion, test metrics {result.metrics}")


if __name__ == "__main__":
    main(*sys.argv[1:])
