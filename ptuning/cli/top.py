"""`ptuning top`: what runs now. It reads the storage and, if they are there, a server and a cluster; it changes nothing."""

from __future__ import annotations

import json
import sys
import time
import urllib.request
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ptuning.cli.options import Json, fail, non_blank
from ptuning.errors import UserError

if TYPE_CHECKING:
    from ptuning.activity import Activity

LISTED = 20
"""Rows that are shown."""


def _server(url: str) -> str:
    """What a server says of itself without a key."""
    try:
        with urllib.request.urlopen(f"{url.rstrip('/').removesuffix('/v1')}/readyz", timeout=2) as answer:
            told: dict[str, Any] = json.load(answer)
    except (OSError, ValueError) as error:
        status = getattr(error, "code", None)
        return f"server {url}: {'not ready' if status == 503 else 'no answer'}"
    return f"server {url}: " + ", ".join(f"{key} {value}" for key, value in told.items())


def _cluster(address: str) -> str:
    from ptuning.cluster.resources import in_use

    nodes, used = in_use(address)
    kinds = [f"{some:g} of {every:g} {kind} in use" for kind, (some, every) in used.items()]
    return f"cluster {address}: " + ", ".join([f"{nodes} node{'s' if nodes != 1 else ''}", *kinds])


def top(
    folder: Annotated[
        str, typer.Option("--storage", metavar="FOLDER", callback=non_blank, help="Storage folder of the runs.")
    ] = "runs",
    url: Annotated[
        str | None, typer.Option("--url", callback=non_blank, help="A server to ask, http://127.0.0.1:8000/v1")
    ] = None,
    address: Annotated[
        str | None, typer.Option("--address", callback=non_blank, help="A Ray cluster to look at, from one of its nodes.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what runs now: runs, searches, jobs, a server, a cluster.

    On a terminal the screen is live until Ctrl-C; elsewhere it is printed once.

    Example: ptuning top --storage runs --url http://127.0.0.1:8000/v1
    """
    from ptuning.activity import EVERY, Watcher

    watcher = Watcher(folder)
    try:
        if as_json:
            typer.echo(json.dumps({"activities": [asdict(each) for each in watcher.look()], "lines": _lines(url, address)}))
            return
        from rich.console import Console
        from rich.live import Live

        console = Console(highlight=False)
        if not sys.stdout.isatty():
            console.print(_screen(watcher.look(), _lines(url, address)))
            return
        with Live(_screen(watcher.look(), _lines(url, address)), console=console, screen=True, auto_refresh=False) as live:
            while True:
                time.sleep(EVERY)
                live.update(_screen(watcher.look(), _lines(url, address)), refresh=True)
    except UserError as error:
        fail(str(error), 2)
    except KeyboardInterrupt:
        return


def _lines(url: str | None, address: str | None) -> list[str]:
    return [line for line in (_server(url) if url else "", _cluster(address) if address else "") if line]


def _screen(found: list[Activity], lines: list[str]) -> Any:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("kind", "name", "state", "progress", "best"):
        grid.add_column(column, overflow="fold")
    styles = {"running": "green", "interrupted": "yellow", "failed": "red"}
    for each in found[:LISTED]:
        grid.add_row(each.kind, Text(each.name), Text(each.state, styles.get(each.state, "")), each.progress, each.best)
    more = [Text(f"and {len(found) - LISTED} more")] if len(found) > LISTED else []
    return Group(*map(Text, lines), grid if found else Text("nothing has run in this storage folder"), *more)
