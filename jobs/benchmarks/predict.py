"""`predict`: `ptuning predict` against its own engine without Ray, on the same rows, and the memory of its processes."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch

import ptuning
from benchmarks.measuring import heading, in_turns, line, tell_machine, times_as_long, write
from ptuning.inference.predictor import Predictor
from ptuning.model import soft_prompt
from ptuning.model.base import find_base
from ptuning.model.soft_prompt import Card, SoftPrompt
from ptuning.settings.data import Template
from ptuning.settings.model import ModelConfig

TEMPLATE = Template(input="Review: {text}\nSentiment:", target=" {label}", labels=("Negative", "Positive"))
LENGTH = 20
TOGETHER = 1024
"""Rows that the engine alone is given at once; more make it no faster."""


def untrained(seed: int = 0) -> SoftPrompt:
    """Which label it chooses does not matter here."""
    base = find_base(ModelConfig(path="builtin"))
    vectors = torch.randn(LENGTH, base.width, generator=torch.Generator().manual_seed(seed))
    card = Card(
        name="untrained",
        base="builtin",
        dtype="float32",
        base_fingerprint=base.fingerprint.parts(),
        length=LENGTH,
        width=base.width,
        template=TEMPLATE,
        content_hash=soft_prompt.content_hash(vectors),
    )
    return SoftPrompt(vectors, card)


def table(folder: Path, rows: int) -> tuple[str, list[str]]:
    """A file of short rows, and their texts: the sentences of the built-in task, over and over."""
    source = Path(ptuning.__file__ or "").parent / "builtin" / "tasks" / "sentiment" / "train.jsonl"
    known = [json.loads(each)["text"] for each in source.read_text(encoding="utf-8").splitlines()]
    texts = [known[row % len(known)] for row in range(rows)]
    path = folder / f"{rows}.jsonl"
    path.write_text("".join(json.dumps({"id": row, "text": text}) + "\n" for row, text in enumerate(texts)), encoding="utf-8")
    return str(path), texts


@contextmanager
def memory(seen: dict[str, list[int]]) -> Iterator[None]:
    """Resident bytes of the driver, the engine and Ray's store, once a second."""
    ended = threading.Event()

    def look() -> None:
        me = psutil.Process()
        while not ended.wait(1.0):
            for each in [me, *me.children(recursive=True)]:
                try:
                    title = " ".join(each.cmdline())
                    kind = "driver" if each == me else "engine" if "MapWorker" in title else "reader" if "Read" in title else ""
                    if kind:
                        seen.setdefault(kind, []).append(each.memory_info().rss)
                except psutil.Error:
                    continue

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def speed(folder: Path, prompt: str, rows: int, rounds: int, threads: int) -> dict[str, Any]:
    """Rows per second of both sides, in turns."""
    path, texts = table(folder, rows)
    seconds: list[float] = []
    with Predictor(ptuning.load(prompt)) as alone:

        def engine() -> None:
            parts = [texts[first : first + TOGETHER] for first in range(0, rows, TOGETHER)]
            with ThreadPoolExecutor(2) as threads:  # as in predict: one part is computed, the next one is tokenised
                list(threads.map(lambda part: alone.answer_rows([("untrained", {"text": text}) for text in part]), parts))

        def stream() -> None:
            output = str(folder / f"{len(seconds)}.parquet")
            seconds.append(ptuning.predict(prompt, path, output, cpus=threads + 0.1, progress=False).seconds)

        engine()  # its first steps are slower
        times = in_turns({"engine": engine, "predict": stream}, rounds)
    ratio = times_as_long(seconds, times["engine"])
    heading("side", "rows per second, while it answers", "and with starting, reading twice, and writing")
    line("the engine alone", f"{rows / statistics.median(times['engine']):,.0f}", "")
    line("ptuning predict", f"{rows / statistics.median(seconds):,.0f}", f"{rows / statistics.median(times['predict']):,.0f}")
    print(f"\npredict / engine: {ratio[0]:.2f} ({ratio[1]:.2f} to {ratio[2]:.2f})\n")
    return {"rows": rows, "engine_s": times["engine"], "answering_s": seconds, "predict_s": times["predict"], "ratio": ratio}


def flat(folder: Path, prompt: str, rows: int, threads: int) -> dict[str, Any]:
    """Memory of the processes over many rows."""
    path, _ = table(folder, rows)
    seen: dict[str, list[int]] = {}
    with memory(seen):
        result = ptuning.predict(prompt, path, str(folder / "many.parquet"), cpus=threads + 0.1, progress=False)
    heading("process", "MB after a quarter of its time", "at its end", "at most")
    for kind, sizes in seen.items():
        line(kind, *(f"{size / 1e6:,.0f}" for size in (sizes[len(sizes) // 4], sizes[-1], max(sizes))))
    print(f"\n{result}\n")
    return {"rows": rows, "seconds": result.seconds, "memory": seen}


def predict(arguments: argparse.Namespace) -> None:
    """Rows per second of `ptuning predict` and of its engine alone, and the memory of its processes."""
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    torch.set_num_threads(arguments.threads)
    results: dict[str, Any] = {"machine": tell_machine(arguments.threads)}
    with tempfile.TemporaryDirectory(prefix="ptuning-benchmark-") as temporary:
        folder = Path(temporary)
        prompt = str(folder / "untrained")
        untrained().save(prompt)
        parts: dict[str, Callable[[], dict[str, Any]]] = {
            "speed": lambda: speed(folder, prompt, arguments.rows, arguments.rounds, arguments.threads),
            "memory": lambda: flat(folder, prompt, arguments.many, arguments.threads),
        }
        for name in arguments.parts or parts:
            results[name] = parts[name]()
    write(arguments.out, results, {})


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The command `predict`."""
    parser = commands.add_parser("predict", help=predict.__doc__)
    parser.add_argument("parts", nargs="*", choices=("speed", "memory", []), help="which parts; default: all")
    parser.add_argument("--rows", type=int, default=20_000, help="of the comparison")
    parser.add_argument("--many", type=int, default=100_000, help="rows over which the memory is measured")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", help="file for the raw numbers (JSON)")
    parser.set_defaults(run=predict)
