"""Both engines side by side: the same base, soft prompts and requests, each engine in a process of its own, as in a replica."""

from __future__ import annotations

import multiprocessing
import os
import queue
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.util import find_spec
from multiprocessing.connection import Connection
from typing import Any, Literal

import psutil
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.answering import CLIENTS, LENGTH, REQUESTS, Answers, Asked, Bench
from benchmarks.measuring import interval
from ptuning.inference.engine import Engine
from ptuning.inference.open_engine import open_engine
from ptuning.inference.sampling import Token
from ptuning.inference.types import EngineConfig, Request
from ptuning.model.base import find_base
from ptuning.settings.model import ModelConfig

Kind = Literal["transformers", "vllm"]
KINDS: tuple[Kind, ...] = ("transformers", "vllm")
LENGTHS = (LENGTH, 100)
ROUNDS = 8
CACHE_BYTES = 1 << 28
LARGER: dict[str, Any] = {
    "vocab_size": 32_000,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "max_position_embeddings": 1024,
}
"""A random Llama of 58 million parameters. With the builtin base (4 million) much of the time is not in the passes."""


@dataclass
class Round:
    """What an engine needed for all requests; times in seconds."""

    answers: Answers
    seconds: float = 0.0
    cpu: float = 0.0
    """User and system time of the engine's process and of all that it has started."""
    first: list[float] = field(default_factory=list)
    """From a request to its first token."""
    between: list[float] = field(default_factory=list)
    """Between two tokens of an answer."""


def requests_of(bench: Bench, number: int) -> list[Asked]:
    """New texts for every round: nothing but the soft prompts is in the cache."""
    draw = random.Random(number)
    return [
        (at % 4, [draw.randrange(10, bench.base.vocabulary) for _ in range(draw.randint(10, 40))], draw.randint(8, 32))
        for at in range(REQUESTS)
    ]


def drive_timed(engine: Engine, requests: Sequence[Request], clients: int) -> Round:
    """Answers of all requests, `clients` at a time, and when their tokens came."""
    done: queue.SimpleQueue[None] = queue.SimpleQueue()
    found = Round([[] for _ in requests])
    waiting = iter(enumerate(requests))
    before = _cpu_seconds()
    began = time.perf_counter()

    def ask() -> None:
        for at, request in waiting:

            def deliver(event: Any, at: int = at) -> None:
                if not isinstance(event, Token):
                    done.put(None)
                    return
                now = time.perf_counter()
                (found.between if found.answers[at] else found.first).append(now - last[at])
                last[at] = now
                found.answers[at].append(event.id)

            last[at] = time.perf_counter()
            engine.submit(request, deliver)
            return

    last: dict[int, float] = {}
    for _ in range(clients):
        ask()
    for _ in requests:
        done.get()
        ask()
    found.seconds = time.perf_counter() - began
    found.cpu = _cpu_seconds() - before
    return found


def _cpu_seconds() -> float:
    here = psutil.Process()
    return sum(sum(each.cpu_times()[:2]) for each in [here, *here.children(recursive=True)])


def save_larger(folder: str) -> str:
    """A random base of this shape, with the tokenizer of the builtin one."""
    tokenizer = find_base(ModelConfig()).tokenizer
    ends = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(**LARGER, **ends)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _host(kind: Kind, path: str, length: int, pipe: Connection) -> None:
    """An engine in this process; answers the rounds whose numbers come through the pipe."""
    torch.set_num_threads(1)
    bench = Bench(length, path)
    config = EngineConfig(context=bench.base.context, running=32, cache_bytes=CACHE_BYTES)
    engine = open_engine(bench.base, torch.float32, config, kind)
    handles = [engine.add(vectors, str(at)) for at, vectors in enumerate(bench.soft_prompts)]
    while (number := pipe.recv()) is not None:
        requests = [Request(ids, handles[who], new, ignore_end=True) for who, ids, new in requests_of(bench, number)]
        pipe.send(drive_timed(engine, requests, CLIENTS))
    engine.close()


class Hosted:
    """An engine in a process of its own."""

    def __init__(self, kind: Kind, path: str, length: int) -> None:
        self._pipe, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        self._process = context.Process(target=_host, args=(kind, path, length, theirs))
        self._process.start()
        theirs.close()

    def __enter__(self) -> Hosted:
        return self

    def __call__(self, number: int) -> Round:
        self._pipe.send(number)
        found: Round = self._pipe.recv()
        return found

    def __exit__(self, *error: object) -> None:
        self._pipe.send(None)
        self._process.join()


def engines() -> dict[str, Any]:
    """Throughput, first token, time between tokens and CPU time per answer at 16 clients, with 20 and 100 virtual tokens."""
    if find_spec("vllm") is None:
        raise SystemExit("vLLM is not installed; run this in an environment with the versions of constraints-vllm.txt")
    os.environ["OMP_NUM_THREADS"] = "1"  # of vLLM's processes
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, path in {"builtin": "builtin", "58 M": save_larger(folder)}.items():
            for length in LENGTHS:
                result |= {f"{name}, P={length}, {what}": value for what, value in _side_by_side(path, length).items()}
    return result


def _side_by_side(path: str, length: int) -> dict[str, Any]:
    rounds: dict[Kind, list[Round]] = {kind: [] for kind in KINDS}
    with ExitStack() as stack:
        hosts = {kind: stack.enter_context(Hosted(kind, path, length)) for kind in KINDS}
        for host in hosts.values():
            host(-1)  # warms up
        for number in range(ROUNDS):
            for kind in KINDS[:: -1 if number % 2 else 1]:
                rounds[kind].append(hosts[kind](number))
    pairs = [zip(ours.answers, theirs.answers, strict=True) for ours, theirs in zip(*rounds.values(), strict=True)]
    alike = sum(one == other for pair in pairs for one, other in pair)
    assert alike >= 0.98 * ROUNDS * REQUESTS, f"the engines do not answer alike: {alike} of {ROUNDS * REQUESTS}"
    result: dict[str, Any] = {"same answers": f"{alike} of {ROUNDS * REQUESTS}"}
    result |= {f"{kind}, {what}": value for kind in KINDS for what, value in _figures(rounds[kind]).items()}
    for name, words in (("seconds", "seconds"), ("cpu", "CPU time")):
        ratios = [getattr(ours, name) / getattr(theirs, name) for ours, theirs in zip(*rounds.values(), strict=True)]
        low, high = interval(ratios)
        result[f"transformers / vllm, {words}"] = f"{statistics.median(ratios):.2f} [{low:.2f}, {high:.2f}]"
    print(path, length, os.getloadavg(), *result.items(), sep="\n", flush=True)
    return result


def _figures(rounds: Sequence[Round]) -> dict[str, Any]:
    def milliseconds(name: str) -> list[float]:
        values = sorted(value for each in rounds for value in getattr(each, name))
        return [round(1000 * values[min(len(values) - 1, int(share * len(values)))], 1) for share in (0.5, 0.99)]

    return {
        "requests/s": round(REQUESTS / statistics.median(each.seconds for each in rounds), 1),
        "CPU ms per answer": round(1000 * statistics.median(each.cpu for each in rounds) / REQUESTS, 1),
        "first token, ms (p50, p99)": milliseconds("first"),
        "between tokens, ms (p50, p99)": milliseconds("between"),
    }
