"""Runs the checks: a process of its own for each base, forked from one that has imported everything.

So a crash, or a check that does not end, costs one base, and importing costs nothing. Every result is one line of JSON.
"""

from __future__ import annotations

import gc
import json
import os
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from matrix.bases import tokenizer, write_base
from matrix.checks import COLUMNS, SECONDS, judged
from matrix.subject import Subject, first_line
from matrix.variants import Case

PACKAGES = ("transformers", "torch", "deepspeed", "tokenizers", "safetensors")
BUILD = 90
"""Seconds to build a base."""

Line = dict[str, Any]
"""The result of one base: name, type, built or the reason why not, cells by column, facts, seconds."""


class OutOfTime(BaseException):
    """A check did not end in time. Not an `Exception`: nothing that is checked may catch it."""


def prepare() -> None:
    """Import what the checks need, so that forked processes have it."""
    from ptuning.imports import load_deepspeed

    load_deepspeed()
    import transformers.generation.utils  # noqa: F401
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    disable_progress_bar()
    set_verbosity_error()
    torch.set_num_threads(1)
    tokenizer()
    gc.freeze()  # a collection in a forked process would visit, and thereby copy, everything that is imported


def run(
    cases: Iterable[Case], columns: Sequence[str], tell: Callable[[Line], None], prelude: Callable[[], None] | None = None
) -> None:
    """Check all cases; `tell` receives each result at once. `prelude` is called in each process before its checks."""
    prepare()
    for case in cases:
        tell(check_apart(case, columns, prelude))


def check_apart(case: Case, columns: Sequence[str], prelude: Callable[[], None] | None = None) -> Line:
    """The result of one case, from a forked process."""
    began = time.monotonic()
    reading, writing = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    work = Path(tempfile.mkdtemp(prefix="ptuning-matrix-"))
    child = os.fork()
    if not child:
        os.close(reading)
        _child(case, columns, writing, work, prelude)
    os.close(writing)
    found, ended = _received(reading, BUILD + sum(SECONDS[column] for column in columns) + 30)
    if not ended:
        _kill_group(child)
    _, status = os.waitpid(child, 0)
    shutil.rmtree(work, ignore_errors=True)
    line = _assembled(case, columns, found, f"the process ended with status {status}" if ended else "no end")
    line["seconds"] = round(time.monotonic() - began, 1)
    return line


def _received(reading: int, seconds: float) -> tuple[list[Line], bool]:
    """What a process reports, and whether it ended in time."""
    whole, ended, end = b"", False, time.monotonic() + seconds
    with os.fdopen(reading, "rb", buffering=0) as pipe:
        while not ended and select.select([pipe], [], [], max(0.0, end - time.monotonic()))[0]:
            part = pipe.read(1 << 16)
            ended = not part
            whole += part
    return [json.loads(line) for line in whole.split(b"\n")[:-1]], ended


def _kill_group(child: int) -> None:
    """End a process and those that it has started."""
    try:
        os.killpg(child, signal.SIGKILL)
    except ProcessLookupError:
        os.kill(child, signal.SIGKILL)


def _assembled(case: Case, columns: Sequence[str], reports: Sequence[Line], end: str) -> Line:
    line: Line = {"name": case.name, "type": case.type, "built": "", "cells": {}, "facts": {}}
    for report in reports:
        line["cells"] |= report.pop("cells", {})
        line["facts"] |= report.pop("facts", {})
        line |= report
    missing = [column for column in columns if column not in line["cells"]]
    if not reports:
        line["built"] = end
    elif not line["built"] and missing and not line.pop("finished", False):
        line["cells"][missing[0]] = {"result": "error", "detail": f"crash: {end}"}
    line.pop("finished", None)
    return line


def _child(case: Case, columns: Sequence[str], writing: int, work: Path, prelude: Callable[[], None] | None) -> None:
    """Build and check one base; never returns."""
    try:
        os.setpgid(0, 0)
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, 1)
        os.dup2(nothing, 2)
        signal.signal(signal.SIGALRM, _out_of_time)
        if prelude:
            prelude()
        for report in reports(case, columns, work):
            os.write(writing, json.dumps(report).encode() + b"\n")
    except BaseException:
        os.write(writing, json.dumps({"built": traceback.format_exc()[-300:]}).encode() + b"\n")
    finally:
        os._exit(0)


def _out_of_time(*_: Any) -> None:
    raise OutOfTime


@contextmanager
def _limit(seconds: int) -> Iterator[None]:
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def reports(case: Case, columns: Sequence[str], work: Path) -> Iterator[Line]:
    """Build one base and check it, column by column, in this process."""
    folder = work / "base"
    try:
        with _limit(BUILD):
            write_base(case, folder)
            subject = Subject(folder, work)
            facts = {"class": type(subject.reference.model).__name__, "context": round(subject.reference.context(), 3)}
    except (Exception, OutOfTime) as error:
        yield {"built": first_line(error)}
        return
    yield {"facts": facts}
    for column in columns:
        began = time.monotonic()
        try:
            with _limit(SECONDS[column]):
                cell: Line = judged(COLUMNS[column], subject)
        except OutOfTime:
            cell = {"result": "error", "detail": f"no end after {SECONDS[column]} s"}
        cell["seconds"] = round(time.monotonic() - began, 1)
        yield {"cells": {column: cell}, "facts": dict(subject.facts)}
        if column == "accepted" and cell["result"] == "no":
            break
    yield {"finished": True}


def versions() -> dict[str, str]:
    """The versions that results depend on."""
    return {name: version(name) for name in PACKAGES}


def counts(lines: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """Results per column; `not built` in a column of its own."""
    found: dict[str, Counter[str]] = {"built": Counter(), **{column: Counter() for column in COLUMNS}}
    for line in lines:
        found["built"]["no" if line["built"] else "ok"] += 1
        for column, cell in line["cells"].items():
            found[column][cell["result"]] += 1
        if line["cells"].get("train", {}).get("result") == "ok":
            found["train"][line["facts"]["way"]] += 1
    return {column: dict(results) for column, results in found.items() if results}


def read(path: Path) -> list[Line]:
    """The results in a file. A base may occur several times: a later line adds its columns or replaces them."""
    found: dict[str, Line] = {}
    for text in path.read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        if "name" not in line:
            continue
        before = found.get(line["name"])
        if before and not line["built"]:
            line["cells"] = {**before["cells"], **line["cells"]}
            line["facts"] = {**before["facts"], **line["facts"]}
        found[line["name"]] = line
    return list(found.values())


def complete(line: Line, columns: Sequence[str]) -> bool:
    """Whether a base needs no further check of these columns."""
    refused = line["cells"].get("accepted", {}).get("result") == "no"
    return not line["built"] and (refused or set(columns) <= set(line["cells"]))
