"""Latency over load: requests that come when they come, whoever answers them."""

from __future__ import annotations

import queue
import random
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.answering import CLIENTS, Answers, Asked, Bench, Peft, Static
from ptuning.inference.sampling import Token
from ptuning.inference.transformers_engine import TransformersEngine
from ptuning.inference.types import Request, ResidentPrompt
from ptuning.tracking import plots

RATES = (2.5, 5, 10, 20, 40, 60, 80, 100)
"""Requests per second."""
SECONDS = 8.0
BEHIND_S = 5.0
"""Whoever answers half of the requests later than this is not asked more."""


@dataclass
class Told:
    """What became of one request; all times in seconds of the same clock."""

    due: float
    tokens: list[int] = field(default_factory=list)
    first: float = 0.0
    ended: float = 0.0


Side = Callable[[Asked, Told, Callable[[], None]], None]
"""Takes a request without waiting, fills in what is told and calls when it has ended."""


def streaming(engine: TransformersEngine, handles: Sequence[ResidentPrompt | None]) -> Side:
    """The engine: tokens come as they are chosen."""

    def ask(asked: Asked, told: Told, ended: Callable[[], None]) -> None:
        def deliver(event: Any) -> None:
            if isinstance(event, Token):
                told.first = told.first or time.perf_counter()
                told.tokens.append(event.id)
            else:
                told.ended = time.perf_counter()
                ended()

        who, ids, new = asked
        engine.submit(Request(ids, handles[who], new, ignore_end=True), deliver)

    return ask


def queued(answer: Callable[[Sequence[Asked]], Answers], most: int) -> Side:
    """One thread that answers at most so many of the waiting requests at a time; nobody sees a token before they are done."""
    waiting: queue.SimpleQueue[tuple[Asked, Told, Callable[[], None]]] = queue.SimpleQueue()

    def work() -> None:
        while True:
            batch = [waiting.get()]
            while len(batch) < most and not waiting.empty():
                batch.append(waiting.get())
            answers = answer([asked for asked, _, _ in batch])
            for (_, told, ended), tokens in zip(batch, answers, strict=True):
                told.tokens, told.first = tokens, time.perf_counter()
                told.ended = told.first
                ended()

    threading.Thread(target=work, daemon=True).start()
    return lambda *asked: waiting.put(asked)


def load(side: Side, requests: Sequence[Asked], rate: float, seconds: float = SECONDS) -> list[Told]:
    """Poisson arrivals, the same for all sides, that wait for nobody; returns when the last answer is there."""
    draw, due, told = random.Random(3), 0.0, list[Told]()
    ended = threading.Semaphore(0)
    began = time.perf_counter()
    while (due := due + draw.expovariate(rate)) < seconds:
        time.sleep(max(0.0, began + due - time.perf_counter()))
        told.append(Told(began + due))
        side(requests[(len(told) - 1) % len(requests)], told[-1], ended.release)
    for _ in told:
        ended.acquire()
    return told


def curve() -> dict[str, Any]:
    """[first token p50, p99 in ms, per later token p50 in ms, whole answer p50, p99 in ms, answers/s] by side and rate."""
    bench = Bench()
    ours, bare = bench.engine(), bench.engine()
    sides: dict[str, tuple[Side, bool]] = {
        "engine": (streaming(ours, [ours.add(vectors, str(at)) for at, vectors in enumerate(bench.soft_prompts)]), True),
        "engine, no soft prompt": (streaming(bare, [None] * len(bench.soft_prompts)), True),
        "static batches": (queued(Static(bench), CLIENTS), False),
        "PEFT, one by one": (queued(Peft(bench), 1), False),
    }
    result: dict[str, Any] = {name: {} for name in sides}
    keeping_up = list(sides)
    for side, _ in sides.values():
        load(side, bench.requests, RATES[0], 2)  # warms up
    for number, rate in enumerate(RATES):
        answers: dict[str, list[list[int]]] = {}
        for name in keeping_up[:: -1 if number % 2 else 1]:
            side, streams = sides[name]
            told = load(side, bench.requests, rate)
            answers[name] = [each.tokens for each in told]
            result[name][str(rate)] = summary(told, streams)
            if statistics.median(each.ended - each.due for each in told) > BEHIND_S:
                keeping_up = [each for each in keeping_up if each != name]
        prompted = [found for name, found in answers.items() if name != "engine, no soft prompt"]
        assert all(found == prompted[0] for found in prompted), "the sides do not answer alike"
    ours.close()
    bare.close()
    return result


def summary(told: Sequence[Told], streams: bool) -> list[float | None]:
    """A line of the table; the first token of who does not stream is the whole answer."""

    def ms(seconds: Sequence[float], share: float) -> float:
        ordered = sorted(seconds)
        return round(1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))], 1)

    firsts, wholes = [each.first - each.due for each in told], [each.ended - each.due for each in told]
    between = [(each.ended - each.first) / (len(each.tokens) - 1) for each in told if len(each.tokens) > 1]
    span = max(each.ended for each in told) - min(each.due for each in told)
    later = round(1000 * statistics.median(between), 1) if streams else None
    return [ms(firsts, 0.5), ms(firsts, 0.99), later, ms(wholes, 0.5), ms(wholes, 0.99), round(len(told) / span, 1)]


def picture(result: dict[str, Any]) -> bytes:
    """Latency (p50) over the requests per second that were asked."""
    lines = {name: [(float(rate), row[3] / 1000) for rate, row in rows.items()] for name, rows in result.items()}
    return plots.curves(lines, "Latency over load", "whole answer (p50), seconds", "requests per second")
