"""The files, columns and labels that people have: each reads as the same rows, or is refused in one sentence."""

from __future__ import annotations

import bz2
import csv
import functools
import gzip
import http.server
import io
import json
import lzma
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from ptuning.config import Experiment, parse_experiment, read_experiment
from ptuning.data import json_text
from ptuning.data.dataset import Split, leaked, load_split
from ptuning.data.division import training_texts
from ptuning.data.encoder import Encoder
from ptuning.data.findings import describe_split, of_template, warnings
from ptuning.data.resolve import resolved
from ptuning.data.row import look_up
from ptuning.data.sources import Texts
from ptuning.errors import DataError, UserError
from ptuning.inference.inputs import fields_of
from ptuning.inference.types import RequestError
from ptuning.settings.data import DataConfig, Template
from ptuning.settings.template import fill, foreign_spelling, in_braces, template_defaults, template_fields

pytestmark = [pytest.mark.fast, pytest.mark.usefixtures("data_folder")]

ROWS = [
    {"text": "the old man; has an apple", "label": "fruit"},
    {"text": 'here is a "hammer", big', "label": "tool"},
    {"text": "one more pear, today", "label": "fruit"},
]
KIND: dict[str, Any] = {"input": "Text: {text}\nKind:", "target": " {label}", "labels": ["fruit", "tool"]}


@pytest.fixture
def load(tiny_tokenizer: PreTrainedTokenizerFast) -> Callable[..., Split]:
    def load(source: Any, name: str = "train", **template: Any) -> Split:
        return load_split(name, source, Encoder(Template(**KIND | template), tiny_tokenizer, 100))

    return load


def experiment(**data: Any) -> Experiment:
    return parse_experiment({"name": "x", "data": {"train": "t.jsonl"} | KIND | data})


def jsonl(path: str, rows: Any) -> str:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def as_csv(rows: Any, separator: str = ",", head: str = "") -> bytes:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(rows[0]), delimiter=separator)
    writer.writeheader()
    writer.writerows(rows)
    return (head + out.getvalue()).encode()


def as_jsonl(rows: Any) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as out:
        out.write(content)
    return sink.getvalue().to_pybytes()


def arrow(rows: Any) -> bytes:
    sink, table = pa.BufferOutputStream(), pa.Table.from_pylist(rows)
    with pa.ipc.new_stream(sink, table.schema) as out:
        out.write_table(table)
    return sink.getvalue().to_pybytes()


