"""Serving: the engine against PEFT and static batches, and what HTTP adds.

throughput  16 clients on 4 soft prompts: the engine, PEFT's generate request by request, static left-padded batches
first       time to the first token with and without a soft prompt of 100 vectors
sharing     throughput with the keys and values of soft prompts shared between requests, and computed for each
residents   throughput with 1 and with 1,000 resident soft prompts
curve       latency, first token and time per token over the requests per second, for all of them and the bare base
http        what Serve and HTTP add to the engine, and latencies under an open-loop load from this process
accuracy    a trained soft prompt's accuracy through HTTP against its training report
engines     transformers against vLLM, where it is installed; only if asked for

All sides share base, dtype, threads and requests, run interleaved, and must agree on every token before they are timed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.answering import CLIENTS, LENGTH, REQUESTS, ROUNDS, Answers, Bench, Peft, Static, drive
from benchmarks.curve import curve, picture
from benchmarks.engines import engines
from benchmarks.measuring import in_turns, interval, write
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


def throughput() -> dict[str, Any]:
    bench = Bench()
    engine = bench.engine()
    handles = [engine.add(vectors, str(at)) for at, vectors in enumerate(bench.soft_prompts)]
    requests = [Request(ids, handles[who], new, ignore_end=True) for who, ids, new in bench.requests]

    peft, static = Peft(bench), Static(bench)
    sides: dict[str, Callable[[], Answers]] = {
        "PEFT, one by one": partial(peft, bench.requests),
        "static batches": partial(static, bench.requests),
        "engine": partial(drive, engine, requests, CLIENTS),
    }
    answers = {name: side() for name, side in sides.items()}  # also warms up
    same = {name: sum(a == b for a, b in zip(found, answers["engine"], strict=True)) for name, found in answers.items()}
    assert min(same.values()) == REQUESTS, f"the sides do not answer alike: {same}"
    times = in_turns(sides, ROUNDS)
    engine.close()
    result: dict[str, Any] = {f"{name}, requests/s": round(REQUESTS / median(times[name]), 1) for name in sides}
    for name in ("PEFT, one by one", "static batches"):
        ratios = [theirs / ours for theirs, ours in zip(times[name], times["engine"], strict=True)]
        result[f"engine against {name}"] = spread(ratios)
    return result


def first() -> dict[str, Any]:
    """Seconds to the first token, request by request, after the soft prompt's first use."""
    bench = Bench(length=100)
    engine = bench.engine()
    handle = engine.add(bench.soft_prompts[0], "long")
    draw = random.Random(1)

    def once(who: Any) -> float:
        ids = [draw.randrange(10, bench.base.vocabulary) for _ in range(30)]
        began = time.perf_counter()
        events = engine.generate(Request(ids, who, 2, ignore_end=True))
        next(events)
        taken = time.perf_counter() - began
        list(events)
        return taken

    once(handle), once(None)
    pairs = [(once(handle), once(None)) for _ in range(100)]
    engine.close()
    return {
        "P=100, ms": round(1000 * median([with_it for with_it, _ in pairs]), 2),
        "P=0, ms": round(1000 * median([without for _, without in pairs]), 2),
        "ratio": spread([with_it / without for with_it, without in pairs]),
    }


def sharing() -> dict[str, Any]:
    """Soft prompts of 20 and 100 vectors, their keys and values computed once or for every request; the same answers."""
    result: dict[str, Any] = {}
    for length in (LENGTH, 100):
        bench = Bench(length)
        engines = {"shared": bench.engine(), "not shared": bench.engine(share=False)}
        sides: dict[str, Callable[[], Answers]] = {}
        for name, engine in engines.items():
            handles = [engine.add(vectors, str(at)) for at, vectors in enumerate(bench.soft_prompts)]
            requests = [Request(ids, handles[who], new, ignore_end=True) for who, ids, new in bench.requests]
            sides[name] = partial(drive, engine, requests, CLIENTS)
        answers = [side() for side in sides.values()]
        assert answers[0] == answers[1], "sharing changes answers"
        times = in_turns(sides, 2 * ROUNDS)
        for name, engine in engines.items():
            result[f"P={length}, {name}, requests/s"] = round(REQUESTS / median(times[name]), 1)
            result[f"P={length}, {name}, prompt tokens from the cache"] = (
                engine.stats.cached_tokens / engine.stats.prompt_tokens
            )
            engine.close()
        ratios = [theirs / ours for ours, theirs in zip(times["shared"], times["not shared"], strict=True)]
        result[f"P={length}, shared against not shared"] = spread(ratios)
    return result


