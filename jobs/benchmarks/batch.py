"""Batches: what a batch in the background does to the latency of clients that wait, and how fast it is with and without them.

Short windows with and without a batch alternate (A B B A) on one server, under the same open-loop load: in windows without it,
the process that sends its lines is stopped. Needs no keys.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.answering import Bench
from benchmarks.measuring import write
from benchmarks.serve import spread
from benchmarks.serve_http import EXPERIMENT, latencies, percentiles, post, put, server

LINES, TOKENS = 20_000, 32
"""Of the batch, and of each answer to a line."""
SETTLE_S = 1.0
"""Seconds between two windows: the lines that were sent end."""


def interference(rate: float, windows: int, seconds: float) -> dict[str, Any]:
    """Latencies of clients with and without a batch, and the lines that it got done meanwhile."""
    bench = Bench()
    requests = [(ids, 8) for _, ids, _ in bench.requests]
    times: dict[str, list[float]] = {"without": [], "with": []}
    worst: dict[str, list[float]] = {"without": [], "with": []}
    failed, done = 0, 0
    with tempfile.TemporaryDirectory() as folder:
        put(bench, Path(folder) / "runs", "bench", bench.soft_prompts[0])
        with server(Path(folder), EXPERIMENT) as url:
            batch = start(url, bench)
            latencies(url, requests, rate, 3)  # warms up
            for number in range(windows):
                for side in ("without", "with")[:: -1 if number % 2 else 1]:
                    lines = send_lines(side == "with")
                    before = completed(url, batch)
                    found, bad = latencies(url, requests, rate, seconds, seed=number)
                    done += completed(url, batch) - before if lines else 0
                    times[side] += found
                    worst[side].append(percentiles(found)[1])
                    failed += bad
            send_lines(True)
            before = completed(url, batch)
            time.sleep(seconds)
            idle = completed(url, batch) - before
    without, with_it = percentiles(times["without"]), percentiles(times["with"])
    return {
        "clients, requests/s": rate,
        "requests on each side": len(times["with"]),
        "failed": failed,
        "without a batch, ms (p50, p99)": without,
        "with a batch, ms (p50, p99)": with_it,
        "p99 with against without": round(with_it[1] / without[1], 2),
        "of the windows' p99": spread([own / other for own, other in zip(worst["with"], worst["without"], strict=True)]),
        "lines/s beside the clients": round(done / (windows * seconds), 1),
        "lines/s without clients": round(idle / seconds, 1),
    }


def send_lines(on: bool) -> bool:
    """Have the runner of the batch go on, or stand still; wait until that shows."""
    found = [each for each in psutil.Process().children(recursive=True) if any("BatchActor" in part for part in each.cmdline())]
    assert found, "no process runs the batch"
    for process in found:
        process.send_signal(signal.SIGCONT if on else signal.SIGSTOP)
    time.sleep(SETTLE_S)
    return on


def start(url: str, bench: Bench) -> str:
    """A batch that runs."""
    lines = []
    for number in range(LINES):
        _, ids, _ = bench.requests[number % len(bench.requests)]
        body = {"model": "bench", "prompt": ids, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
        lines.append(json.dumps({"custom_id": str(number), "method": "POST", "url": "/v1/completions", "body": body}))
    parts = (('name="purpose"', "batch"), ('name="file"; filename="a.jsonl"', "\n".join(lines)))
    form = "".join(f"--xx\r\ncontent-disposition: form-data; {name}\r\n\r\n{value}\r\n" for name, value in parts)
    kind = {"content-type": "multipart/form-data; boundary=xx"}
    with urllib.request.urlopen(urllib.request.Request(f"{url}/files", f"{form}--xx--\r\n".encode(), kind)) as response:
        file = json.load(response)["id"]
    asked = {"input_file_id": file, "endpoint": "/v1/completions", "completion_window": "24h"}
    batch = str(post(url, "batches", asked)["id"])
    while completed(url, batch) < 10:
        time.sleep(0.05)
    return batch


def completed(url: str, batch: str) -> int:
    """Its lines that are answered and written."""
    return int(get(url, f"batches/{batch}")["request_counts"]["completed"])


def get(url: str, path: str) -> Any:
    with urllib.request.urlopen(f"{url}/{path}", timeout=60) as response:
        return json.load(response)


def batch(arguments: argparse.Namespace) -> None:
    """Latency of clients beside a batch."""
    torch.set_num_threads(1)
    results: dict[str, Any] = {"load": [os.getloadavg()[0]]}
    for rate in arguments.rates:
        found = interference(rate, arguments.windows, arguments.seconds)
        results[f"{rate:g} requests/s"] = found
        print(f"{rate:g} requests/s", *(f"  {name}: {value}" for name, value in found.items()), sep="\n", flush=True)
    results["load"].append(os.getloadavg()[0])
    write(arguments.out, results, {})


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The command `batch`."""
    command = commands.add_parser("batch", help=batch.__doc__)
    command.add_argument("--rates", nargs="+", type=float, default=[5.0, 20.0], help="requests per second of the clients")
    command.add_argument("--windows", type=int, default=20)
    command.add_argument("--seconds", type=float, default=4.0, help="of a window")
    command.add_argument("--out", help="file for the raw numbers (JSON)")
    command.set_defaults(run=batch)
