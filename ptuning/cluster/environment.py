"""Environment variables of Ray that are set before it is imported."""

from __future__ import annotations

import os


def keep_ray_on_loopback(address: str | None) -> None:
    """Have a cluster that this process starts listen on loopback with all its ports, and not on every interface with most of
    them (Ray 2.60). To be called before ray is imported; nothing if there is a cluster to join.

    The variable is meant for other systems, where firewalls ask about open ports; it works everywhere.
    """
    if not address and not os.environ.get("RAY_ADDRESS"):
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