def zipped(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return out.getvalue()


# Files

BY_COLUMNS = {name: {str(at * 2): row[name] for at, row in enumerate(ROWS)} for name in ROWS[0]}

FILES: dict[str, bytes] = {
    "t.ndjson": as_jsonl(ROWS),
    "array.json": json.dumps(ROWS).encode(),
    "array.jsonl": json.dumps(ROWS).encode(),
    "pretty.json": json.dumps(ROWS, indent=2).encode(),
    "bom.json": b"\xef\xbb\xbf" + json.dumps(ROWS, indent=2).encode(),
    "blank-lines.json": b"\n\n" + json.dumps(ROWS, indent=4).encode() + b"\n\n",
    "one-per-line.json": b"[\n" + b",\n".join(json.dumps(row).encode() for row in ROWS) + b"\n]\n",
    "objects.json": b"\n".join(json.dumps(row, indent=2).encode() for row in ROWS),
    "wrapped.json": json.dumps({"version": 1, "data": ROWS}).encode(),
    "wrapped-pretty.json": json.dumps({"version": [1, 2], "rows": ROWS, "license": "x"}, indent=1).encode(),
    "t.tsv": as_csv(ROWS, "\t"),
    "semicolons.csv": as_csv(ROWS, ";"),
    "tabs.csv": as_csv(ROWS, "\t"),
    "bars.csv": as_csv(ROWS, "|"),
    "commas.tsv": as_csv(ROWS, ","),
    "excel.csv": as_csv(ROWS, ";", "sep=;\r\n"),
    "t.jsonl.gz": gzip.compress(as_jsonl(ROWS[:1])) + gzip.compress(as_jsonl(ROWS[1:])),
    "t.csv.gz": gzip.compress(as_csv(ROWS)),
    "t.tsv.bz2": bz2.compress(as_csv(ROWS, "\t")),
    "t.json.zst": zstd(json.dumps(ROWS).encode()),
    "t.csv.xz": lzma.compress(as_csv(ROWS)),
    "t.jsonl.zip": zipped({"t.jsonl": as_jsonl(ROWS), "__MACOSX/t": b"?"}),
    "columns.json": json.dumps(BY_COLUMNS).encode(),  # pandas.DataFrame.to_json()
    "columns-pretty.json": json.dumps(BY_COLUMNS, indent=1).encode(),
    "lists.json": json.dumps({name: [row[name] for row in ROWS] for name in ROWS[0]}).encode(),
    "lists-pretty.json": json.dumps({name: [row[name] for row in ROWS] for name in ROWS[0]}, indent=1).encode(),
    "split.json": json.dumps({"columns": [*ROWS[0]], "index": [0, 1, 2], "data": [[*row.values()] for row in ROWS]}).encode(),
    "index.json": json.dumps({str(at): row for at, row in enumerate(ROWS)}).encode(),
    "t.jsonlines": as_jsonl(ROWS),
    "t.jl.gz": gzip.compress(as_jsonl(ROWS)),
    "t.tab": as_csv(ROWS, "\t"),
    "t.feather": arrow(ROWS),
    "T.CSV": as_csv(ROWS),
    "t.arrow": arrow(ROWS),
}


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_is_the_same_rows(load: Callable[..., Split], name: str) -> None:
    Path(name).write_bytes(FILES[name])
    split = load(name)
    assert split.rows["text"][:] == [f"Text: {row['text']}\nKind:" for row in ROWS]
    assert split.fingerprint == load(jsonl("plain.jsonl", ROWS)).fingerprint


@pytest.mark.parametrize(
    ("name", "said"),
    [("semicolons.csv", "semicolons"), ("tabs.csv", "tabs"), ("bars.csv", "bars"), ("commas.tsv", "commas"), ("t.tsv", ""),
     ("T.CSV", "")],
)  # fmt: skip
def test_a_separator_that_was_found_is_said(load: Callable[..., Split], name: str, said: str) -> None:
    Path(name).write_bytes(FILES[name])
    line = describe_split(load(name), 100)
    assert line.endswith(f", {name}: columns are separated by {said}" if said else " tokens")


def test_a_separator_is_not_guessed_from_other_columns(load: Callable[..., Split]) -> None:
    Path("t.csv").write_text("a;b\nx;y\n")
    with pytest.raises(DataError, match=r"t.csv, row 1 \(line 2\): the field '\w+' is missing \(found: 'a;b'\)"):
        load("t.csv")


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(
        st.fixed_dictionaries({"text": st.text(min_size=1, max_size=30), "n": st.floats(allow_nan=False)}), min_size=1
    ),
    indent=st.sampled_from([None, 0, 2]),
    block=st.sampled_from([1, 7, 1 << 16]),
    wrapped=st.booleans(),
)
def test_json_is_read_in_pieces_of_any_size(rows: Any, indent: int | None, block: int, wrapped: bool) -> None:
    from ptuning.data.json_rows import json_rows

    content = json.dumps({"data": rows} if wrapped else rows, indent=indent, ensure_ascii=False).encode(
        "utf-8", "surrogatepass"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_text, "_BLOCK", block)
        found = [row for _, row in json_rows(io.BytesIO(content), "t.json", ["text"])]
    assert found == rows


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b'[{"text": "a", "label": "tool"},\n[1]]', "line 2: is not a JSON object; write one object per line"),
        (b'[{"text": "a", "label": "tool"},\n {"text": b}]',
         "line 2: is not a JSON object (expecting value); write one object per line, or an array of objects"),
        (b'[{"text": "a", "label": "tool"}\n', "line 2: is not a JSON object (, expected); "
         "write one object per line, or an array of objects"),
        (b'[{"text": "a", "label": "tool"}]\nx', "line 2: is not a JSON object (text after the end of the array); "
         "write one object per line, or an array of objects"),
        (b'[\n{"text": "caf\xe9"}]', "line 2: is not UTF-8 at byte 14; save the file as UTF-8"),
        (b'[\n{"text": "caf\0"}]', "line 2: contains a NUL byte; save the file as UTF-8 text"),
        (b'[\n{"text": "a", "label": "tool"},\n{"label": "tool"}]',
         "row 2 (line 3): the field 'text' is missing (found: 'label'); correct the data or the template"),
        (b'{"a": [{"text": "x"}], "b": [{"text": "y"}]}',
         "contains several lists of rows ('a', 'b'); write each to a file of its own"),
        (b'{\n"a": [{"text": "x", "label": "tool"}],\n"b": [{"text": "y"}]}',
         "contains several lists of rows ('a', 'b'); write each to a file of its own"),
        (b'[{"text": "' + b"x" * 10_000_001 + b'"}]', "line 1: is longer than 10 MB; write one row per line"),
    ],
)  # fmt: skip
def test_sentences_about_json(load: Callable[..., Split], content: bytes, what: str) -> None:
    Path("t.json").write_bytes(content)
    with pytest.raises(DataError) as error:
        load("t.json")
    assert str(error.value) in (f"t.json, {what}", f"t.json: {what}")


