"""One driver per run: a lease in the run's folder, on a disk or in an object store.

Its holder renews it. A second driver is refused, and takes over after a crash: at once where it sees that the holder's process
is gone, else when the lease has not been renewed for `EXPIRY` seconds of its own clock; no two clocks are ever compared. A
holder that was only frozen finds the other one's lease at its next renewal, and stops.
"""

from __future__ import annotations

import _thread
import json
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from ptuning import storage
from ptuning.errors import UserError
from ptuning.redaction import logger
from ptuning.tracking.outbox import locked

FILE = "lease.json"
BEAT, EXPIRY = 5.0, 30.0
"""Seconds between renewals, and without one until another driver may take over."""
SETTLE = 1.0
"""Seconds in which two that write to an object store at once see each other."""

log = logger(__name__)
Record = dict[str, Any]


class LeaseLost(RuntimeError):
    """Another driver took this one for dead and has taken over the run."""


def check(folder: str, say: Callable[[str], None]) -> None:
    """Whether a run is free; writes nothing. Takes up to `EXPIRY` seconds if its last driver, elsewhere, left a lease behind.

    Raises:
        UserError: another driver has it.
    """
    left = _read(folder)
    if left is None or _alive_here(left) is False:
        return
    if _alive_here(left):
        raise UserError(_taken(folder, left))
    say(
        f"{folder}: was left by a driver on {left['host']} (pid {left['pid']}); waiting up to {EXPIRY:.0f} s for a sign of life"
    )
    until = time.monotonic() + EXPIRY
    while time.monotonic() < until:
        time.sleep(min(1.0, EXPIRY / 10))
        now = _read(folder)
        if now is None:
            return
        if now != left:
            raise UserError(_taken(folder, now))


@contextmanager
def held(folder: str, say: Callable[[str], None]) -> Iterator[None]:
    """Hold a run's lease. In the main thread SIGINT interrupts the run, also where a script has put the command into the
    background, whose shell has it ignore SIGINT: it is how a run is stopped in order, and how a lost lease is told.

    Raises:
        UserError: another driver has it.
        LeaseLost: another driver has taken over meanwhile; the main thread was interrupted.
    """
    mine: Record = {"token": uuid.uuid4().hex, "host": socket.gethostname(), "pid": os.getpid(), "beat": 0}
    mine |= {"born": psutil.Process().create_time(), "place": _place(), "since": time.strftime("%F %T UTC", time.gmtime())}
    _take(folder, mine, say)
    done = threading.Event()
    lost: list[Record] = []
    thread = threading.Thread(target=_renew, args=(folder, mine, done, lost), name="ptuning-lease", daemon=True)
    ignored = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    if ignored:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    thread.start()
    try:
        yield
    except KeyboardInterrupt:
        if lost:
            other = f"another driver (host {lost[0]['host']}, pid {lost[0]['pid']})"
            raise LeaseLost(
                f"{folder}: {other} has taken over, because nothing was heard of this one; leave the run to it"
            ) from None
        raise
    finally:
        if ignored:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        done.set()
        thread.join(10)
        if not lost:
            storage.delete_file(folder, FILE)


def _take(folder: str, mine: Record, say: Callable[[str], None]) -> None:
    if storage.is_local(folder):
        path = Path(storage.resolve(folder)[1])
        path.mkdir(parents=True, exist_ok=True)
        with locked(path / f".{FILE}.lock", seconds=EXPIRY + 10):
            check(folder, say)
            _write(folder, mine)
        return
    check(folder, say)
    _write(folder, mine)
    time.sleep(SETTLE)
    now = _read(folder)
    if now is None or now["token"] != mine["token"]:
        raise UserError(_taken(folder, now or mine))


def _renew(folder: str, mine: Record, done: threading.Event, lost: list[Record]) -> None:
    while not done.wait(BEAT):
        try:
            now = _read(folder)
            if now is not None and now["token"] != mine["token"]:
                lost.append(now)
                _thread.interrupt_main()
                return
            mine["beat"] += 1
            _write(folder, mine)
        except (OSError, storage.StorageError) as error:  # the run itself finds out whether its storage is gone for good
            log.warning("the lease of %s could not be renewed: %s", folder, error)


def _write(folder: str, record: Record) -> None:
    storage.write_file(folder, FILE, json.dumps(record).encode())


def _read(folder: str) -> Record | None:
    """None: there is no lease, or half of one, which an object store or a killed machine may show for a moment."""
    if not storage.exists(folder, FILE):
        return None
    try:
        record = json.loads(storage.read_file(folder, FILE))
        return record if {"token", "host", "pid", "born", "place", "since"} <= set(record) else None
    except (storage.StorageError, ValueError, TypeError):
        return None


def _alive_here(record: Record) -> bool | None:
    """Whether the holder's process lives; None if it is not one that can be seen from here."""
    if record["place"] != _place():
        return None
    try:
        return bool(psutil.Process(record["pid"]).create_time() == record["born"])
    except psutil.Error:
        return False


def _place() -> str:
    """Where a process id means the same: this machine since it was started, this container."""
    parts = [socket.gethostname()]
    for name in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        path = Path(name)
        if path.exists():
            parts.append(str(path.readlink()) if path.is_symlink() else path.read_text().strip())
    return " ".join(parts)


def _taken(folder: str, record: Record) -> str:
    return (
        f"{folder}: another driver works on it (host {record['host']}, pid {record['pid']}, since {record['since']}); wait for "
        "it, stop it, or choose another name"
    )
