"""Compares this project with its peers on the same work: `python jobs/benchmark.py train`.

Both sides run on the same base, data, dtype and threads, alternately (A B B A), and must agree on the result before they are
timed. Ratios are medians over pairs with a bootstrap interval; absolute times depend on the machine.
"""

from __future__ import annotations

import argparse
import importlib
import sys

COMMANDS = ("train", "scale", "search", "budget", "serve", "batch", "predict", "prompts", "tuning",
            "quality", "distill", "plan", "gpu")  # fmt: skip


def main() -> None:
    """Parse the command line and run one benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    chosen = sys.argv[1:2]  # only its module is imported: not every machine has what the others need
    for name in chosen if chosen and chosen[0] in COMMANDS else COMMANDS:
        importlib.import_module(f"benchmarks.{name}").add(commands)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
