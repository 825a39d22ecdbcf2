"""`ptuning ask NAME` without a text: questions that are typed one after the other."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import typer

Ask = Callable[[list[dict[str, str]]], tuple[dict[str, Any] | None, str]]
"""Messages -> the response, or None and the reason."""


def converse(name: str, ask: Ask, keeps: bool, show: Callable[[dict[str, Any]], str]) -> None:
    """Ask what is typed until the input ends. `keeps`: earlier messages are sent, too; an empty line begins again."""
    if keeps:
        typer.echo(f"{name}: a conversation; an empty line begins a new one, Ctrl-D ends", err=True)
    else:
        typer.echo(f"{name}: each line is a question of its own; Ctrl-D ends", err=True)
    if sys.stdin.isatty():
        import readline  # noqa: F401  # lines can be edited and repeated
    messages: list[dict[str, str]] = []
    while True:
        try:
            typed = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            typer.echo()
            return
        if not typed:
            messages = []
            continue
        question = {"role": "user", "content": typed}
        response, reason = ask([*messages, question])
        if response is None:
            typer.echo(reason, err=True)
            continue
        said = str(response["choices"][0]["message"]["content"])
        typer.echo(show(response))
        messages = [*messages, question, {"role": "assistant", "content": said}] if keeps else []