def residents() -> dict[str, Any]:
    bench = Bench()
    engines = {"1 resident": bench.engine(), "1,000 resident": bench.engine(), "1,000 resident, all asked": bench.engine()}
    handles = {}
    for name, engine in engines.items():
        count = 1 if name == "1 resident" else 1000
        # The asked one holds the same vectors everywhere, the others are its neighbours.
        vectors = [bench.soft_prompts[0], *(bench.rows(LENGTH) for _ in range(count - 1))]
        handles[name] = [engine.add(each, str(at)) for at, each in enumerate(vectors)]
    draw = random.Random(2)
    sides: dict[str, Callable[[], Answers]] = {}
    for name, engine in engines.items():
        asked = [draw.randrange(1000) if name.endswith("asked") else 0 for _ in bench.requests]
        requests = [
            Request(ids, handles[name][at], new, ignore_end=True)
            for at, (_, ids, new) in zip(asked, bench.requests, strict=True)
        ]
        sides[name] = partial(drive, engine, requests, CLIENTS)
    for side in sides.values():
        side()
    times = in_turns(sides, rounds=2 * ROUNDS)
    for engine in engines.values():
        engine.close()
    result: dict[str, Any] = {f"{name}, requests/s": round(REQUESTS / median(taken), 1) for name, taken in times.items()}
    for name in list(engines)[1:]:
        ratios = [one / many for one, many in zip(times["1 resident"], times[name], strict=True)]
        result[f"throughput of {name} against 1"] = spread(ratios)
    return result


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


def median(values: list[float]) -> float:
    return statistics.median(values)


def spread(ratios: list[float]) -> str:
    """Median of paired ratios with a bootstrap interval of 95 %."""
    low, high = interval(ratios)
    return f"{median(ratios):.2f} [{low:.2f}, {high:.2f}]"


def percentiles(seconds: list[float]) -> list[float]:
    """[p50, p99] in milliseconds."""
    ordered = sorted(seconds)
    return [round(1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))], 1) for share in (0.5, 0.99)]


PARTS = {
    "throughput": throughput,
    "first": first,
    "sharing": sharing,
    "residents": residents,
    "curve": curve,
    "http": http,
    "accuracy": accuracy,
}
ASKED = {"engines": engines}
"""Parts that need what is not always installed."""


def serve(arguments: argparse.Namespace) -> None:
    """Throughput, time to the first token, 1,000 resident soft prompts, HTTP, accuracy through HTTP."""
    torch.set_num_threads(arguments.threads)
    results: dict[str, Any] = {"threads": arguments.threads, "load": [os.getloadavg()[0]]}
    for part in arguments.parts or list(PARTS):
        results[part] = (PARTS | ASKED)[part]()
        print(f"{part}", *(f"  {name}: {value}" for name, value in results[part].items()), sep="\n", flush=True)
    results["load"].append(os.getloadavg()[0])
    write(arguments.out, results, {"curve": picture(results["curve"])} if "curve" in results else {})


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The command `serve`."""
    command = commands.add_parser("serve", help=serve.__doc__)
    command.add_argument("parts", nargs="*", choices=[*PARTS, *ASKED, []], help=f"default: all but {', '.join(ASKED)}")
    command.add_argument("--threads", type=int, default=1)
    command.add_argument("--out", help="file for the raw numbers (JSON)")
    command.set_defaults(run=serve)
