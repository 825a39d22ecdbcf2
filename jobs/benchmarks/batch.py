"""Batches: what a batch in the background does to the latency of clients that wait, and how fast it is with and without them.

Windows with and without a batch alternate (A B B A) on one server, under the same open-loop load. Needs no keys.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import torch

from benchmarks.answering import Bench
from benchmarks.measuring import write
from benchmarks.serve import spread
from benchmarks.serve_http import EXPERIMENT, latencies, percentiles, post, put, server

LINES, TOKENS = 3000, 32
"""Of a batch, and of each answer to a line."""


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
            latencies(url, requests, rate, 3)  # warms up
            for number in range(windows):
                for side in ("without", "with")[:: -1 if number % 2 else 1]:
                    batch = start(url, bench) if side == "with" else None
                    before = completed(url, batch) if batch else 0
                    found, bad = latencies(url, requests, rate, seconds, seed=number)
                    if batch:
                        done += completed(url, batch) - before
                        stop(url, batch)
                    times[side] += found
                    worst[side].append(percentiles(found)[1])
                    failed += bad
            batch = start(url, bench)
            before = completed(url, batch)
            time.sleep(seconds)
            idle = completed(url, batch) - before
            stop(url, batch)
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


def stop(url: str, batch: str) -> None:
    """Cancel a batch, and wait for its end."""
    post(url, f"batches/{batch}/cancel", {})
    while get(url, f"batches/{batch}")["status"] != "cancelled":
        time.sleep(0.1)


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
    command.add_argument("--windows", type=int, default=12)
    command.add_argument("--seconds", type=float, default=5.0, help="of a window")
    command.add_argument("--out", help="file for the raw numbers (JSON)")
    command.set_defaults(run=batch)
