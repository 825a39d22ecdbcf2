"""Ids of jobs, files, batches and their events."""

import secrets
import string

_ALPHABET = string.ascii_letters + string.digits


def new_id(prefix: str, joint: str = "-") -> str:
    """A new id, such as `file-` and 24 random letters and digits."""
    return prefix + joint + "".join(secrets.choice(_ALPHABET) for _ in range(24))
