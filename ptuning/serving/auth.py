"""API keys with scopes. They are compared in constant time; only their hashes are stored."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args

from ptuning.errors import UserError
from ptuning.tuning.file_record import LOCAL

Scope = Literal["inference", "tuning", "admin"]
"""Each includes those before it. inference asks; tuning has files, jobs and batches of its own; admin sees those of all keys,
reads metrics and reloads."""

VARIABLE = "PTUNING_API_KEYS"

SHORTEST = 16

OWNER = 16
"""Hexadecimal digits of a key's SHA-256 that name the owner of files, jobs and batches."""


class AccessError(UserError):
    """The keys cannot be read, or the address requires keys."""


@dataclass(frozen=True)
class Caller:
    """Who sent a request."""

    scope: Scope
    owner: str
    """Names the key in the records of what it has made. `LOCAL` on a server without keys."""

    def may(self, wanted: Scope) -> bool:
        """Whether this scope includes the other."""
        scopes = get_args(Scope)
        return scopes.index(self.scope) >= scopes.index(wanted)

    @property
    def sees(self) -> str | None:
        """The owner whose files, jobs and batches this caller sees; None: those of all."""
        return None if self.scope == "admin" else self.owner


def read_keys(file: str | None) -> dict[str, Scope]:
    """SHA-256 of each key -> its scope, from a file (one `KEY` or `KEY SCOPE` per line) or the environment.

    Raises:
        AccessError: the file cannot be read, or a line is not a valid key.
    """
    if file:
        try:
            lines: Iterable[str] = Path(file).expanduser().read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise AccessError(f"serve.keys: {file} cannot be read ({error}); give a text file with one key per line") from None
        place = file
    else:
        lines, place = os.environ.get(VARIABLE, "").split(","), VARIABLE
    keys: dict[str, Scope] = {}
    for number, line in enumerate(lines, 1):
        key, _, scope = line.strip().partition(" ")
        if not key or key.startswith("#"):
            continue
        scope = scope.strip() or "inference"
        if scope not in get_args(Scope):
            raise AccessError(
                f"serve.keys: {place}, key {number}: is followed by an unknown scope; write inference, tuning or admin"
            )
        if len(key) < SHORTEST:
            raise AccessError(f"serve.keys: {place}, key {number}: is shorter than {SHORTEST} characters; use a longer one")
        keys[_digest(key)] = cast(Scope, scope)
    if file and not keys:
        raise AccessError(f"serve.keys: {file} contains no keys; write one per line")
    return keys


def check_address(host: str, keys: dict[str, Scope], insecure: bool) -> None:
    """Require keys for every address but loopback.

    Raises:
        AccessError: other machines can reach the address, and there are no keys.
    """
    if not is_loopback(host) and not keys and not insecure:
        raise AccessError(
            f"serve.host: {host} can be reached from other machines, but there are no API keys; set serve.keys or {VARIABLE}, "
            "or add --insecure"
        )


def check_origins(origins: Sequence[str], keys: dict[str, Scope]) -> None:
    """Require keys if web pages may use the API: a page could use a server on its visitor's machine, too.

    Raises:
        AccessError: there are none.
    """
    if origins and not keys:
        raise AccessError(f"serve.cors_origins: requires API keys; set serve.keys or {VARIABLE}, or leave it out")


def check_token(insecure: bool) -> None:
    """Refuse to serve without Ray's token: a replica listens on all interfaces and unpickles what it receives (Ray 2.60).

    Raises:
        AccessError: the token is disabled.
    """
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token" and not insecure:
        raise AccessError(
            "RAY_AUTH_MODE: without Ray's token anyone who reaches this machine can run code in a replica; set it to token, or "
            "add --insecure"
        )


def is_loopback(host: str) -> bool:
    """True if only this machine can reach the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def caller_of(header: str | None, keys: dict[str, Scope]) -> Caller | None:
    """Who sends this Authorization header; None: the key is unknown. If there are no keys at all, every request may do
    everything."""
    if not keys:
        return Caller("admin", LOCAL)
    scheme, _, key = (header or "").partition(" ")
    found: Caller | None = None
    digest = _digest(key.strip())
    for known, scope in keys.items():  # compares all keys, even after a match
        if hmac.compare_digest(known, digest):
            found = Caller(scope, known[:OWNER])
    return found if scheme.lower() == "bearer" else None


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()