def test_one_row_with_objects_is_not_a_table(load: Callable[..., Split]) -> None:
    split = load(jsonl("lists.jsonl", [{"a": ["one"], "b": ["fruit", "tool"]}]), input="{a[0]}", target="{b[0]}")
    assert split.rows["text"][:] == ["one"]
    for row in ({"a": {"x": "one", "y": "fruit"}}, {"a": {"0": "one", "y": "fruit"}}):
        jsonl("t.jsonl", [row])
        (first,) = {"x", "0"} & set(row["a"])
        split = load("t.jsonl", input=f"{{a[{first}]}}", target="{a.y}")
        assert split.rows["text"][:] == ["one"]


@pytest.mark.parametrize(
    ("suffix", "content", "kind"),
    [
        ("gz", b"no gzip", "gzip"),
        ("gz", gzip.compress(as_jsonl(ROWS * 99))[:-9], "gzip"),
        ("xz", b"no xz", "xz"),
        ("xz", lzma.compress(as_jsonl(ROWS * 99))[:-30], "xz"),
        ("zip", b"no zip", "zip"),
        ("zip", zipped({"a.jsonl": as_jsonl(ROWS), "b.jsonl": as_jsonl(ROWS)}), "zip"),
    ],
)
def test_broken_compression_is_one_sentence(load: Callable[..., Split], suffix: str, content: bytes, kind: str) -> None:
    Path(f"t.jsonl.{suffix}").write_bytes(content)
    with pytest.raises(DataError, match=rf"t.jsonl.{suffix}: is not a readable {kind} file \(.*\); compress it again"):
        load(f"t.jsonl.{suffix}")


def test_folders_patterns_and_lists(load: Callable[..., Split]) -> None:
    Path("parts/deep").mkdir(parents=True)
    Path("parts/b.csv").write_bytes(as_csv(ROWS[1:2]))
    jsonl("parts/a.jsonl", ROWS[:1])
    Path("parts/README.md").touch()
    Path("parts/dataset_info.json").write_text("{}")
    jsonl("parts/deep/c.jsonl", ROWS[2:])
    whole = load(jsonl("whole.jsonl", ROWS))
    assert load(["parts", "parts/deep"]).fingerprint == load("parts/**/*.*s*").fingerprint == whole.fingerprint
    assert load("parts").notes == ("2 files",)
    jsonl("parts/deep/d.jsonl", [{"text": "x", "label": "?"}])
    with pytest.raises(DataError, match="^parts/deep/d.jsonl, row 1: '\\?' is not one of the labels"):
        load(["parts", "parts/deep"])
    with pytest.raises(DataError, match="matches no file in .*; correct the pattern"):
        load("parts/*.parquet")
    jsonl("parts/train.jsonl", ROWS)
    jsonl("parts/test.jsonl", ROWS)
    with pytest.raises(DataError, match=r"parts: contains files of several splits \(test, train\); .*parts/\*train\*"):
        load("parts")


