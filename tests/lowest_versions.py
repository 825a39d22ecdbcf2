"""Writes the lowest versions that pyproject.toml allows, as constraints for pip: `python tests/lowest_versions.py`."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"


def lowest(project: Path = PROJECT) -> dict[str, str]:
    """Package -> its lowest version, of what ptuning and its tests need."""
    declared = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
    needed = [*declared["dependencies"], *declared["optional-dependencies"]["test"]]
    found = [re.match(r"([\w.-]+)(?:\[.*\])?>=([\w.]+)", each) for each in needed]
    return {each[1]: each[2] for each in found if each}


if __name__ == "__main__":
    print(*(f"{name}=={version}" for name, version in lowest().items()), sep="\n")
