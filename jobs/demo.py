"""Runs all steps once on this machine: train, search, register, serve, ask. `make demo` runs it, each time from scratch."""

from __future__ import annotations

import csv
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

RUNS = Path("runs", "demo")
EXPERIMENT = "jobs/sentiment.toml"
PLACE = f"compute.storage={RUNS}"
WORKERS = [] if shutil.which("nvidia-smi") else ["compute.workers=2"]
"""Without GPUs, two workers that share a base; with GPUs the default: one for each."""
SENTENCES = ("I love this product!", "This movie was terrible.")


@contextmanager
def started(*arguments: str, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A `ptuning` command, which is also printed. In any case it is asked once to end, and waited for."""
    print(f"\n$ ptuning {' '.join(arguments)}", flush=True)
    # In a process group of its own: only this process gets Ctrl-C, and passes it on. Two signals would interrupt the cleanup.
    process = subprocess.Popen([sys.executable, "-m", "ptuning", *arguments], text=True, process_group=0, **options)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        try:
            process.wait(90)
        except (KeyboardInterrupt, subprocess.TimeoutExpired):
            process.kill()
            raise


def run(*arguments: str) -> None:
    with started(*arguments) as process:
        if process.wait():
            sys.exit(process.returncode)  # the command has printed the error


def show_leaderboard() -> None:
    with (RUNS / "search" / "report" / "leaderboard.csv").open(encoding="utf-8", newline="") as file:
        names, *rows = csv.reader(file)
    for row in [[name.rpartition(".")[2] for name in names], *rows[:5]]:
        print("  " + "  ".join(f"{cell[:13]:13}" for cell in row[:8]).rstrip())


def ask() -> None:
    """Serve the registered soft prompts, and send requests with the standard OpenAI client."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with started("serve", EXPERIMENT, PLACE, f"serve.port={port}", stderr=subprocess.PIPE) as server:
        assert server.stderr is not None
        for line in server.stderr:
            print(f"  {line.rstrip()}", flush=True)
            if line.startswith("serving at"):
                break
        else:
            sys.exit("demo: the server has ended")
        from openai import OpenAI  # imported late: it takes a second, in which Ctrl-C would not reach the commands

        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        for sentence in SENTENCES:
            answer = client.chat.completions.create(model="sentiment", messages=[{"role": "user", "content": sentence}])
            print(f"  {sentence}  ->  {answer.choices[0].message.content}", flush=True)


def main() -> None:
    began = time.monotonic()
    shutil.rmtree(RUNS, ignore_errors=True)
    run("train", EXPERIMENT, PLACE, *WORKERS, "train.steps=100", "--register", "sentiment")
    budget = ("search.trials=8", "search.slots=8", "train.steps=60", "search.finalists=1", "search.seeds=1")
    run("search", EXPERIMENT, PLACE, *WORKERS, "name=search", *budget, "--register", "sentiment")
    show_leaderboard()
    run("prompts", "list", "--storage", str(RUNS))
    ask()
    print(
        f"\nDone in {time.monotonic() - began:.0f} s; all results are in {RUNS}.\n"
        f"  plots       {RUNS}/search/report/landscape.png and budget.png\n"
        f"  every run   . .venv/bin/activate; mlflow ui --backend-store-uri sqlite:///{RUNS}/mlflow.db\n"
        f"  ask more    ptuning serve {EXPERIMENT} {PLACE}; ptuning ask sentiment 'What a day.'\n"
        f"  your data   copy {EXPERIMENT}, name your file and labels in [data]; README.md shows how"
    )


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