class _Handler(http.server.SimpleHTTPRequestHandler):
    seen: list[int] = []

    def log_request(self, code: Any = "-", size: Any = "-") -> None:
        self.seen.append(int(code))

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    _Handler.seen.clear()
    handler = functools.partial(_Handler, directory=str(tmp_path / "data"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_a_file_at_an_address_is_fetched_once(load: Callable[..., Split], url: str) -> None:
    Path("t.csv").write_bytes(as_csv(ROWS))
    assert load(f"{url}/t.csv?download=1").fingerprint == load("t.csv").fingerprint
    load(f"{url}/t.csv?download=1")
    assert _Handler.seen == [200, 304]
    with pytest.raises(DataError, match=r"/no.csv: the server answers 404 \(File not found\); check the address"):
        load(f"{url}/no.csv")
    with pytest.raises(DataError, match=r"^http://\*\*\*@127.0.0.1:9/t.csv: cannot be fetched"):
        load("http://me:hunter2@127.0.0.1:9/t.csv")


@pytest.fixture
def store(tmp_path: Path) -> str:
    """The address of a folder as a file system of Arrow, which S3 is, too (test_storage_s3)."""
    (tmp_path / "store" / "deep").mkdir(parents=True)
    (tmp_path / "store" / "a.csv").write_bytes(as_csv(ROWS[:1]))
    (tmp_path / "store" / "b.jsonl.gz").write_bytes(gzip.compress(as_jsonl(ROWS[1:])))
    (tmp_path / "store" / "_SUCCESS").touch()
    return f"file://{tmp_path}/store"


def test_files_of_an_object_store(load: Callable[..., Split], store: str, row_cache: Path) -> None:
    whole = load(jsonl("whole.jsonl", ROWS)).fingerprint
    assert load(store).fingerprint == load(f"{store}/*.*").fingerprint == whole
    assert load([f"{store}/a.csv", f"{store}/b.jsonl.gz"]).fingerprint == whole
    copies = [path for path in (row_cache / "downloads").rglob("content")]
    assert len(copies) == 2, "a file is copied once"
    with pytest.raises(DataError, match=r"no.csv: no such file; correct the address"):
        load(f"{store}/no.csv")
    with pytest.raises(UserError, match=r"broken://x/t.csv: cannot be opened"):
        load("broken://x/t.csv")


# Columns

NAMES = ["Tweet text", "review-text", "review.text", "0", "a[0]", "größe", " padded", "a|b", "{x}", "references", "a\\b", "'q'"]


@pytest.mark.parametrize("name", NAMES)
def test_any_column_can_be_named(load: Callable[..., Split], name: str) -> None:
    rows = [{name: row["text"], "label": row["label"]} for row in ROWS]
    template = f"Text: {in_braces(name)}\nKind:"
    Path("t.csv").write_bytes(as_csv(rows))
    pq.write_table(pa.Table.from_pylist(rows), "t.parquet")
    for source in (jsonl("t.jsonl", rows), "t.csv", "t.parquet"):
        assert load(source, input=template).rows["text"][:] == [f"Text: {row['text']}\nKind:" for row in ROWS]
    assert load("t.jsonl", input=template, labels=None).rows["references"][:] == [["fruit"], ["tool"], ["fruit"]]


@given(name=st.text(min_size=1).filter(str.strip), default=st.none() | st.text(), before=st.text(), behind=st.text())
@example(name="a}", default="}", before="{", behind="}")
def test_every_name_survives_the_braces(name: str, default: str | None, before: str, behind: str) -> None:
    def literal(text: str) -> str:
        return text.replace("{", "{{").replace("}", "}}")

    bar = "" if default is None else "|" + in_braces(default)[1:-1]
    template = f"{literal(before)}{in_braces(name)[:-1]}{bar}}}{literal(behind)}"
    assert template_fields(template) == [name]
    assert template_defaults(template) == ({} if default is None else {name: default})
    assert fill(template, {name: "x"}) == f"{before}x{behind}"


@pytest.mark.parametrize(
    ("row", "name", "value"),
    [
        ({"answers": {"text": ["a", "b"]}}, "answers.text[0]", "a"),
        ({"answers": {"text": ["a", "b"]}}, "answers[text][-1]", "b"),
        ({"answers": {"text": ["a", "b"]}}, "answers['text'][1]", "b"),
        ({"answers": {"text": ["a", "b"]}}, "answers.text.1", "b"),
        ({"turns": [{"value": "hi"}]}, "turns.0.value", "hi"),
        ({"a.b": "exact", "a": {"b": "nested"}}, "a.b", "exact"),
        ({"a.b": {"c": "x"}, "a": {"b": {"c": "y"}}}, "a.b.c", "x"),
        ({"a": {"b.c": "x"}}, "a.b.c", "x"),
        ({"a.b": 1, "a": {"b": {"c": "y"}}}, "a.b.c", "y"),
        ({"turns": [{"value": "hi"}]}, "turns[0].value", "hi"),
        ({"a[0]": "exact", "a": ["nested"]}, "a[0]", "exact"),
    ],
)
def test_values_inside_columns(row: Any, name: str, value: Any) -> None:
    assert look_up(row, name) == value
    pa_row = pa.Table.from_pylist([row]).to_pylist()[0]
    assert look_up(pa_row, name) == value


@pytest.mark.parametrize("name", ["a.c", "a.b[2]", "a.b.2", "a.b.-1", "a.b.c", "b", "a[0]", "a.b[x]", "a.", "a.b["])
def test_what_is_not_there_is_missing(name: str) -> None:
    with pytest.raises(KeyError):
        look_up({"a": {"b": ["x"]}}, name)


SQUAD = [
    {"q": "who?", "answers": {"text": ["me", "I"], "start": [1, 2]}},
    {"q": "?", "answers": {"text": ["you"], "start": [3]}},
]


def test_nested_values_in_every_format(load: Callable[..., Split]) -> None:
    template: dict[str, Any] = {"input": "{q}", "target": " {answers.text[0]}", "labels": None}
    pq.write_table(pa.Table.from_pylist(SQUAD), "t.parquet")
    for source in (jsonl("t.jsonl", SQUAD), "t.parquet"):
        assert load(source, **template).rows["target_text"][:] == [" me", " you"]
    with pytest.raises(DataError, match=r"the field 'answers' is a dict, not a text; write it as text$"):
        load("t.jsonl", **template | {"input": "{answers}"})


def test_a_list_of_answers_is_one_target_and_all_references(load: Callable[..., Split]) -> None:
    split = load(jsonl("t.jsonl", SQUAD), input="{q}", target=" {answers.text}", labels=None)
    assert split.rows["target_text"][:] == [" me", " you"]
    assert split.rows["references"][:] == [["me", "I"], ["you"]]


def test_optional_fields_have_a_default(load: Callable[..., Split]) -> None:
    rows = [
        {"text": "a", "label": "tool"},
        {"text": "b", "label": "tool", "more": None},
        {"text": "c", "label": "fruit", "more": "x"},
    ]
    template = "{text} {more|(none)}:"
    jsonl("t.jsonl", rows)
    Path("t.csv").write_text("text,label,more\na,tool,\nb,tool,\nc,fruit,x\n")
    pq.write_table(
        pa.table({"text": ["a", "b", "c"], "label": ["tool", "tool", "fruit"], "more": [None, None, "x"]}), "t.parquet"
    )
    for source in ("t.jsonl", "t.csv", "t.parquet"):
        assert load(source, input=template).rows["text"][:] == ["a (none):", "b (none):", "c x:"]
    pq.write_table(pa.table({"text": ["a"], "label": ["tool"]}), "less.parquet")
    assert load("less.parquet", input=template).rows["text"][:] == ["a (none):"]


def test_requests_may_leave_out_what_is_optional(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = Encoder(Template(input="{instruction} {more|-}:{a.b|}", target="{x}"), tiny_tokenizer, 100)
    for sent, text in (
        ("do it", "do it -:"),
        ({"instruction": "do it"}, "do it -:"),
        ('{"instruction": "do it", "more": "now"}', "do it now:"),
        ({"instruction": "do it", "a": {"b": "!"}}, "do it -:!"),
        ({"instruction": "do it", "a.b": "!"}, "do it -:!"),
    ):
        assert encoder.input_text(fields_of(encoder, sent)) == text
    with pytest.raises(RequestError, match=r"has the fields instruction, more \(optional\), a.b \(optional\); send a JSON"):
        fields_of(encoder, {"more": "x"})


# Templates without a field

FOREIGN = ["{{ text }}", "{{text}}", "$text", "<text>", "[text]", "%(text)s", "{{ text | trim }}", "<|text|>"]


@pytest.mark.parametrize("written", FOREIGN)
@pytest.mark.parametrize("key", ["input", "target"])
def test_a_template_of_another_tool_is_refused(written: str, key: str) -> None:
    with pytest.raises(UserError) as error:
        experiment(**{key: f"Say {written}:", "labels": None})
    assert str(error.value) == (
        f"experiment: data.{key}: contains no field of the row; {written} is plain text here, write {{text}}"
    )
    assert foreign_spelling(f"a {written}") == (written, "{text}")


@pytest.mark.parametrize("written", ["${text}", "${a}: ${text}"])
def test_a_template_of_the_shell_is_refused(written: str) -> None:
    field = in_braces(template_fields(written)[0])
    with pytest.raises(UserError) as error:
        experiment(input=written)
    assert str(error.value) == (
        f"experiment: data.input: ${field} puts a dollar sign in front of the field; write {field}, "
        f"or $ {field} for the dollar sign"
    )
    assert experiment(input="{text} costs ${price}").data.input


def test_a_column_that_is_spelled_as_elsewhere_is_said() -> None:
    row = {"text": "x", "subject": "y", "label": "fruit"}
    for written in ("{{ subject }}", "$subject", "<subject>", "[subject]", "%(subject)s"):
        (line,) = of_template(Template(**KIND | {"input": f"{written}: {{text}}"}), lambda: row)
        assert line == (
            f"{written} in the template is plain text, but the rows have a column 'subject'; write {{subject}} for its value"
        )
    for written in ("{{ row.subject }}", '{{ item["subject"] }}'):
        (line,) = of_template(Template(**KIND | {"input": f"{written}: {{text}}"}), lambda: row)
        assert line.startswith(written) and line.endswith("write {subject} for its value")
    for fine in ("<subject>{subject}</subject> {text}", "{{ object }} <b>{text}</b>", "<text> {text}"):
        assert not list(of_template(Template(**KIND | {"input": fine}), lambda: row))


def test_a_template_without_anything_is_refused() -> None:
    for text in ("Say it:", "{{}}", "100%", "$5"):
        with pytest.raises(UserError, match=r"data.input: contains no field of the row; write, for example, "):
            experiment(input=text)


# Labels


@pytest.mark.parametrize(
    ("labels", "values", "found"),
    [
        ([0, 1], [0, 1, "0", 1.0, "1.0"], [0, 1, 0, 1, 1]),
        ([False, True], [False, True, "True", "false", "TRUE"], [0, 1, 1, 0, 1]),
        (["false", "true"], [False, True], [0, 1]),
        ({"0": "ham", "1": "spam"}, [0, 1, "0.0", "1"], [0, 1, 0, 1]),
        ({"True": "yes", "False": "no"}, [True, False, "true"], [0, 1, 0]),
        ({"1": "low", "2": "low", "3": "high"}, [1, 2, 3], [0, 0, 1]),
        ([1.5, 2], ["1.50", 1.5, "2", 2.0], [0, 0, 1, 1]),
        (["007", "7"], ["007", 7, "7.0"], [0, 1, 1]),
    ],
)
def test_labels_match_in_every_spelling(load: Callable[..., Split], labels: Any, values: list[Any], found: list[int]) -> None:
    config = experiment(labels=labels).data
    rows = [{"text": str(at), "label": value} for at, value in enumerate(values)]
    split = load(jsonl("t.jsonl", rows), labels=labels)
    assert split.rows["label"][:] == found
    assert split.rows["target_text"][:] == [f" {config.labels[at]}" for at in found if config.labels]
    assert parse_experiment(json.loads(experiment(labels=labels).model_dump_json())).data == config


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["True", "true"], "'True' and 'true' are the same value to JSON, TOML or pandas; keep one of them"),
        ([1, "1.0"], "'1' and '1.0' are the same value to JSON, TOML or pandas; keep one of them"),
        ({"1": "a", "1.0": "b"}, "'1' and '1.0' are the same value to JSON, TOML or pandas; keep one of them"),
        ([1, "1"], "'1' is listed twice; list each label once"),
        ({"0": "a"}, "has fewer than two labels; list at least two"),
        ("ham,spam", 'is not a list (got \'ham,spam\'); write a list: ["ham", "spam"]'),
        ([["a"], "b"], "input should be a valid string (got ['a']); change the value"),
    ],
)
def test_sentences_about_labels(labels: Any, message: str) -> None:
    with pytest.raises(UserError) as error:
        experiment(labels=labels)
    assert str(error.value) == f"experiment: data.labels: {message}"


