"""What Serve and HTTP add to the engine, and a soft prompt's accuracy through HTTP."""

from __future__ import annotations

import json
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.answering import Bench
from ptuning import storage
from ptuning.data.readers import Columns
from ptuning.data.sources import read_source
from ptuning.inference.types import Request
from ptuning.model.soft_prompt import Card, SoftPrompt, content_hash
from ptuning.registry.publish import publish
from ptuning.registry.registry import Registry
from ptuning.tracking import client as tracking_client

EXPERIMENT = """
name = "bench"
[data]
train = "builtin:sentiment/train"
input = "{text}"
target = " {text}"
"""


def http() -> dict[str, Any]:
    """The same requests to an engine in this process and to a server in its own, then open-loop loads on the server."""
    bench, result = Bench(), {}
    engine = bench.engine()
    handle = engine.add(bench.soft_prompts[0], "0")
    with tempfile.TemporaryDirectory() as folder:
        put(bench, Path(folder) / "runs", "bench", bench.soft_prompts[0])
        with server(Path(folder), EXPERIMENT) as url:
            requests = [(ids, 8) for _, ids, _ in bench.requests]
            bare, served = [], []
            for ids, new in requests * 3:
                began = time.perf_counter()
                list(engine.generate(Request(ids, handle, new)))
                bare.append(time.perf_counter() - began)
                began = time.perf_counter()
                complete(url, ids, new)
                served.append(time.perf_counter() - began)
            skip = len(requests)  # the first round warms up
            added = [theirs - ours for ours, theirs in zip(bare[skip:], served[skip:], strict=True)]
            result["engine alone, ms (p50, p99)"] = percentiles(bare[skip:])
            result["through HTTP, ms (p50, p99)"] = percentiles(served[skip:])
            result["added, ms (p50, p99)"] = percentiles(added)
            engine.close()
            for rate in (5, 10, 20, 40):
                result[f"{rate} requests/s, ms (p50, p99), failed"] = open_loop(url, requests, rate, seconds=8)
    return result


def open_loop(url: str, requests: list[tuple[list[int], int]], rate: float, seconds: float) -> list[float]:
    """p50 and p99 in milliseconds, and the number of failed requests, of `latencies`."""
    times, failed = latencies(url, requests, rate, seconds)
    return [*percentiles(times), failed]


def latencies(
    url: str, requests: list[tuple[list[int], int]], rate: float, seconds: float, seed: int = 3
) -> tuple[list[float], int]:
    """Seconds of Poisson arrivals that wait for nobody, each from when it was due; and how many have failed."""
    draw, due, times, failed = random.Random(seed), 0.0, [], 0

    def ask(at: float, ids: list[int], new: int) -> float | None:
        try:
            complete(url, ids, new)
        except OSError:
            return None
        return time.perf_counter() - at

    with ThreadPoolExecutor(200) as clients:
        began, pending = time.perf_counter(), []
        while (due := due + draw.expovariate(rate)) < seconds:
            time.sleep(max(0.0, began + due - time.perf_counter()))
            pending.append(clients.submit(ask, began + due, *draw.choice(requests)))
        for future in pending:
            taken = future.result()
            failed += taken is None
            times += [taken] if taken is not None else []
    return times, failed


def accuracy() -> dict[str, Any]:
    """Train on sentiment, serve, classify the whole test set over HTTP."""
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder) / "runs"
        overrides = [f"compute.storage={runs}", "train.steps=60", "train.evaluate_every=60", "compute.workers=1"]
        train = [
            sys.executable,
            "-m",
            "ptuning",
            "train",
            "jobs/sentiment.toml",
            *overrides,
            "--register",
            "sentiment",
            "--json",
        ]
        done = subprocess.run(train, capture_output=True, text=True, check=True)
        reported = json.loads(done.stdout.splitlines()[-1])["metrics"]
        rows = read_source("builtin:sentiment/test", Columns.of(["text", "label"])).rows
        with server(Path(folder), Path("jobs/sentiment.toml").read_text(encoding="utf-8")) as url:
            right = {"classify": 0, "chat": 0}
            texts, truth = list(rows["text"]), list(rows["label"])
            began = time.perf_counter()
            for start in range(0, len(texts), 64):
                part = slice(start, start + 64)
                found = post(url, "classify", {"model": "sentiment", "input": texts[part]})["data"]
                right["classify"] += sum(entry["label"] == label for entry, label in zip(found, truth[part], strict=True))
            taken = time.perf_counter() - began

            def chat(text: str) -> str:
                body = {"model": "sentiment", "messages": [{"role": "user", "content": text}]}
                return str(post(url, "chat/completions", body)["choices"][0]["message"]["content"])

            with ThreadPoolExecutor(8) as clients:
                right["chat"] = sum(answer == label for answer, label in zip(clients.map(chat, texts), truth, strict=True))
    return {
        "rows": len(texts),
        "training report": reported["test_accuracy"],
        "through /v1/classify": right["classify"] / len(texts),
        "through /v1/chat/completions": right["chat"] / len(texts),
        "rows/s through /v1/classify": round(len(texts) / taken, 1),
    }


def put(bench: Bench, runs: Path, name: str, vectors: Tensor) -> None:
    """Publish a soft prompt into a new storage folder."""
    card = Card(
        name=name,
        base="builtin",
        base_fingerprint=bench.base.fingerprint.parts(),
        length=len(vectors),
        width=vectors.shape[1],
        content_hash=content_hash(vectors),
    )
    folder = storage.join(str(runs), "published")
    SoftPrompt(vectors, card).save(folder, layers=4, heads=4)
    publish(Registry(tracking_client.default_uri(runs)), name, folder, None, tracking_client.default_artifact_root(runs))


@contextmanager
def server(folder: Path, experiment: str) -> Iterator[str]:
    """`ptuning serve` in a process of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    toml = folder / "experiment.toml"
    toml.write_text(experiment, encoding="utf-8")
    command = [sys.executable, "-m", "ptuning", "serve", str(toml), f"serve.port={port}", f"compute.storage={folder / 'runs'}"]
    process = subprocess.Popen([*command, "model.dtype=float32"], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("serving at"):
            break
    else:
        raise RuntimeError("the server did not start")
    drain = threading.Thread(target=process.stderr.read, daemon=True)
    drain.start()
    try:
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def complete(url: str, ids: list[int], new: int) -> None:
    post(url, "completions", {"model": "bench", "prompt": ids, "max_tokens": new, "temperature": 0})


def post(url: str, path: str, body: dict[str, Any]) -> Any:
    asked = urllib.request.Request(f"{url}/{path}", json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(asked, timeout=120) as response:
        return json.load(response)


def percentiles(seconds: list[float]) -> list[float]:
    """[p50, p99] in milliseconds."""
    ordered = sorted(seconds)
    return [round(1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))], 1) for share in (0.5, 0.99)]
