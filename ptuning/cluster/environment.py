"""Environment variables of Ray that are set before it is imported."""

from __future__ import annotations

import os


def keep_ray_on_loopback(address: str | None) -> None:
    """Make all ports of a cluster that this process starts listen on loopback; Ray 2.60 opens most of them on all interfaces.
    Must be called before ray is imported; no effect if there is a cluster to join.

    The variable is meant for systems whose firewalls ask about open ports, but works on all.
    """
    if not address and not os.environ.get("RAY_ADDRESS"):
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
