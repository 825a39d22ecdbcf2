"""A step of ours against PEFT's: time, share of the machine's matrix product, memory; then what each idea is worth."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.multiprocessing
from transformers import PreTrainedModel

from benchmarks import ideas, trainer
from benchmarks.measuring import gemm_rate, heading, in_turns, line, tell_machine, tell_part, times_as_long, write
from benchmarks.plan import MIB, Peak
from benchmarks.steps import (
    SIZES,
    SMALL,
    Size,
    Step,
    difference,
    flops,
    limit,
    our_step,
    peft_step,
    random_llama,
    random_rows,
    random_vectors,
)
from ptuning.model.prompted_model import PromptedModel
from ptuning.tracking import plots

LENGTHS, TEXTS, VOCABULARIES = (1, 20, 100), (16, 32, 128, 512), (4_000, 150_000)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MEMORY = ((16, 32, 1), (16, 32, 20), (16, 32, 100), (4, 512, 100))
"""B, T, P whose memory is measured."""


class Shape(NamedTuple):
    """Rows, their tokens, virtual tokens and the vocabulary of a step."""

    batch: int
    text: int
    length: int
    vocabulary: int

    def flops(self, size: Size) -> int:
        return flops(self.batch, self.text, self.length, size._replace(vocabulary=self.vocabulary))


class Bases(NamedTuple):
    """One base for each side: both change what they are given."""

    ours: PromptedModel
    theirs: PreTrainedModel


def load_bases(dtype: torch.dtype, size: Size, device: str) -> Bases:
    return Bases(PromptedModel(random_llama(dtype, size, device)), random_llama(dtype, size, device))


def shapes(texts: Sequence[int], quick: bool, size: Size) -> Iterator[Shape]:
    """The matrix: all lengths and texts with the base's own vocabulary, for the small base others, too, with rows of 32. Long
    rows come in small batches, so that a step of PEFT's takes seconds and not minutes."""
    for text, length in itertools.product((32,) if quick else texts, LENGTHS):
        yield Shape({128: 8, 512: 4}.get(text, 16), text, length, size.vocabulary)
    others = VOCABULARIES if 32 in texts and size == SMALL and not quick else ()
    for vocabulary, length in itertools.product(others, LENGTHS):
        yield Shape(16, 32, length, vocabulary)


def compare(bases: Bases, shape: Shape, size: Size, dtype: torch.dtype, pairs: int) -> dict[str, Any]:
    """One shape: agreement of the gradients, an A/A control, and the ratio of step times PEFT / ours."""
    rows, vectors = random_rows([shape.text] * shape.batch), random_vectors(shape.length, size.width)
    ours, theirs = our_step(bases.ours, vectors, rows), peft_step(bases.theirs, vectors, rows)
    apart = difference(ours(), theirs())
    assert apart < limit(dtype), f"the gradients differ by {apart:.0e} of their norm: {shape}"
    rate = gemm_rate(dtype, bases.theirs.device.type)
    control = in_turns({"A": ours, "again": ours}, pairs).values()
    times = in_turns({"ours": ours, "PEFT": theirs}, pairs)
    ratio, low, high = times_as_long(*times.values())
    step = statistics.median(times["ours"])
    return shape._asdict() | {
        "dtype": str(dtype).removeprefix("torch."),
        "pairs": pairs,
        "gradient_difference": apart,
        "ours_s": step,
        "peft_s": statistics.median(times["PEFT"]),
        "ratio": ratio,
        "ratio_95": (low, high),
        "control": times_as_long(*control)[0],
        "gemm_gflops": rate / 1e9,
        "share_of_gemm": shape.flops(size) / step / rate,
        "seconds": times,
    }


