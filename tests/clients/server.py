"""Where the server is, and how a client script reports. Every script runs in an environment that has only its client."""

from __future__ import annotations

import json
import os
from importlib.metadata import version

URL, KEY = os.environ.get("CLIENT_URL", ""), os.environ.get("CLIENT_KEY", "")
TOKENIZER = os.environ.get("CLIENT_BASE", "")
"""Folder of the base."""
LABELS = ("fruit", "tool")
TEXT = "the old hammer"


def report(package: str, *ran: str) -> None:
    """What has worked; the last line of a script."""
    print(json.dumps({"version": version(package), "ran": ran}))