def test_values_beside_the_table_are_refused(load: Callable[..., Split]) -> None:
    with pytest.raises(DataError) as error:
        load(jsonl("t.jsonl", [{"text": "a", "label": "ham"}]), labels={"0": "ham", "1": "spam"})
    assert str(error.value) == (
        "t.jsonl, row 1: 'ham' is not one of the labels '0', '1'; correct the row or the table data.labels"
    )


def test_class_labels_by_name_and_by_index(load: Callable[..., Split]) -> None:
    datasets.Dataset.from_list(ROWS).class_encode_column("label").to_parquet("t.parquet")
    assert load("t.parquet").rows["label"][:] == [0, 1, 0]
    assert load("t.parquet", labels=[0, 1]).rows["target_text"][:] == [" 0", " 1", " 0"]
    assert load("t.parquet", labels={"0": "apple", "1": "saw"}).rows["target_text"][:] == [" apple", " saw", " apple"]


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        (["b", "a", "b"], ("a", "b")),
        ([10, 9, 9.0, "10"], ("9", "10")),
        ([True, False, "true"], ("False", "true")),
        ([{"x": 1}, 2], None),
    ],
)
def test_labels_are_found_in_the_training_rows(values: list[Any], labels: tuple[str, ...] | None) -> None:
    jsonl("t.jsonl", [{"text": str(at), "label": value} for at, value in enumerate(values)])
    if labels is None:
        with pytest.raises(DataError, match="is a dict, not a text"):
            resolved(experiment(labels="auto"))
        return
    found, lines = resolved(experiment(labels="auto"))
    assert found.data.labels == labels
    assert lines == [f"data.labels: {len(labels)} found: {', '.join(labels)}"]
    assert resolved(found) == (found, [])


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([f"answer {n}" for n in range(40)],
         "finds 40 different values in the 40 rows of t.jsonl, which looks like free text; list the labels, or "
         "leave data.labels out"),
        ([f"answer {n % 301}" for n in range(1000)],
         "finds 301 different values in the 1000 rows of t.jsonl, which looks like free text; list the labels, or "
         "leave data.labels out"),
        (["a"] * 9, "finds only 'a' in the 9 rows of t.jsonl; add rows of other labels, or list them"),
    ],
)  # fmt: skip
def test_what_are_no_labels_is_refused(values: list[str], said: str) -> None:
    jsonl("t.jsonl", [{"text": str(at), "label": value} for at, value in enumerate(values)])
    with pytest.raises(DataError) as error:
        resolved(experiment(labels="auto"))
    assert str(error.value) == f'data.labels: "auto" {said}'


