"""Makes the pictures of the pages from what the commands really print and draw: `make pictures`, some minutes.

The demo runs in a folder of its own. Its output becomes terminal pictures (SVG, without fonts or anything else to fetch), and
the map of its search is copied.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import DIMMED_MONOKAI
from rich.text import Text

REPOSITORY = Path(__file__).resolve().parent.parent
PICTURES = REPOSITORY / "docs" / "pictures"
COLUMNS = 132
LANDSCAPE = Path("runs", "demo", "search", "report", "landscape.png")

PARTS = {
    "train": ("ptuning train ",),
    "search": ("ptuning search ",),
    "serve": ("ptuning prompts list ", "ptuning serve "),
}
"""Name of a picture, and how the commands in it begin."""


def run_demo(folder: Path) -> str:
    """What `make demo` prints, with the folder for its results."""
    (folder / "jobs").symlink_to(REPOSITORY / "jobs")
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "COLUMNS": str(COLUMNS)}
    command = [sys.executable, "jobs/demo.py"]
    done = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(done.stdout + f"the demo has failed with status {done.returncode}")
    return done.stdout.replace(f"{folder.resolve()}/", "")


def commands(output: str) -> dict[str, str]:
    """The parts of a demo's output by the command that printed them."""
    parts = re.split(r"^\$ (.*)$", output.partition("\nDone in ")[0], flags=re.MULTILINE)
    return {command: said.strip("\n") for command, said in zip(parts[1::2], parts[2::2], strict=True)}


def terminal(said: dict[str, str], title: str) -> str:
    """An SVG of a terminal in which commands were typed."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    for number, (command, lines) in enumerate(said.items()):
        console.print(Text("\n" * bool(number) + "$ ", style="bold green") + Text(command, style="bold"), highlight=False)
        console.print(Text(lines), highlight=False)
    svg = console.export_svg(title=title, theme=DIMMED_MONOKAI, unique_id=title.replace(" ", "-"))
    svg = re.sub(r"\s*@font-face \{.*?\}", "", svg, flags=re.DOTALL)  # of a server elsewhere
    return svg.replace("Fira Code, monospace", "monospace")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", type=Path, help="a folder for the demo, which stays: the next time it is only drawn again")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary)
        folder.mkdir(exist_ok=True)
        log = folder / "output.txt"
        if not log.exists():
            log.write_text(run_demo(folder), encoding="utf-8")
        said = commands(log.read_text(encoding="utf-8"))
        PICTURES.mkdir(exist_ok=True)
        for name, begins in PARTS.items():
            chosen = {command: lines for command, lines in said.items() if command.startswith(begins)}
            (PICTURES / f"{name}.svg").write_text(terminal(chosen, f"ptuning {name}"), encoding="utf-8")
        shutil.copy(folder / LANDSCAPE, PICTURES / "landscape.png")


if __name__ == "__main__":
    main()
