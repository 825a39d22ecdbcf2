"""What Ray needs of its surroundings, checked in milliseconds before it starts or connects.

Ray (2.60) finds out late: it asks a cluster that has ended for 15 minutes, and a port that is taken ends a server after it was
started. Imports no Ray.
"""

from __future__ import annotations

import errno
import os
import socket
import sys
from contextlib import closing
from pathlib import Path

from ptuning.errors import UserError

CONNECT = 10.0
"""Seconds in which an address must answer."""

SOCKET = "ray/session_2026-01-02_03-04-05_123456_1234567/sockets/plasma_store"
"""The longest path of a socket below Ray's temporary folder (2.60, _private/node.py)."""

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"
"""The beginning of every HTTP/2 connection, which gRPC uses: the client's preface and its empty settings."""


def check_cluster(address: str | None, name: str = "compute.address") -> None:
    """Check that there is a cluster at an address, or without one that a cluster can start here. `name`: where the address was
    given; an address in RAY_ADDRESS is that of `None`, too.

    Raises:
        UserError: nothing answers there, what answers is not a cluster, or the temporary folder cannot hold Ray's sockets.
    """
    if address is None and os.environ.get("RAY_ADDRESS"):
        address, name = os.environ["RAY_ADDRESS"], "RAY_ADDRESS"
    if address in (None, "", "local"):
        _check_temporary_folder()
        return
    if address == "auto":
        address = _recorded(name)
    if address.startswith(("http://", "https://")):
        raise UserError(
            f"{name}: {address} is the address of a dashboard; send the command there with ptuning submit, or give the "
            "address of the cluster itself, HOST:6379 or ray://HOST:10001"
        )
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise UserError(f"{name}: {address} is not the address of a Ray cluster; write HOST:6379, ray://HOST:10001 or auto")
    try:
        answer = _first_bytes(host.strip("[]"), int(port))
    except OSError as error:
        fix = "unset it, or start that cluster" if name == "RAY_ADDRESS" else "start the cluster, or correct it"
        raise UserError(f"{name}: no response from {address} ({_reason(error)}); {fix}") from None
    encrypted = os.environ.get("RAY_USE_TLS", "0") not in ("", "0")
    if not encrypted and (len(answer) < 9 or answer[3] != 4):  # every HTTP/2 server begins with its settings
        raise UserError(f"{name}: what answers at {address} is not a Ray cluster; correct the address or the port")


def check_port(host: str, port: int) -> None:
    """Check that a server can listen on an address of this machine.

    Raises:
        UserError: it cannot.
    """
    if port == 0:
        return
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        with closing(socket.socket(family, kind, protocol)) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: connections that have just ended
            listener.bind(place)
            listener.listen(1)
    except socket.gaierror as error:
        raise UserError(f"serve.host: {host} is not an address ({error.strerror}); correct it") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(
                f"serve.port: {port} is taken by another program on {host}; end it, or choose another port, such as "
                f"serve.port={port + 1 if port < 65535 else 8000}"
            ) from None
        if error.errno == errno.EADDRNOTAVAIL:
            raise UserError(f"serve.host: {host} is not an address of this machine; use 127.0.0.1 or 0.0.0.0") from None
        raise UserError(f"serve.port: {port} cannot be used ({_reason(error)}); choose one above 1024") from None


def temporary_folder() -> tuple[str, str]:
    """Ray's temporary folder, and where it comes from (2.60, _common/utils.py: get_default_system_temp_dir)."""
    if "RAY_TMPDIR" in os.environ:
        return os.environ["RAY_TMPDIR"], "RAY_TMPDIR"
    if sys.platform.startswith("linux") and "TMPDIR" in os.environ:
        return os.environ["TMPDIR"], "TMPDIR"
    return "/tmp", "TMPDIR"


def _check_temporary_folder() -> None:
    folder, name = temporary_folder()
    longest = 103 if sys.platform == "darwin" else 107  # bytes of a socket's path, which the system limits
    excess = len(os.fsencode(os.path.join(os.path.abspath(folder), SOCKET))) - longest
    if excess > 0:
        raise UserError(
            f"{name}: {folder} is {excess} characters too long for the paths of Ray's sockets; set RAY_TMPDIR to a shorter "
            "folder, such as /tmp"
        )
    try:
        Path(folder, "ray").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{name}: Ray cannot write to {folder} ({_reason(error)}); set RAY_TMPDIR to a folder that can be written"
        ) from None


def _recorded(name: str) -> str:
    """The cluster on this machine, as `ray start` has recorded it (2.60, _common/utils.py: get_ray_address_file)."""
    path = Path(temporary_folder()[0], "ray", "ray_current_cluster")
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        raise UserError(f"{name}: no cluster is running on this machine; start one with: ray start --head") from None


def _first_bytes(host: str, port: int) -> bytes:
    with socket.create_connection((host, port), timeout=CONNECT) as connection:
        connection.sendall(_PREFACE)
        try:
            return connection.recv(64)
        except (TimeoutError, ConnectionResetError):
            return b""


def _reason(error: OSError) -> str:
    return (os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)).lower()