def test_an_experiment_whose_labels_are_to_be_found_is_a_classification() -> None:
    plain = parse_experiment(
        {"name": "x", "data": {"train": "t.jsonl"} | KIND | {"labels": "auto"}, "prompt": {"init": "labels"}}
    )
    assert (plain.metric, plain.objective) == ("accuracy", "choice")


# Fractions and epochs


def parts_of(config: DataConfig) -> dict[str, Texts]:
    return training_texts(config, config, None)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(st.tuples(st.integers(0, 30), st.sampled_from(["fruit", "tool"])), min_size=25, max_size=80),
    validation=st.sampled_from([0.1, 0.25, 0.5]),
    test=st.sampled_from([None, 0.2]),
    seed=st.integers(0, 3),
)
def test_no_input_is_on_both_sides(
    tiny_tokenizer: PreTrainedTokenizerFast, texts: Any, validation: float, test: float | None, seed: int
) -> None:
    rows = [{"text": f"text {number}", "label": label} for number, label in texts]
    config = experiment(train=jsonl("t.jsonl", rows), validation=validation, test=test, split_seed=seed).data
    try:
        parts = parts_of(config)
    except DataError as error:
        assert "leaves it empty; raise it" in str(error)
        return
    encoder = Encoder(config, tiny_tokenizer, 100)
    splits = {name: load_split(name, config.train, encoder, texts=part) for name, part in parts.items()}
    assert sum(map(len, splits.values())) == len(rows)
    assert not any(leaked(splits[one], splits[two]) for one in splits for two in splits if one != two)
    assert [parts[name].fingerprint for name in parts] == [each.fingerprint for each in parts_of(config).values()]


