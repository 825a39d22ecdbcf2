"""Compares this project with its peers on the same work: `python jobs/benchmark.py train`.

Both sides run on the same base, data, dtype and threads, alternately (A B B A), and must agree on the result before they are
timed. Ratios are medians over pairs with a bootstrap interval; absolute times depend on the machine.
"""

from __future__ import annotations

import argparse

from benchmarks import budget, plan, quality, scale, search, serve, train


def main() -> None:
    """Parse the command line and run one benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    for module in (train, scale, search, budget, serve, quality, plan):
        module.add(commands)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
