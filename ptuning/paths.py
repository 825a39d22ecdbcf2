"""Files that are uploaded with a job: `shipped:NAME` is a file that `ptuning submit` has packed with the experiment.

NAME contains a hash of the content but no path: nodes unpack jobs into different folders, and a run that is resumed by another
job must find the same file.
"""

from __future__ import annotations

import sys
from pathlib import Path

SCHEME = "shipped:"
FOLDER = "shipped"
"""In a job's working directory."""


def is_path(source: str) -> bool:
    """True unless a source of rows is a data set, a built-in task, an address, or was uploaded with a job."""
    return "://" not in source and not source.startswith(("hub:", "builtin:", SCHEME))


def locate(source: str) -> Path:
    """The location of a path or `shipped:NAME` on this node. It need not exist."""
    if not source.startswith(SCHEME):
        return Path(source).expanduser()
    name = source.removeprefix(SCHEME)
    # Ray Train and Ray Tune change the working folder of workers; the job's folder stays in PYTHONPATH, on every node.
    places = (Path(folder, FOLDER, name).absolute() for folder in sys.path)
    return next((path for path in places if path.exists()), Path(FOLDER, name))
