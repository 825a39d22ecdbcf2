"""Everything once, on this machine: train, search, register, serve, ask. `make demo` runs it; each time it starts afresh."""

from __future__ import annotations

import csv
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from openai import OpenAI

RUNS = Path("runs", "demo")
EXPERIMENT = "jobs/sentiment.toml"
PLACE = f"compute.storage={RUNS}"
SENTENCES = ("I love this product!", "This movie was terrible.")


def command(*arguments: str) -> list[str]:
    """A `ptuning` command, shown as one would type it."""
    print(f"\n$ ptuning {' '.join(arguments)}", flush=True)
    return [sys.executable, "-m", "ptuning", *arguments]


def show_leaderboard() -> None:
    with (RUNS / "search" / "report" / "leaderboard.csv").open(encoding="utf-8", newline="") as file:
        names, *rows = csv.reader(file)
    for row in [[name.rpartition(".")[2] for name in names], *rows[:5]]:
        print("  " + "  ".join(f"{cell[:13]:13}" for cell in row[:8]).rstrip())


def ask() -> None:
    """Serve the registered soft prompts, and ask them through the stock client."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    serving = command("serve", EXPERIMENT, PLACE, f"serve.port={port}")
    with subprocess.Popen(serving, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        for line in server.stderr:
            print(f"  {line.rstrip()}", flush=True)
            if line.startswith("serving at"):
                break
        else:
            sys.exit("demo: the server has ended")
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        for sentence in SENTENCES:
            answer = client.chat.completions.create(model="sentiment", messages=[{"role": "user", "content": sentence}])
            print(f"  {sentence}  ->  {answer.choices[0].message.content}", flush=True)
        server.send_signal(signal.SIGINT)


def main() -> None:
    began = time.monotonic()
    shutil.rmtree(RUNS, ignore_errors=True)
    subprocess.run(command("train", EXPERIMENT, PLACE, "train.steps=100", "--register", "sentiment"), check=True)
    budget = ("search.trials=8", "search.slots=8", "train.steps=60", "search.finalists=1", "search.seeds=1")
    subprocess.run(command("search", EXPERIMENT, PLACE, "name=search", *budget, "--register", "sentiment"), check=True)
    show_leaderboard()
    subprocess.run(command("prompts", "list", "--storage", str(RUNS)), check=True)
    ask()
    print(
        f"\nDone in {time.monotonic() - began:.0f} s; all of it is in {RUNS}.\n"
        f"  pictures    {RUNS}/search/report/landscape.png and budget.png\n"
        f"  every run   . .venv/bin/activate; mlflow ui --backend-store-uri sqlite:///{RUNS}/mlflow.db\n"
        f"  ask more    ptuning serve {EXPERIMENT} {PLACE}; ptuning ask sentiment 'What a day.'\n"
        f"  your data   copy {EXPERIMENT}, name your file and labels in [data]; README.md shows how"
    )


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except subprocess.CalledProcessError as error:  # the command has said why
        sys.exit(error.returncode)