def test_a_fraction_is_the_same_for_every_label_and_seed_decides() -> None:
    rows = [{"text": f"text {n}", "label": "tool" if n % 4 else "fruit"} for n in range(400)]
    config = experiment(train=jsonl("t.jsonl", rows), validation=0.1, test=0.2).data
    parts = parts_of(config)
    counts = {name: [part.rows["label"][:].count(label) for label in ("fruit", "tool")] for name, part in parts.items()}
    assert counts == {"train": [70, 210], "validation": [10, 30], "test": [20, 60]}
    other = parts_of(experiment(validation=0.1, test=0.2, split_seed=1).data)
    assert other["validation"].fingerprint != parts["validation"].fingerprint
    alone = jsonl("v.jsonl", [{name: row[name] for name in ("label", "text")} for row in parts["validation"].rows])
    again = parts_of(experiment(train=alone).data)["train"]
    assert again.fingerprint == parts["validation"].fingerprint, "a part is not what its rows are as a file"


def test_errors_in_a_part_name_the_row_of_the_file(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"text": f"text {n}", "label": "tool" if n % 2 else "fruit"} for n in range(40)] + [{"text": "x", "label": "?"}]
    config = experiment(train=jsonl("t.jsonl", rows), validation=0.25).data
    encoder = Encoder(config, tiny_tokenizer, 100)
    with pytest.raises(DataError, match=r"^t.jsonl, row 41: '\?' is not one of the labels"):
        for name, part in parts_of(config).items():
            load_split(name, config.train, encoder, texts=part)


