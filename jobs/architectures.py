"""Checks this project on tiny bases of every architecture of transformers, and renders the results as a page.

    python jobs/architectures.py check --out build/architectures.jsonl [--types llama gpt2] [--columns train serve] [--resume]
    python jobs/architectures.py render build/architectures.jsonl docs/reference/architectures.md

Each base takes a few seconds on one core. Results are appended to the file at once, one line of JSON for each base; `--resume`
skips what the file contains, and tries again what could not be built.
"""

from __future__ import annotations

import os

# Before anything imports transformers or DeepSpeed: they read these once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import sys
import warnings
from pathlib import Path

from matrix import page, runner
from matrix.checks import COLUMNS
from matrix.variants import find_cases


def main() -> None:
    """Parse the command line and run one command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    checking = commands.add_parser("check", help="check bases")
    checking.add_argument("--types", nargs="+", default=[], help="model types or variants; default: all")
    checking.add_argument("--columns", nargs="+", choices=list(COLUMNS), help="what is checked; default: all but zero")
    checking.add_argument("--zero", action="store_true", help="also ZeRO-3 with two processes")
    checking.add_argument("--resume", action="store_true", help="skip what the file contains")
    checking.add_argument("--out", type=Path, default=Path("build/architectures.jsonl"), help="file of results")
    checking.set_defaults(run=check)
    rendering = commands.add_parser("render", help="write the results as Markdown")
    rendering.add_argument("results", type=Path)
    rendering.add_argument("page", type=Path)
    rendering.set_defaults(run=render)
    arguments = parser.parse_args()
    arguments.run(arguments)


def check(arguments: argparse.Namespace) -> None:
    """Check bases and append each result to the file."""
    warnings.filterwarnings("ignore")
    columns = [name for name in COLUMNS if name in (arguments.columns or [*set(COLUMNS) - {"zero"}])]
    columns = ["accepted", *(name for name in columns if name != "accepted")]
    if arguments.zero and "zero" not in columns:
        columns.append("zero")
    try:
        chosen = find_cases(arguments.types)
    except ValueError as error:
        sys.exit(f"--types: {error}")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    before = runner.read(arguments.out) if arguments.resume and arguments.out.exists() else []
    done = {line["name"] for line in before if runner.complete(line, columns)}
    with arguments.out.open("a" if arguments.resume else "w", encoding="utf-8") as file:

        def tell(line: runner.Line) -> None:
            file.write(json.dumps(line) + "\n")
            file.flush()
            cells = " ".join(f"{column}={cell['result']}" for column, cell in line["cells"].items())
            print(
                f"{line['name']:24}{line['seconds']:6.1f} s  {line['facts'].get('way', '-'):5}{line['built'] or cells}",
                flush=True,
            )

        file.write(json.dumps({"versions": runner.versions()}) + "\n")
        runner.run([case for case in chosen if case.name not in done], columns, tell)
        found = runner.counts(runner.read(arguments.out))
        file.write(json.dumps({"counts": found}) + "\n")
    for column, results in found.items():
        print(f"{column:10}" + ", ".join(f"{number} {result}" for result, number in sorted(results.items())))


def render(arguments: argparse.Namespace) -> None:
    """Write the results as a Markdown page."""
    everything = [json.loads(line) for line in arguments.results.read_text(encoding="utf-8").splitlines()]
    versions: dict[str, str] = next((line["versions"] for line in reversed(everything) if "versions" in line), {})
    arguments.page.parent.mkdir(parents=True, exist_ok=True)
    arguments.page.write_text(page.page(runner.read(arguments.results), versions), encoding="utf-8")


if __name__ == "__main__":
    main()
