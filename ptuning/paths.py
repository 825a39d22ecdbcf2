"""Files that travel with a job: `shipped:NAME` is what `ptuning submit` has put beside the experiment.

NAME contains a hash of the content and nothing of the place: nodes unpack jobs where they like, and a run that is resumed by
another job still reads what it read before.
"""

from __future__ import annotations

import sys
from pathlib import Path

SCHEME = "shipped:"
FOLDER = "shipped"
"""In a job's working directory."""


def locate(source: str) -> Path:
    """Where a path or a `shipped:NAME` lies on this node. It need not exist."""
    if not source.startswith(SCHEME):
        return Path(source).expanduser()
    name = source.removeprefix(SCHEME)
    # Ray Train and Ray Tune move workers into folders of their own; the job's stays in PYTHONPATH, on every node.
    places = (Path(folder, FOLDER, name).absolute() for folder in sys.path)
    return next((path for path in places if path.exists()), Path(FOLDER, name))