def test_trials_do_not_train_on_the_test_rows() -> None:
    from ptuning.searching.space import trial_tables

    whole = experiment(
        train=jsonl("t.jsonl", [{"text": f"t{n}", "label": "tool"} for n in range(50)]), validation=0.1, test=0.2
    )
    trial = parse_experiment(trial_tables(whole.model_dump(mode="json"), "t000", {}))
    assert trial.data.test is None and trial.data.held_out == 0.2
    assert parts_of(trial.data)["train"].fingerprint == parts_of(whole.data)["train"].fingerprint


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"validation": 1.5},
         "validation: 1.5 is not a fraction of the training rows; write a number between 0 and 1, such as 0.1, or a file"),
        ({"validation": 0},
         "validation: 0 is not a fraction of the training rows; write a number between 0 and 1, such as 0.1, or a file"),
        ({"validation": "0.1"}, "validation: '0.1' is a text; write the fraction as a number, 0.1, without quotes"),
        ({"test": "10 %"}, "test: '10 %' is a text; write the fraction as a number, 0.1, without quotes"),
        ({"validation": True}, "validation: is not a file (got True); give a path, or a list of paths, in quotes"),
        ({"validation": 0.5, "test": 0.5}, "test: 0.5 and data.validation = 0.5 leave no training rows; lower one"),
        ({"train": 0.5}, "train: is not a file (got 0.5); give a path, or a list of paths, in quotes"),
        ({"train": []}, "train: is an empty list; name at least one file"),
        ({"train": ["a.csv", " "]}, "train: is empty (an unset shell variable?); give it a value, or leave it out"),
        ({"references": "r"}, "references: is only used without labels; leave it out"),
    ],
)  # fmt: skip
def test_sentences_about_splits(data: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        experiment(**data)
    assert str(error.value) == f"experiment: data.{message}"


def test_epochs_become_steps() -> None:
    jsonl("t.jsonl", [{"text": f"t{n}", "label": "tool"} for n in range(50)])
    tables = experiment().model_dump(mode="json")
    tables["train"] = {"epochs": 2.5, "batch_size": 8}
    plain = parse_experiment(tables)
    assert plain.train.steps == 0 and parse_experiment(plain.model_dump()) == plain
    found, lines = resolved(plain)
    assert (found.train.steps, found.train.epochs) == (16, None)
    assert lines == ["train.epochs: 2.5 of 50 rows are 16 steps"]
    tables["data"]["validation"] = 0.2
    assert resolved(parse_experiment(tables))[0].train.steps == 13
    tables["train"]["steps"] = 300
    with pytest.raises(UserError, match="train.epochs: train.steps is set, too; set only one of them"):
        parse_experiment(tables)


# Rows that are probably a mistake


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([("a", "tool"), ("a", "fruit"), ("b", "tool")],
         ["2 of 3 rows of train have the same input as a row with another label"]),
        ([("a", "tool"), ("a", "tool"), ("b", "fruit")], ["1 of 3 rows of train are repetitions of another row"]),
        ([("a", "tool"), ("a", "fruit")],
         ["all 2 inputs of train are equal: 'Text: a\\nKind:'; check the template and the column that it names"]),
        ([("", "tool"), (" ", "fruit"), ("b", "fruit")], ["2 of 3 rows of train have an input without text"]),
        ([("a", "tool"), ("b", "tool")], ["all 2 training rows have the label 'tool'; nothing else can be learned"]),
        ([("a", "tool"), ("b", "fruit")], []),
    ],
)  # fmt: skip
def test_warnings(load: Callable[..., Split], rows: list[tuple[str, str]], said: list[str]) -> None:
    split = load(jsonl("t.jsonl", [{"text": text, "label": label} for text, label in rows]))
    assert list(warnings(split, [], ("fruit", "tool"))) == said


def test_labels_without_rows_are_counted(load: Callable[..., Split]) -> None:
    labels = ["fruit", "tool", *(f"other {n}" for n in range(7))]
    split = load(jsonl("t.jsonl", ROWS), labels=labels)
    assert list(warnings(split, [], labels)) == [
        "7 of 9 labels have no training rows: 'other 0', 'other 1', 'other 2', 'other 3', 'other 4', ..."
    ]


@pytest.mark.parametrize("value", ["", "  ", None])
def test_an_empty_target_is_refused_in_every_format(load: Callable[..., Split], value: str | None) -> None:
    rows = [{"text": "a", "label": "x"}, {"text": "b", "label": value}]
    sources = [jsonl("t.jsonl", rows)]
    if value is not None:
        Path("t.csv").write_bytes(as_csv(rows))
        sources.append("t.csv")
    for source in sources:
        with pytest.raises(DataError, match=r"row 2.*: the field 'label' is (empty|null); fill it or remove the row"):
            load(source, labels=None)
    assert load("t.jsonl", labels=None, target="{label|nothing}").rows["target_text"][:][0] == "x"


def test_a_plan_reports_the_rows(tmp_path: Path) -> None:
    from ptuning.planning.planner import make_plan

    jsonl("t.jsonl", [{"text": f"text {n % 30}", "label": n % 2} for n in range(40)])
    plan = make_plan(experiment(labels="auto", validation=0.25), gpus=0)
    assert plan.rows[0] == "data.labels: 2 found: 0, 1"
    assert plan.rows[1].startswith("train: ") and plan.rows[2].startswith("validation: ")
    assert any(line.startswith("warning: ") and "repetitions of another row" in line for line in plan.rows)
    assert all(line in str(plan) for line in plan.rows)


# Where files are


def test_data_beside_the_experiment(tmp_path: Path) -> None:
    there = tmp_path / "there"
    (there / "rows").mkdir(parents=True)
    for name in ("t.jsonl", "rows/a.csv"):
        (there / name).touch()
    file = there / "e.toml"
    file.write_text('name = "x"\n[data]\ntrain = ["t.jsonl", "rows/*.csv"]\nvalidation = "t.jsonl"\ntest = "no.jsonl"\n'
                    'input = "{text}"\ntarget = "{label}"\n')  # fmt: skip
    data = read_experiment(file).data
    assert data.train == (f"{there}/t.jsonl", f"{there}/rows/*.csv")
    assert (data.validation, data.test) == (f"{there}/t.jsonl", "no.jsonl")
    Path("t.jsonl").touch()
    assert read_experiment(file).data.validation == "t.jsonl", "the working folder comes first"
