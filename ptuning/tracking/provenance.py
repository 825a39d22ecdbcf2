"""Provenance of a run: versions, platform, command line, commit."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from importlib import metadata

from ptuning.redaction import redact


def provenance() -> dict[str, str]:
    """Versions, platform, command line and, in a git work tree, the commit. Imports none of the libraries."""
    facts = {
        "command": redact(shlex.join(sys.argv)),
        "platform": platform.platform(),
        "python": platform.python_version(),
    }
    for library in ("ptuning", "torch", "transformers", "deepspeed", "ray", "datasets", "mlflow"):
        try:
            facts[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    commit = _git("rev-parse", "HEAD")
    if commit:
        facts["git_commit"] = commit
        changed = _git("status", "--porcelain", "--untracked-files=no", "--ignore-submodules=all")
        facts["git_dirty"] = str(bool(changed)).lower()
    return facts


def _git(*arguments: str) -> str:
    """The output of git in the working folder; empty if there is no repository.

    The repository may be untrusted: its settings can name commands that `git status` would run, so they are disabled.
    """
    known = _run_git("config", "--null", "--name-only", "--get-regexp", r"^filter\..*\.(clean|process|required)$")
    settings = {"core.fsmonitor": "false", "core.hooksPath": os.devnull} | {name: "" for name in known.split("\0") if name}
    # In a partial clone git would fetch missing objects from the remote, by a command that the remote's settings name.
    given = int(os.environ.get("GIT_CONFIG_COUNT") or 0)
    environment = {"GIT_ALLOW_PROTOCOL": "", "GIT_NO_LAZY_FETCH": "1", "GIT_CONFIG_COUNT": str(given + len(settings))}
    for number, (name, value) in enumerate(settings.items(), given):
        environment |= {f"GIT_CONFIG_KEY_{number}": name, f"GIT_CONFIG_VALUE_{number}": value}
    return _run_git(*arguments, **environment).strip()


def _run_git(*arguments: str, **environment: str) -> str:
    command = ["git", "--no-optional-locks", *arguments]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=5, env=os.environ | environment)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout if answer.returncode == 0 else ""