def matrix(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Step time against PEFT's prompt tuning in a plain loop."""
    heading("dtype", "B, T, P", "V", "ours, s", "PEFT, s", "ratio", "95 %", "A/A", "pairs", "of GEMM peak", "gradients differ")
    found: list[dict[str, Any]] = []
    size = SIZES[arguments.size]
    for name in arguments.dtypes:
        dtype, bases, vocabulary = DTYPES[name], None, 0
        for shape in shapes(arguments.texts, arguments.quick, size):
            if bases is None or shape.vocabulary != vocabulary:
                bases, vocabulary = None, shape.vocabulary  # the old ones leave before the new ones come
                bases = load_bases(dtype, size._replace(vocabulary=vocabulary), arguments.device)
            one = compare(bases, shape, size, dtype, arguments.pairs)
            found.append(one)
            low, high = one["ratio_95"]
            line(
                *(name, f"{shape.batch}, {shape.text}, {shape.length}", f"{shape.vocabulary:,}"),
                *(f"{one['ours_s']:.3f}", f"{one['peft_s']:.3f}", f"**{one['ratio']:.2f}**", f"{low:.2f} to {high:.2f}"),
                *(f"{one['control']:.2f}", one["pairs"], f"{one['share_of_gemm']:.0%} of {one['gemm_gflops']:.0f} GFLOP/s"),
                f"{one['gradient_difference']:.0e}",
            )
    return found


def memory(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Peak memory of a step over what the process had with its base, each side in a process of its own."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # freed memory leaves at once: what is resident is what is allocated
    results: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for side in ("ours", "PEFT"):
            torch.multiprocessing.spawn(  # type: ignore[attr-defined]  # a re-export that torch does not declare
                peaks, (side, arguments.dtypes, arguments.size, arguments.device, arguments.threads, f"{folder}/{side}.json")
            )
            results[side] = json.loads(Path(folder, f"{side}.json").read_text())
    del os.environ["MALLOC_MMAP_THRESHOLD_"]
    heading("dtype", "B, T, P", "ours, MiB", "PEFT, MiB", "ratio")
    found = []
    for ours, theirs in zip(results["ours"], results["PEFT"], strict=True):
        ratio = theirs["bytes"] / ours["bytes"]
        found.append(ours | {"bytes": [ours["bytes"], theirs["bytes"]], "ratio": ratio})
        mine, other = ours["bytes"] / MIB, theirs["bytes"] / MIB
        line(ours["dtype"], ", ".join(map(str, ours["shape"])), f"{mine:.0f}", f"{other:.0f}", f"**{ratio:.1f}**")
    return found


def peaks(rank: int, side: Literal["ours", "PEFT"], dtypes: list[str], size: str, device: str, threads: int, out: str) -> None:
    """A process of one side: the memory that steps of several shapes take at most, in bytes."""
    torch.set_num_threads(threads)
    found = []
    for name in dtypes:
        base = random_llama(DTYPES[name], SIZES[size], device)
        model = PromptedModel(base) if side == "ours" else None
        for batch, text, length in MEMORY:
            rows, vectors = random_rows([text] * batch), random_vectors(length, SIZES[size].width)
            step = our_step(model, vectors, rows) if model else peft_step(base, vectors, rows)
            step()  # buffers that stay
            found.append({"dtype": name, "shape": (batch, text, length), "bytes": peak_of(step, device)})
    Path(out).write_text(json.dumps(found))


def peak_of(step: Step, device: str) -> int:
    """Bytes that a step takes at most over what was there before it: anonymous memory, or what torch allocates on a GPU."""
    if device == "cpu":
        with Peak() as peak:
            step()
        return peak.anonymous
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    return torch.cuda.max_memory_allocated(device) - before


def slots(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """K soft prompts of 20 vectors side by side over one base, each with 16 rows of 32 tokens; one process, nothing sharded."""
    heading("dtype", "K", "seconds per step", "steps of a soft prompt per second", "tokens per second", "of GEMM peak", "MiB")
    found = []
    size = SIZES[arguments.size]
    for name in arguments.dtypes:
        dtype, shape = DTYPES[name], Shape(16, 32, 20, size.vocabulary)
        model = PromptedModel(random_llama(dtype, size, arguments.device))
        rows, vectors = random_rows([shape.text] * shape.batch), random_vectors(shape.length, size.width)
        steps = {str(many): our_step(model, vectors, rows, many) for many in arguments.slots}
        alone = next(iter(steps.values()))().clone()
        memory: dict[str, int | None] = {}
        for many, step in list(steps.items()):
            try:
                apart = difference(step(), alone)
            except torch.OutOfMemoryError:  # of a GPU; a CPU's system ends the process
                line(name, many, "out of memory")
                del steps[many]
                continue
            assert apart < limit(dtype), f"K = {many}: the gradient differs by {apart:.0e} of its norm"
            # On CPU memory wants a process of its own: that is the part `memory`.
            memory[many] = None if arguments.device == "cpu" else peak_of(step, arguments.device)
        rate = gemm_rate(dtype, arguments.device)
        for many, times in in_turns(steps, arguments.pairs).items():
            seconds = statistics.median(times)
            rates = {"steps": int(many) / seconds, "tokens": int(many) * shape.batch * shape.text / seconds}
            share = int(many) * shape.flops(size) / seconds / rate
            one = {"dtype": name, "slots": int(many), "step_s": seconds, "bytes": memory[many], "share_of_gemm": share}
            found.append(one | {f"{key}_per_s": value for key, value in rates.items()})
            line(
                *(name, many, f"{seconds:.4f}", f"**{rates['steps']:.1f}**", f"{rates['tokens']:,.0f}"),
                *(f"{share:.0%} of {rate / 1e9:.0f} GFLOP/s", "-" if (used := memory[many]) is None else f"{used / MIB:,.0f}"),
            )
    return found


PARTS = {
    "matrix": matrix,
    "memory": memory,
    "slots": slots,
    "ideas": ideas.ideas,
    "attention": ideas.long_rows,
    "trainer": trainer.trainer,
}


def train(arguments: argparse.Namespace) -> None:
    """Step time and peak memory against PEFT; what each idea contributes; Hugging Face's Trainer with PEFT.

    The full matrix (36 shapes) takes about 40 minutes on two cores: the other vocabularies come with rows of 32 tokens only,
    and long rows in small batches. Fewer --pairs, --dtypes and --texts take less.
    """
    torch.set_num_threads(arguments.threads)
    arguments.pairs = min(arguments.pairs, 3) if arguments.quick else arguments.pairs
    results: dict[str, Any] = {"machine": tell_machine(arguments.threads, arguments.device), "size": arguments.size}
    pictures: dict[str, bytes] = {}
    for part in arguments.parts or list(PARTS):
        tell_part(PARTS[part])
        results[part] = PARTS[part](arguments)
    if arguments.out and not arguments.quick and "matrix" in results:
        pictures["ratio"] = picture(results["matrix"], "ratio", "PEFT's seconds per step over ours")
        pictures["peak"] = picture(results["matrix"], "share_of_gemm", "share of the measured GEMM rate")
    write(arguments.out, results, pictures)


def picture(found: list[dict[str, Any]], value: str, title: str) -> bytes:
    """A value over the text's length, one line for each dtype and number of virtual tokens."""
    history: dict[str, list[tuple[int, float]]] = {}
    for one in found:
        if one["vocabulary"] == found[0]["vocabulary"]:
            history.setdefault(f"{one['dtype']}, P = {one['length']}", []).append((one["text"], one[value]))
    return plots.curves(history, title, value.replace("_", " "), "text tokens")


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The command `train`."""
    command = commands.add_parser("train", help=(train.__doc__ or "").partition("\n")[0], description=train.__doc__)
    command.add_argument("parts", nargs="*", choices=[*PARTS, []], help="default: all")
    command.add_argument("--quick", action="store_true", help="a few shapes and 3 pairs: some two minutes in all")
    command.add_argument("--pairs", type=int, default=10, help="times that the sides take turns; 3 with --quick")
    command.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    command.add_argument("--texts", type=int, nargs="+", default=list(TEXTS), help="tokens of the matrix's rows")
    command.add_argument("--slots", type=int, nargs="+", default=[1, 2, 4, 8], metavar="K", help="soft prompts side by side")
    command.add_argument("--size", choices=list(SIZES), default="58m", help="random base of the matrix, memory and slots")
    command.add_argument("--device", default="cpu", help="cpu or cuda; on a GPU --dtypes bfloat16 --size 8b --slots 1 4 16 64")
    command.add_argument("--threads", type=int, default=2, help="on a machine that is not at rest 1 is steadier")
    command.add_argument("--out", help="file for the raw numbers (JSON); pictures go beside it")
    command.set_defaults(run=train)
