"""Every architecture of transformers: right, or refused in a sentence. And the checker itself: it finds what is wrong."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY

from ptuning.errors import UserError

TYPES = ["llama", "gpt2", "gemma2"]


def also_nightly(*names: Any) -> list[Any]:
    """Bases with peculiarities of their own; they are among those of `test_every_architecture`, too."""
    return [pytest.param(*(name if isinstance(name, tuple) else (name,)), marks=pytest.mark.nightly) for name in names]


SCRIPT = REPOSITORY / "jobs" / "architectures.py"


def break_attention() -> None:
    """After a base is loaded, its attention over segments gives other values: what no check at load could find."""
    from matrix.subject import Subject
    from transformers import AttentionInterface

    from ptuning.model.tree_attention import ATTENTION, segment_attention

    load = Subject.trained

    def attention(*arguments: Any, segments: Any = None, **options: Any) -> Any:
        out, weights = segment_attention(*arguments, segments=segments, **options)
        return (out if segments is None else out + 0.05 * out.roll(1, -1)), weights

    def trained(subject: Subject) -> Any:
        model = load(subject)
        AttentionInterface.register(ATTENTION, attention)
        return model

    Subject.trained = trained  # type: ignore[method-assign]  # in a process of its own


def die() -> None:
    from matrix.subject import Subject

    Subject.trained = lambda subject: os._exit(3)  # type: ignore[method-assign, assignment]


def checked(name: str, *columns: str, prelude: Any = None) -> dict[str, Any]:
    from matrix import runner
    from matrix.variants import find_cases

    return runner.check_apart(*find_cases([name]), ["accepted", *columns], prelude)


def results(line: dict[str, Any]) -> dict[str, str]:
    return {column: cell["result"] for column, cell in line["cells"].items()}


@pytest.mark.fast
@pytest.mark.parametrize("name", TYPES)
def test_a_right_base_is_right_and_a_broken_one_is_found(name):
    line = checked(name, "train")
    assert results(line) == {"accepted": "ok", "train": "ok"} and line["facts"]["way"] == "fast", line
    assert line["facts"]["context"] > 0.1, "the tokens of this base hardly depend on those before; errors would be small"
    line = checked(name, "train", prelude=break_attention)
    assert results(line) == {"accepted": "ok", "train": "wrong"}, line
    assert line["cells"]["train"]["detail"].startswith("loss differs by ")


@pytest.mark.fast
@pytest.mark.parametrize("name", ["glm4v_moe", *also_nightly("minimax_m3_vl", "emu3")])
def test_the_text_part_of_a_multimodal_base(name):
    """GLM-4V's text part has no class of its own, so an export holds the whole model, and its experts are stored one by one.
    transformers lists how they are joined for whole models only, also for MiniMax-M3. Emu 3's class is listed under the whole
    config only."""
    line = checked(name, "train", "serve", "export")
    assert results(line) == {"accepted": "ok", "train": "ok", "serve": "ok", "export": "ok"}, line


@pytest.mark.fast
def test_logits_that_a_whole_model_changes_are_refused():
    line = checked("granite_docling")
    assert results(line) == {"accepted": "no"}
    assert "changes the logits of its head (logits_scaling)" in line["cells"]["accepted"]["detail"]


@pytest.mark.fast
@pytest.mark.parametrize("name", ["mllama", "idefics3", *also_nightly("gemma4 e2b", "deepseek_v4")])
def test_what_an_export_needs_more_than_rows_of_embedding_and_head(name):
    """Embeddings of each layer; routes of tokens; rows for tokens that are never predicted; a head without a bias whose states
    lie in all directions, so that no row could be unlikely everywhere."""
    assert results(checked(name, "export")) == {"accepted": "ok", "export": "ok"}


@pytest.mark.fast
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("roberta", "recomputing"),
        ("deepseek_v4", "plain"),
        ("llama", "paged"),
        *also_nightly(("qwen4_exp_text", "plain")),
    ],
)
def test_how_a_base_is_served(name, kind):
    line = checked(name, "serve")
    assert results(line) == {"accepted": "ok", "serve": "ok"} and line["facts"]["engine"] == kind, line


@pytest.mark.fast
@pytest.mark.parametrize(
    "name", ["qwen3_next", "rwkv", "qwen3_vl_moe", *also_nightly("deepseek_v4", "phi4_multimodal", "qwen4_exp_text")]
)
def test_bases_are_partitioned_that_transformers_does_not_load_partitioned(name):
    """Qwen 3 Next reads a convolution's weight without calling it. RWKV cannot be built under `zero.Init`, Qwen 3-VL and
    DeepSeek V4 cannot be filled, and Phi 4 enters it while it is only described. How often Qwen 4 calls a norm depends on the
    row."""
    assert results(checked(name, "zero")) == {"accepted": "ok", "zero": "ok"}


@pytest.mark.fast
def test_a_token_without_a_row_does_not_hinder_an_export():
    """transformers adds a token to the tokenizer of every Qwen 2."""
    from matrix.runner import check_apart
    from matrix.variants import Case

    assert results(check_apart(Case("spare", "qwen2"), ["accepted", "export"])) == {"accepted": "ok", "export": "ok"}


@pytest.mark.fast
def test_a_crash_costs_one_cell():
    line = checked("llama", "train", "long", prelude=die)
    assert results(line) == {"accepted": "ok", "train": "error"}
    assert line["cells"]["train"]["detail"].startswith("crash: the process ended")


@pytest.mark.fast
@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (None, {"result": "ok", "detail": ""}),
        (UserError("BASE/x: not here; choose another"), {"result": "no", "detail": "BASE/x: not here; choose another"}),
        (ValueError("first\nsecond"), {"result": "error", "detail": "ValueError: first"}),
    ],
    ids=["right", "refused", "raised"],
)
def test_the_end_of_a_check_is_a_result(error, expected):
    from matrix.checks import judged
    from matrix.subject import Subject, Wrong

    def check(subject: Subject) -> None:
        if error:
            raise error

    def wrong(subject: Subject) -> None:
        raise Wrong("loss differs by 1.0")

    subject = Subject(Path("BASE"), Path("work"))
    assert judged(check, subject) == expected
    assert judged(wrong, subject) == {"result": "wrong", "detail": "loss differs by 1.0"}


@pytest.mark.fast
def test_the_page_shows_the_worst_of_a_family():
    from matrix.page import page

    def line(name: str, train: str, way: str) -> dict[str, Any]:
        cells = {column: {"result": "ok", "detail": ""} for column in ("accepted", "train")}
        cells["train"] = {"result": train, "detail": "" if train == "ok" else f"loss | of {name}"}
        return {"name": name, "type": "llama", "built": "", "cells": cells, "facts": {"way": way, "class": "X"}}

    lines = [line("llama", "ok", "fast"), line("llama yarn", "ok", "slow"), line("gemma", "wrong", "fast")]
    text = page([*lines, {"name": "mvp", "built": "ValueError: no", "cells": {}, "facts": {}}], {"transformers": "5"})
    assert "| Llama 1 to 3, Yi, SmolLM, TinyLlama | yes | slow |" in text
    assert "| Gemma 1, 2 | yes | WRONG |" in text
    assert "| train | 2 (1 fast, 1 slow) | 0 | 0 | 1 |" in text
    assert "| train | WRONG | `loss \\| of gemma` | gemma |" in text
    assert "| built | not built | `ValueError: no` | mvp |" in text


@pytest.mark.fast
def test_the_readme_says_what_the_page_says():
    page = (REPOSITORY / "docs" / "reference" / "architectures.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| (\w+) \| (.*) \|$", page.partition("## Counts")[2].partition("## Families")[0], re.MULTILINE))
    count = {column: [int(cell.split()[0]) for cell in cells.split(" | ")] for column, cells in rows.items()}
    assert all(cells[2:] == [0, 0] for cells in count.values()), "an error, or wrong numbers"
    working = count["accepted"][0]
    assert {count[column][0] for column in ("train", "text", "serve", "plan", "zero")} == {working}
    assert count["export"][0] >= 0.9 * working
    readme = " ".join((REPOSITORY / "README.md").read_text(encoding="utf-8").split())
    assert f"of {count['built'][0]} types and variants that were tried, {working} train and are served" in readme


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
def test_every_architecture_is_right_or_refused_in_a_sentence(tmp_path):
    out = tmp_path / "architectures.jsonl"
    command = [sys.executable, str(SCRIPT), "check", "--zero", "--out", str(out)]
    subprocess.run(command, check=True, cwd=REPOSITORY, env={**os.environ, "PYTHONPATH": str(REPOSITORY)})
    from matrix.runner import read

    lines = read(out)
    bad = {
        f"{line['name']}, {column}": f"{cell['result']}: {cell['detail']}"
        for line in lines
        for column, cell in line["cells"].items()
        if cell["result"] in ("error", "wrong")
    }
    assert len(lines) > 200 and sum(not line["built"] for line in lines) > 0.95 * len(lines)
    assert not bad


@pytest.mark.fast
def test_recomputing_is_refused_where_the_base_does_not_support_it():
    line = checked("ctrl", "recompute")
    assert results(line) == {"accepted": "ok", "recompute": "no"}
    assert line["cells"]["recompute"]["detail"].startswith("train.gradient_checkpointing: CTRLLMHeadModel does not support it")
