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
import os
import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.answering import CLIENTS, LENGTH, REQUESTS, ROUNDS, Answers, Bench, Peft, Static, drive
from benchmarks.curve import curve, picture
from benchmarks.engines import engines
from benchmarks.measuring import in_turns, interval, write
from benchmarks.serve_http import accuracy, http
from ptuning.inference.types import Request


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


def median(values: list[float]) -> float:
    return statistics.median(values)


def spread(ratios: list[float]) -> str:
    """Median of paired ratios with a bootstrap interval of 95 %."""
    low, high = interval(ratios)
    return f"{median(ratios):.2f} [{low:.2f}, {high:.2f}]"


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
