"""`ptuning predict` without Ray: the first look at a table, what is asked about a row, parts, the output, the metrics."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

import ptuning
from ptuning.cli.app import app
from ptuning.data.readers import Columns
from ptuning.errors import DataError, RunFailed, UserError
from ptuning.inference.inputs import RAW
from ptuning.inference.predictor import Predictor
from ptuning.model import soft_prompt
from ptuning.model.soft_prompt import Card, SoftPrompt
from ptuning.prediction.output import answer_columns, answer_values, check_output, write_output
from ptuning.prediction.parts import SCHEMA, Parts
from ptuning.prediction.result import Measured
from ptuning.prediction.row_texts import RowTexts
from ptuning.prediction.run import Wanted, run_prediction
from ptuning.prediction.survey import Survey, survey
from ptuning.settings.data import MessagesConfig, Template
from ptuning.training import lease

pytestmark = [pytest.mark.fast, pytest.mark.usefixtures("data_folder")]

KIND = Template(input="Text: {text}\nKind:", target=" {label}", labels=("fruit", "tool"))
FREE = Template(input="{text}", target="{answer}")
CHAT = Template(chat_template="{% for m in messages %}{{ m.content }}{% endfor %}")


def look_at(source: Any, model_column: str | None = None, fields: tuple[str, ...] = ("text",)) -> Survey:
    return survey(source, Columns(fields, whole=True), model_column)


def rows_file(name: str, rows: list[dict[str, Any]]) -> str:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return name


def answers(first: int, many: int, **values: Any) -> pa.Table:
    given = {"version": "toy:1", "prediction": "fruit", "probabilities": [0.75, 0.25]} | values
    return pa.Table.from_pylist([{"row": row, **given} for row in range(first, first + many)], SCHEMA)


# -- the first look


def test_columns_keep_their_types() -> None:
    table = pa.table(
        {
            "text": ["a", "b"],
            "number": pa.array([1, 2], pa.int8()),
            "price": pa.array([Decimal("1.10"), None], pa.decimal128(5, 2)),
            "when": pa.array([datetime(2020, 1, 1), None], pa.timestamp("ms")),
            "list": pa.array([[1], []], pa.list_(pa.int32())),
        }
    )
    pq.write_table(table, "t.parquet")
    found = look_at("t.parquet")
    assert found.schema.equals(table.schema) and found.rows == 2
    assert found.as_table(table.to_pylist()).equals(table)


def test_values_of_several_types_are_written_as_text() -> None:
    rows = [{"text": "a", "x": 1}, {"text": "b", "x": "one", "late": {"y": [1]}}, {"text": "c"}]
    found = look_at(rows_file("t.jsonl", rows))
    assert found.as_json == {"x"} and found.schema.names == ["text", "x", "late"]
    assert found.as_table(rows)["x"].to_pylist() == ["1", "one", None]
    assert found.as_table(rows)["late"].to_pylist() == [None, {"y": [1]}, None]


def test_whole_and_broken_numbers_are_one_type() -> None:
    rows = [{"text": "a", "x": 1}] * 1500 + [{"text": "a", "x": 0.5}]
    assert look_at(rows_file("t.jsonl", rows)).schema.field("x").type == pa.float64()


def test_texts_of_csv_stay_texts() -> None:
    Path("t.csv").write_text("text;code;empty\na;007;\nb;NA;\n")
    found = look_at("t.csv")
    rows = [{"text": "a", "code": "007", "empty": ""}]
    assert found.as_table(rows).to_pylist() == rows
    assert found.notes == ("t.csv: columns are separated by semicolons",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "t.csv: is empty; give a table with at least one row"),
        ("text,who\n", "t.csv: is empty; give a table with at least one row"),
        ("text,who\na,b\na\n", "t.csv, row 2 (line 3): has 1 values for 2 columns; put texts with commas in quotes"),
        ("text,whom\na,b\n", "t.csv: has no column 'who' (found: text, whom); did you mean whom?"),
    ],
)
def test_a_table_that_cannot_be_read(content: str, message: str) -> None:
    Path("t.csv").write_text(content)
    with pytest.raises(DataError) as error:
        look_at("t.csv", "who")
    assert str(error.value) == message


def test_soft_prompts_are_found_in_the_rows() -> None:
    rows = [{"text": "a", "who": "x"}, {"text": "a", "who": None}, {"text": "a"}, {"text": "a", "who": "y:2"}]
    assert look_at(rows_file("t.jsonl", rows), "who").named == {"x": 1, "": 2, "y:2": 4}
    with pytest.raises(DataError, match="row 1: the column 'who' contains 7, which is not the name of a soft prompt"):
        look_at(rows_file("u.jsonl", [{"text": "a", "who": 7}]), "who")


# -- what is asked


def test_fields_are_those_of_the_template() -> None:
    texts = RowTexts(Template(input="{a.b[0]} {n} {rest|none}", target=" {label}", labels=("x", "y")))
    row = {"a": {"b": ["deep"]}, "n": 3, "label": "x", "other": None}
    assert texts.asked(row) == {"a.b[0]": "deep", "n": "3", "rest": "none"}
    assert texts.truth(row) == ["x"] and texts.truth({**row, "label": None}) == texts.truth({"a": 1}) == []
    with pytest.raises(DataError, match="the field 'n' is null"):
        texts.asked({**row, "n": None})
    with pytest.raises(DataError, match=r"t.csv: the field 'n' is missing \(found: 'N', 'a'\); did you mean {N}"):
        texts.check_columns(["a", "N"], row, "t.csv")


def test_free_text_may_have_several_true_answers() -> None:
    texts = RowTexts(FREE)
    assert texts.truth({"text": "a", "answer": ["x", "y", None]}) == ["x", "y"]
    assert texts.truth({"text": "a", "answer": "x"}) == ["x"] and texts.truth({"text": "a"}) == []
    assert RowTexts(RAW).truth({"text": "a"}) == [], "its input is not its answer"


TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]


@pytest.mark.parametrize(
    ("row", "asked", "truth"),
    [
        ({"messages": TURNS}, TURNS, []),
        ({"messages": [*TURNS, {"role": "assistant", "content": " d "}]}, TURNS, ["d"]),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, TURNS[:1], ["b"]),
        ({"prompt": "a", "completion": "b"}, TURNS[:1], ["b"]),
        ({"prompt": "a"}, TURNS[:1], []),
        ({"prompt": TURNS, "completion": None, "messages": TURNS}, TURNS, []),
        ({"messages": json.dumps(TURNS)}, TURNS, []),
    ],
)
def test_conversations_wait_for_their_answer(row: dict[str, Any], asked: list[dict[str, str]], truth: list[str]) -> None:
    texts = RowTexts(CHAT)
    texts.check_columns(list(row), row, "t.jsonl")
    assert json.loads(texts.asked(row)["messages"]) == asked and texts.truth(row) == truth


def test_conversations_in_the_column_of_training() -> None:
    texts = RowTexts.of_card(CHAT, {"data": {"messages": {"column": "dialog"}}})
    assert texts.messages == MessagesConfig(column="dialog")
    assert json.loads(texts.asked({"dialog": TURNS})["messages"]) == TURNS
    with pytest.raises(DataError, match="trained on conversations, and there is no column 'dialog'"):
        texts.check_columns(["messages"], {"messages": TURNS}, "t.jsonl")
    with pytest.raises(DataError, match=r"no column messages, conversations, or prompt with one \(found: 'text'\)"):
        RowTexts(CHAT).check_columns(["text"], {"text": "a"}, "t.jsonl")


# -- parts


def test_answers_come_in_the_order_of_the_table(tmp_path: Path) -> None:
    parts = Parts(str(tmp_path / "out.csv"))
    parts.begin({"rows": 30})
    for first in (20, 0, 10):
        pq.write_table(answers(first, 10), f"{parts.path}/{first}.parquet")
    assert [each["row"] for each in parts.answers(30)] == list(range(30))
    assert parts.begun() == {"rows": 30} and parts.clean().tolist() == list(range(30))


def test_rows_that_were_written_twice_count_once(tmp_path: Path) -> None:
    """Two drivers at once, or a task that was repeated."""
    parts = Parts(str(tmp_path / "out.csv"))
    parts.begin({})
    for name, (first, many) in {"a": (0, 10), "b": (5, 10), "c": (0, 3)}.items():
        pq.write_table(answers(first, many), f"{parts.path}/{name}.parquet")
    assert [each["row"] for each in parts.answers(15)] == list(range(15))
    with pytest.raises(RunFailed, match="row 16 has no answer; continue with --resume"):
        list(parts.answers(16))


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_what_a_killed_process_leaves_of_a_file_does_not_count(tmp_path: Path, kept: int) -> None:
    parts = Parts(str(tmp_path / "out.csv"))
    parts.begin({})
    pq.write_table(answers(0, 10), f"{parts.path}/whole.parquet")
    pq.write_table(answers(10, 10), f"{parts.path}/torn.parquet")
    torn = Path(parts.path, "torn.parquet")
    torn.write_bytes(torn.read_bytes()[:kept])
    assert parts.clean().tolist() == list(range(10)) and not torn.exists()


# -- the output


@pytest.mark.parametrize("name", ["out.parquet", "out.csv", "out.jsonl"])
def test_an_output_has_all_columns_in_order(tmp_path: Path, name: str) -> None:
    rows = [{"text": f"a{row}", "more": {"x": [row]}} for row in range(2500)]
    table = look_at(rows_file("t.jsonl", rows))
    given = [{**each, "finish_reason": None, "error": None} for each in answers(0, 2500).to_pylist()]
    columns = answer_columns([("fruit", "tool")], False, each=True)
    output = tmp_path / "below" / name
    write_output(str(output), table, columns, (answer_values(each, {"toy:1": ("fruit", "tool")}) for each in given))
    added = ["prediction", "probability", "probability_fruit", "probability_tool", "version", "error"]
    assert [path.name for path in output.parent.iterdir()] == [name], "nothing else is left"
    if name == "out.csv":
        with output.open(newline="") as file:
            found = list(csv.reader(file))
        assert found[0] == ["text", "more", *added] and len(found) == 2501
        assert found[-1] == ["a2499", '{"x": [2499]}', "fruit", "0.75", "0.75", "0.25", "toy:1", ""]
        return
    lines = output.read_text().splitlines() if name == "out.jsonl" else []
    found = [json.loads(line) for line in lines] or pq.read_table(output).to_pylist()
    assert [{key: row[key] for key in ("text", "more")} for row in found] == rows
    assert list(found[0]) == ["text", "more", *added] and found[7]["probability_tool"] == 0.25 and found[7]["error"] is None


def test_an_output_is_whole_or_absent(tmp_path: Path) -> None:
    table = look_at(rows_file("t.jsonl", [{"text": "a"}] * 10))

    def broken() -> Iterator[dict[str, Any]]:
        yield {"prediction": "x"}
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_output(str(tmp_path / "out.csv"), table, {"prediction": pa.string()}, broken())
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("out.xlsx", "out.xlsx: is not the name of a table; end it with .parquet, .csv, .jsonl"),
        ("there.csv", "there.csv: exists already; choose another output"),
        ("/proc/1/x.csv", "/proc/1/x.csv: no permission to write /proc/1; choose another output"),
    ],
)
def test_an_output_that_cannot_be_written(output: str, message: str) -> None:
    Path("there.csv").write_text("")
    with pytest.raises(UserError) as error:
        check_output(output)
    assert str(error.value) == message


# -- metrics


def test_metrics_are_those_of_training() -> None:
    labels = Template(input="{text}", target="{l}", labels=("no", "yes"), label_values=(("0", "no"), ("1", "yes")))
    measured = Measured({"a:1": labels, "b:1": FREE})
    choice = {"version": "a:1", "prediction": "yes", "probabilities": [0.2, 0.8], "error": None}
    given = [
        *({**choice, "truth": [truth]} for truth in ("1", "1.0", "0", "?")),
        {**choice, "truth": None},
        {**choice, "prediction": None, "probabilities": None, "truth": ["1"], "error": "wrong"},
        {**choice, "version": "b:1", "prediction": "an apple", "probabilities": None, "truth": ["a pear", "an apple"]},
    ]
    assert list(measured.passing(given)) == given
    found = measured.metrics()
    assert found["a:1"]["accuracy"] == pytest.approx(2 / 3) and found["b:1"]["exact_match"] == 1.0
    assert measured.measured() == {"a:1": 3, "b:1": 1} and (measured.rows, measured.errors) == (7, 1)
    assert list(measured.notes()) == [
        "a:1: 1 rows have a true answer that is not one of its labels; they are not in its metrics"
    ]


# -- answers


def toy_prompt(base: Path, template: Template, seed: int) -> SoftPrompt:
    import torch

    vectors = torch.randn(4, 32, generator=torch.Generator().manual_seed(seed))
    card = Card(
        name="toy",
        base=str(base),
        length=4,
        width=32,
        template=template,
        max_new_tokens=5,
        content_hash=soft_prompt.content_hash(vectors),
    )
    return SoftPrompt(vectors, card)


def test_rows_of_a_table_are_answered_as_alone(tiny_base_folder: Path) -> None:
    prompts = {"kind": toy_prompt(tiny_base_folder, KIND, 0), "free": toy_prompt(tiny_base_folder, FREE, 1)}
    long = "many words " * 100
    rows = [(("kind", "free")[row % 2], {"text": f"one more apple {row}"}) for row in range(20)]
    with Predictor(prompts) as predictor:
        found = predictor.answer_rows([*rows, ("kind", {"text": long}), ("free", {"text": ""})])
        for (name, fields), answer in zip([*rows, ("kind", {"text": long})], found, strict=False):
            [alone] = predictor.predict([fields["text"]], name, truncate=True)
            assert (answer.prediction, answer.error) == (alone, None)
            if name == "kind":
                [shares] = predictor.probabilities([fields["text"]], name, truncate=True)
                assert answer.probabilities == pytest.approx(tuple(shares.values()), abs=1e-6) and answer.finish_reason is None
            else:
                assert answer.probabilities is None and answer.finish_reason in ("stop", "length")
        assert found[-1].prediction is None and found[-1].error == "the input has no text; fill the row or remove it"
        assert predictor.answer_rows([]) == []


def test_an_answer_that_is_not_a_number_is_an_error_of_its_rows(tiny_base_folder: Path) -> None:
    good, bad = toy_prompt(tiny_base_folder, KIND, 0), toy_prompt(tiny_base_folder, KIND, 1)
    texts = toy_prompt(tiny_base_folder, FREE, 2)
    with Predictor({"good": good, "bad": bad, "texts": texts}) as predictor:
        for name in ("bad", "texts"):
            predictor._engine._bank.vectors(predictor._residents[name].handle.ids)[:] = float("nan")
        found = predictor.answer_rows([(name, {"text": "a"}) for name in ("good", "bad", "texts", "good")])
    assert [each.error is None for each in found] == [True, False, False, True]
    assert "diverged" in str(found[1].error) and "diverged" in str(found[2].error)


# -- the command


@pytest.fixture
def folder(tmp_path: Path, tiny_base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Soft prompts in folders, and no cluster to find."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for name, template in (("kind", KIND), ("free", FREE)):
        toy_prompt(tiny_base_folder, template, 0).save(str(tmp_path / name))
    rows_file("rows.jsonl", [{"text": "a", "prediction": "x", "who": "nobody"}])
    rows_file("other.jsonl", [{"texts": "a"}])
    return SimpleNamespace(kind=str(tmp_path / "kind"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rows.jsonl", "-o", "out.txt"], "out.txt: is not the name of a table; end it with .parquet, .csv, .jsonl"),
        (["none.jsonl", "-o", "out.csv"], "none.jsonl: no such file in "),
        (["rows.jsonl", "-o", "out.csv"], "rows.jsonl: has a column 'prediction' already; give the added ones another name"),
        (["other.jsonl", "-o", "out.csv"], "other.jsonl: the field 'text' is missing (found: 'texts'); did you mean {texts}?"),
        (["rows.jsonl", "-o", "out.csv", "--model-column", "who"], "rows.jsonl, row 1: nobody: no soft prompt of this name in"),
        (["rows.jsonl", "-o", "out.csv", "--address", "127.0.0.1:1"], "--address: no response from 127.0.0.1:1"),
        (["rows.jsonl", "-o", "out.csv", "--base", "nowhere/at/all"], "nowhere/at/all"),
    ],
)
def test_wrong_input_is_one_sentence_and_starts_nothing(folder: SimpleNamespace, arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["predict", folder.kind, *arguments])
    assert done.exit_code == 2 and done.stderr.startswith("ptuning: ") and message in done.stderr, done.stderr
    assert done.stderr.strip().count("\n") == 0 and not list(Path().glob("out*"))


@pytest.mark.parametrize(
    ("rows", "output", "place"), [("s3://a:b@c/r.csv", "o.csv", "ROWS"), ("r.csv", "s3://a:b@c/o.csv", "--output")]
)
def test_a_cluster_is_not_given_passwords(rows: str, output: str, place: str) -> None:
    with pytest.raises(
        UserError, match=rf"{place}: s3://\*\*\*@c/..csv contains a password, which the cluster would expose; set AWS_"
    ):
        run_prediction(Wanted("kind", rows, output, address="127.0.0.1:6379"), lambda name: pytest.fail(name))


def test_what_was_begun_is_continued_and_not_overwritten(folder: SimpleNamespace) -> None:
    Parts("out.csv").begin({"key": "another", "versions": {}})
    rows_file("more.jsonl", [{"text": "a"}])
    with pytest.raises(UserError, match="out.csv: was begun and is not complete; continue with --resume"):
        ptuning.predict(folder.kind, "more.jsonl", "out.csv", progress=False)
    with pytest.raises(UserError, match="out.csv: was begun with other rows or soft prompts"):
        ptuning.predict(folder.kind, "more.jsonl", "out.csv", resume=True, progress=False)
    with (
        lease.held("busy.csv.parts", print),
        pytest.raises(UserError, match="busy.csv.parts: another driver is running it .*; wait for it, stop it"),
    ):
        ptuning.predict(folder.kind, "more.jsonl", "busy.csv", progress=False)
    Path("out.parquet.parts").mkdir()
    Path("out.parquet.parts", "mine.parquet").touch()
    with pytest.raises(UserError, match="out.parquet.parts: is not a folder of ptuning predict"):
        ptuning.predict(folder.kind, "more.jsonl", "out.parquet", progress=False)
