"""One driver per run, by a lease in the run's folder, on a disk or in an object store.

The holder renews the lease. A second driver is refused. After a crash it takes over: immediately if it can check that the
holder's process has ended, else when the lease was not renewed for `EXPIRY` seconds of its own clock; clocks of two machines
are never compared. A holder that was only suspended finds the new lease at its next renewal, and stops.
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
"""Seconds between renewals, and seconds without a renewal until another driver may take over."""
SETTLE = 1.0
"""Seconds in which two drivers that write to an object store at the same time see each other."""

log = logger(__name__)
Record = dict[str, Any]


class LeaseLost(RuntimeError):
    """Another driver has taken over the run, because this one seemed to be dead."""


def check(folder: str, say: Callable[[str], None]) -> None:
    """Check that no driver holds a run; writes nothing. Takes up to `EXPIRY` seconds if a driver on another machine left a
    lease.

    Raises:
        UserError: another driver holds the run.
    """
    left = _read(folder)
    if left is None or _alive_here(left) is False:
        return
    if _alive_here(left):
        raise UserError(_taken(folder, left))
    say(
        f"{folder}: has a lease of a driver on {left['host']} (pid {left['pid']}); waiting up to {EXPIRY:.0f} s for its renewal"
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
def held(folder: str, say: Callable[[str], None], end: Callable[[], None] = _thread.interrupt_main) -> Iterator[None]:
    """Hold a run's lease. `end` is called in another thread when it is lost. In the main thread SIGINT interrupts the run, even
    if a script runs the command in the background, where shells make it ignore SIGINT. SIGINT stops a run cleanly, and also
    signals a lost lease.

    Raises:
        UserError: another driver holds the run.
        LeaseLost: another driver has taken over; the main thread was interrupted.
    """
    mine: Record = {"token": uuid.uuid4().hex, "host": socket.gethostname(), "pid": os.getpid(), "beat": 0}
    mine |= {"born": psutil.Process().create_time(), "place": _place(), "since": time.strftime("%F %T UTC", time.gmtime())}
    _take(folder, mine, say)
    done = threading.Event()
    lost: list[Record] = []
    thread = threading.Thread(target=_renew, args=(folder, mine, done, lost, end), name="ptuning-lease", daemon=True)
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
                f"{folder}: {other} has taken over, because this one did not renew its lease; leave the run to it"
            ) from None
        raise
    finally:
        if ignored:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        done.set()
        thread.join(10)
        if not lost:
            storage.delete_file(folder, FILE)


def renewals(folder: str) -> tuple[int, bool | None] | None:
    """How often the holder of a lease has renewed it, and whether its process is alive, None if that cannot be checked from
    here; None: there is no lease."""
    left = _read(folder)
    return (int(left.get("beat", 0)), _alive_here(left)) if left else None


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


def _renew(folder: str, mine: Record, done: threading.Event, lost: list[Record], end: Callable[[], None]) -> None:
    while not done.wait(BEAT):
        try:
            now = _read(folder)
            if now is not None and now["token"] != mine["token"]:
                lost.append(now)
                end()
                return
            mine["beat"] += 1
            _write(folder, mine)
        except (OSError, storage.StorageError) as error:  # the run itself detects whether its storage is lost permanently
            log.warning("the lease of %s could not be renewed: %s", folder, error)


def _write(folder: str, record: Record) -> None:
    storage.write_file(folder, FILE, json.dumps(record).encode())


def _read(folder: str) -> Record | None:
    """None: there is no lease, or an incomplete one, which is possible for a moment in an object store or after a crash."""
    if not storage.exists(folder, FILE):
        return None
    try:
        record = json.loads(storage.read_file(folder, FILE))
        return record if {"token", "host", "pid", "born", "place", "since"} <= set(record) else None
    except (storage.StorageError, ValueError, TypeError):
        return None


def _alive_here(record: Record) -> bool | None:
    """True if the holder's process is alive; None if it cannot be checked from here."""
    if record["place"] != _place():
        return None
    try:
        return bool(psutil.Process(record["pid"]).create_time() == record["born"])
    except psutil.Error:
        return False


def _place() -> str:
    """The scope in which a process id is valid: this machine since its start, and this container."""
    parts = [socket.gethostname()]
    for name in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        path = Path(name)
        if path.exists():
            parts.append(str(path.readlink()) if path.is_symlink() else path.read_text().strip())
    return " ".join(parts)


def _taken(folder: str, record: Record) -> str:
    return (
        f"{folder}: another driver is running it (host {record['host']}, pid {record['pid']}, since {record['since']}); wait "
        "for it, stop it, or choose another name"
    )
