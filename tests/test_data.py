"""Sources, tokens and splits: every error by its exact sentence, every promise of the cache and the cut as a law."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from subprocess import PIPE
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ptuning.data import files
from ptuning.data.dataset import Split, leaked, load_split
from ptuning.data.encoder import Encoder
from ptuning.errors import DataError, UserError
from ptuning.model.fingerprint import tokenizer_fingerprint
from ptuning.settings.data import Template

pytestmark = [pytest.mark.fast, pytest.mark.usefixtures("data_folder")]

ROWS = [
    {"text": "the old man has an apple", "label": "fruit"},
    {"text": "here is a hammer", "label": "tool"},
    {"text": "one more pear, today", "label": "fruit"},
]
KIND = Template(input="Text: {text}\nKind:", target=" {label}", labels=("fruit", "tool"))
FREE = Template(input="Text: {text}\nKind:", target=" {label}")


@pytest.fixture
def load(tiny_tokenizer: PreTrainedTokenizerFast) -> Callable[..., Split]:
    def load(source: Any, template: Template = KIND, name: str = "train", limit: int = 100, **options: Any) -> Split:
        return load_split(name, source, Encoder(template, tiny_tokenizer, limit), **options)

    return load


class CountingTokenizer(PreTrainedTokenizerFast):
    """Counts the texts it has tokenised."""

    texts = 0

    def __call__(self, text: Any, **options: Any) -> Any:
        self.texts += 1 if isinstance(text, str) else len(text)
        return super().__call__(text, **options)


def words(specials: str = "<s> $A", **options: Any) -> CountingTokenizer:
    """One token per word or blank, and "ab" is one token where "a" and "b" stand together: BPE with a merge."""
    vocabulary = {"<s>": 0, "</s>": 1, "<unk>": 2, "a": 3, "b": 4, "ab": 5, " ": 6, "c": 7}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("a", "b")], unk_token="<unk>"))
    tokenizer.post_processor = processors.TemplateProcessing(single=specials, special_tokens=[("<s>", 0), ("</s>", 1)])
    options = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | options
    return CountingTokenizer(tokenizer_object=tokenizer, **options)


def jsonl(path: str, rows: Sequence[object]) -> str:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def sentence(load: Callable[..., Split], source: str, *arguments: Any, **options: Any) -> str:
    with pytest.raises(UserError) as error:
        load(source, *arguments, **options)
    assert isinstance(error.value, DataError) and "\n" not in str(error.value)
    return str(error.value)


# What a split holds


def test_a_split_is_what_the_template_says(load: Callable[..., Split], tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    split = load(jsonl("train.jsonl", ROWS))
    assert (len(split), split.cut, split.dropped, split.name, split.source) == (3, 0, 0, "train", "train.jsonl")
    assert split.rows["text"][:] == [f"Text: {row['text']}\nKind:" for row in ROWS]
    assert split.rows["label"][:] == [0, 1, 0]
    assert split.rows["target_text"][:] == [" fruit", " tool", " fruit"]
    assert split.rows["references"][:] == [["fruit"], ["tool"], ["fruit"]]
    for index, row in enumerate(ROWS):
        source, target = split.row(index)
        assert source == tiny_tokenizer(f"Text: {row['text']}\nKind:").input_ids
        assert target == [*tiny_tokenizer(f" {row['label']}", add_special_tokens=False).input_ids, 2]
        assert split.lengths[index] == len(source) + len(target)


def test_rows_are_mapped_and_not_in_memory(load: Callable[..., Split], row_cache: Path) -> None:
    split = load(jsonl("train.jsonl", ROWS))
    assert [Path(file["filename"]).parent for file in split.rows.cache_files] == [row_cache]


def test_the_encoder_of_a_row_is_the_encoder_of_the_split(
    load: Callable[..., Split], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    split = load(jsonl("train.jsonl", ROWS))
    encoder = Encoder(KIND, tiny_tokenizer, 100)
    for index, row in enumerate(ROWS):
        assert split.row(index) == (encoder.fitted_ids(row), encoder.target_ids(row))
        assert encoder.label_ids[split.rows[index]["label"]] == encoder.target_ids(row)


def test_law_6_nothing_merges_across_the_seam() -> None:
    tokenizer = words()
    encoder = Encoder(Template(input="{x}", target="{y}"), tokenizer, 10)
    row = {"x": "ca", "y": "b"}
    assert tokenizer("cab").input_ids == [0, 7, 5]
    assert encoder.input_ids(row) + encoder.target_ids(row) == [0, 7, 3, 4, 1]


@pytest.mark.parametrize(
    ("specials", "ids"),
    [("<s> $A", [0, 3]), ("<s> $A </s>", [0, 3]), ("$A </s>", [3]), ("$A", [3]), ("</s> $A", [1, 3])],
)
def test_special_tokens_stay_in_front_and_go_behind(specials: str, ids: list[int]) -> None:
    encoder = Encoder(Template(input="{x}", target="{y}"), words(specials), 10)
    assert encoder.input_ids({"x": "a"}) == ids
    assert encoder.target_ids({"y": "a"}) == [3, 1]


def test_numbers_and_truth_values_are_texts(load: Callable[..., Split]) -> None:
    template = Template(input="{n} {x} {yes}", target="{label}", labels=("0", "1"))
    split = load(jsonl("t.jsonl", [{"n": 7, "x": 0.5, "yes": True, "label": 1}]), template)
    assert split.rows["text"][:] == ["7 0.5 True"]
    assert split.rows["label"][:] == [1]


def test_texts_stay_as_they_are_written(load: Callable[..., Split]) -> None:
    texts = ["2020-01-01", "NA", "007", "null", "1e5", "{text}", "  x\n\ny "]
    rows = [{"text": text, "label": "fruit"} for text in texts]
    with open("t.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["text", "label"], *(row.values() for row in rows)])
    plain = Template(input="{text}", target="{label}")
    assert load("t.csv", plain).rows["text"][:] == load(jsonl("t.jsonl", rows), plain).rows["text"][:] == texts


def test_columns_that_the_template_does_not_name_do_not_matter(load: Callable[..., Split]) -> None:
    rows = [{**row, "slots": slots} for row, slots in zip(ROWS, (1, "O O", ["x", None]), strict=True)]
    assert load(jsonl("a.jsonl", rows)).fingerprint == load(jsonl("b.jsonl", ROWS)).fingerprint


def test_references_are_read_for_free_text_only(load: Callable[..., Split]) -> None:
    load = partial(load, references="references")
    rows = [ROWS[0] | {"references": ["an apple", "fruit"]}, ROWS[1], ROWS[2] | {"references": None}]
    path = jsonl("test.jsonl", rows)
    assert load(path, FREE).rows["references"][:] == [["an apple", "fruit"], ["tool"], ["fruit"]]
    assert load(path, KIND).rows["references"][:] == [["fruit"], ["tool"], ["fruit"]]
    assert load(path, FREE).rows["label"][:] == [-1, -1, -1]
    changed = jsonl("other.jsonl", [ROWS[0] | {"references": ["fruit"]}, *rows[1:]])
    assert load(changed, FREE).fingerprint != load(path, FREE).fingerprint


def test_leaked_counts_train_rows_that_stand_elsewhere(load: Callable[..., Split]) -> None:
    train = load(jsonl("train.jsonl", [*ROWS, ROWS[0] | {"label": "tool"}]))
    test = load(jsonl("test.jsonl", [ROWS[0], {"text": "a saw", "label": "tool"}]), name="test")
    assert leaked(train, test) == 2
    assert leaked(test, train) == 1


def test_77_labels_of_banking77(load: Callable[..., Split], assets: Path) -> None:
    folder = assets / "datasets" / "banking77"
    lines = (folder / "test.jsonl").read_text(encoding="utf-8").splitlines()
    labels = sorted({json.loads(line)["label"] for line in lines})
    assert len(labels) == 77
    template = Template(input="Question: {text}\nIntent:", target=" {label}", labels=tuple(labels))
    tokenizer = AutoTokenizer.from_pretrained(assets / "models" / "stories260K")
    encoder = Encoder(template, tokenizer, 492)
    assert len({tuple(ids) for ids in encoder.label_ids}) == 77
    start = time.monotonic()
    split = load_split("test", str(folder / "test.jsonl"), encoder)
    assert time.monotonic() - start < 20
    assert np.bincount(split.rows["label"][:]).tolist() == [40] * 77
    start = time.monotonic()
    load_split("test", str(folder / "test.jsonl"), encoder)
    assert time.monotonic() - start < 2


def test_both_tokenizers_of_the_assets_encode_every_label(assets: Path) -> None:
    for folder in sorted((assets / "models").iterdir()):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        encoder = Encoder(KIND, tokenizer, 100)
        assert encoder.label_ids == [
            [*tokenizer(f" {label}", add_special_tokens=False).input_ids, tokenizer.eos_token_id] for label in ("fruit", "tool")
        ]
        assert encoder.input_ids(ROWS[0])[0] == tokenizer.bos_token_id


# Fingerprints and the cache


def test_fingerprints_do_not_depend_on_the_file_format(load: Callable[..., Split]) -> None:
    jsonl("t.jsonl", ROWS)
    Path("bom.jsonl").write_bytes(b"\xef\xbb\xbf" + Path("t.jsonl").read_bytes().replace(b"\n", b"\r\n\n"))
    with open("t.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["label", "more", "text"])
        writer.writeheader()
        writer.writerows([row | {"more": 1} for row in ROWS])
    Path("bom.csv").write_bytes(b"\xef\xbb\xbf" + Path("t.csv").read_bytes())
    pq.write_table(pa.Table.from_pylist(ROWS), "t.parquet")
    classes = datasets.Dataset.from_list(ROWS).class_encode_column("label")
    classes.to_parquet("classes.parquet")
    splits = [load(name) for name in ("t.jsonl", "bom.jsonl", "t.csv", "bom.csv", "t.parquet", "classes.parquet")]
    assert len({split.fingerprint for split in splits}) == 1
    assert len({split.rows._fingerprint for split in splits}) == 1
    assert load(jsonl("u.jsonl", ROWS[::-1])).fingerprint != splits[0].fingerprint


def test_a_split_is_tokenised_once(row_cache: Path) -> None:
    rows = [{"x": "a b", "y": "c"}, {"x": "c", "y": "a"}]
    path, template = jsonl("t.jsonl", rows), Template(input="{x}", target="{y}")
    first, second = words(), words()
    once = load_split("train", path, Encoder(template, first, 10))
    files = {file: file.stat().st_mtime_ns for file in row_cache.iterdir()}
    again = load_split("train", path, Encoder(template, second, 10))
    assert (first.texts, second.texts) == (4 + 2, 0)  # 2 texts to see which special tokens are added
    assert {file: file.stat().st_mtime_ns for file in row_cache.iterdir()} == files
    assert again.rows[:] == once.rows[:]
    assert (again.cut, again.dropped, again.fingerprint) == (once.cut, once.dropped, once.fingerprint)


def test_whatever_decides_the_tokens_is_tokenised_again(row_cache: Path) -> None:
    path = jsonl("t.jsonl", [{"x": "a b", "y": "c"}])
    template = Template(input="{x}", target="{y}")
    encoders = [
        Encoder(template, words(), 10),
        Encoder(template, words(), 9),
        Encoder(template.model_copy(update={"input": "{x} "}), words(), 10),
        Encoder(template.model_copy(update={"truncate": "left"}), words(), 10),
        Encoder(template, words("$A"), 10),
        Encoder(template, words(eos_token="<unk>"), 10),
    ]
    for encoder in encoders:
        load_split("train", path, encoder)
    assert len(list(row_cache.iterdir())) == 1 + len(encoders)
    jsonl("t.jsonl", [{"x": "a c", "y": "c"}])
    assert load_split("train", path, encoders[0]).rows["text"][:] == ["a c"]


def test_dropped_rows_stay_counted_when_found_again(load: Callable[..., Split]) -> None:
    path = jsonl("t.jsonl", [*ROWS, {"text": "", "label": "tool"}, {"text": "apple " * 99, "label": "fruit"}])
    template = KIND.model_copy(update={"input": "{text}"})
    for _ in range(2):
        split = load(path, template, limit=20)
        assert (len(split), split.cut, split.dropped) == (4, 1, 1)
        assert split.rows["cut"][:] == [False, False, False, True]


def test_several_processes_may_load_at_once(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    jsonl("t.jsonl", ROWS * 300)
    program = (
        "from transformers import PreTrainedTokenizerFast\n"
        "from ptuning.settings.data import Template; from ptuning.data.encoder import Encoder\n"
        "from ptuning.data.dataset import load_split\n"
        f"tokenizer = PreTrainedTokenizerFast.from_pretrained({str(tmp_path / 'tokenizer')!r})\n"
        "encoder = Encoder(Template(input='{text}', target=' {label}'), tokenizer, 100)\n"
        "split = load_split('train', 't.jsonl', encoder); print(len(split), split.row(899), split.rows._fingerprint)\n"
    )
    environment = os.environ | {
        "HF_DATASETS_CACHE": str(tmp_path / "cache"),
        "PYTHONPATH": str(Path(__file__).parent.parent),
    }
    processes = [subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=PIPE, stderr=PIPE) for _ in range(2)]
    outputs = [process.communicate(timeout=60) for process in processes]
    assert outputs[0][0].startswith(b"900 ") and outputs[0] == outputs[1]
    assert outputs[0][1] == b""  # no progress bars
    assert len(list((tmp_path / "cache" / "ptuning").iterdir())) == 2


def test_a_tokenizer_keeps_its_fingerprint(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    before = tokenizer_fingerprint(tiny_tokenizer)
    tiny_tokenizer(["a", "a b"], padding=True, truncation=True, max_length=2)
    assert tokenizer_fingerprint(tiny_tokenizer) == before
    tiny_tokenizer.save_pretrained(tmp_path / "saved")
    assert tokenizer_fingerprint(AutoTokenizer.from_pretrained(tmp_path / "saved")) == before
    assert len({tokenizer_fingerprint(each) for each in (words(), words("$A"), words(eos_token="<s>"))}) == 3


# Cutting


@pytest.mark.parametrize(("truncate", "text"), [("right", "abc"), ("left", "fgh")])
def test_the_longest_field_is_cut_on_its_side(truncate: Any, text: str) -> None:
    tokenizer = Tokenizer(models.WordLevel({"</s>": 0, **{letter: i for i, letter in enumerate("abcdefghxy:", 1)}}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    template = Template(input="x:{long}:{short}y", target="{t}", truncate=truncate)
    ids = Encoder(template, fast, 10).fitted_ids({"long": "abcdefgh", "short": "ab"}, 9)
    assert fast.decode(ids).replace(" ", "") == f"x:{text}:aby"


def test_cut_rows_are_counted_and_leave_room_for_any_label(
    load: Callable[..., Split], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    template = KIND.model_copy(update={"labels": ("fruit", "tool", "a label of many, many tokens")})
    split = load(jsonl("t.jsonl", [*ROWS, {"text": "apple " * 99, "label": "tool"}]), template, limit=60)
    assert (split.cut, split.dropped, len(split)) == (1, 0, 4)
    longest = max(map(len, Encoder(template, tiny_tokenizer, 60).label_ids))
    assert len(split.row(3)[0]) + longest == 60


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.text(st.characters(exclude_categories=["Cs"]), max_size=80),
    other=st.text("ab \u00e9", max_size=20),
    room=st.integers(1, 60),
    truncate=st.sampled_from(["left", "right"]),
)
@example(text="", other="", room=1, truncate="left")
@example(text="\U0001f600" * 20, other="", room=20, truncate="left")
def test_the_templates_words_survive_any_cut(
    tiny_tokenizer: PreTrainedTokenizerFast, text: str, other: str, room: int, truncate: Any
) -> None:
    template = Template(input="[In] {text} | {other} [Out]", target="{t}", truncate=truncate)
    encoder = Encoder(template, tiny_tokenizer, 100)
    row = {"text": text, "other": other}
    whole = encoder.input_ids(row)
    least = min(len(encoder.input_ids(row | {field: ""})) for field in row if len(row[field]) == max(len(text), len(other)))
    try:
        ids = encoder.fitted_ids(row, room)
    except DataError:
        assert least > room
        return
    assert len(ids) <= room
    if len(whole) <= room:
        assert ids == whole
        return
    read = tiny_tokenizer.decode(ids, skip_special_tokens=True)
    longer, shorter = (text, other) if len(text) >= len(other) else (other, text)
    shapes = [("[In] ", f" | {other} [Out]", text)] if longer == text else []
    shapes += [(f"[In] {text} | ", " [Out]", other)] if longer == other else []
    assert any(
        read.startswith(before)
        and read.endswith(after)
        and (middle := read[len(before) : len(read) - len(after)]) in field
        and (field.startswith(middle) if truncate == "right" else field.endswith(middle))
        for before, after, field in shapes
    )


def test_max_tokens_lowers_the_limit(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    template = KIND.model_copy(update={"max_tokens": 12})
    assert Encoder(template, tiny_tokenizer, 100).limit == 12
    assert Encoder(template, tiny_tokenizer, 10).limit == 10
    assert Encoder(KIND, tiny_tokenizer, 100).limit == 100


# Sentences


def test_sentences_about_the_source(load: Callable[..., Split]) -> None:
    folder = Path.cwd()
    Path("folder.csv").mkdir()
    Path("t.txt").touch()
    for name in ("empty.jsonl", "empty.csv", "blank.jsonl", "header.csv", "broken.parquet"):
        Path(name).touch()
    Path("blank.jsonl").write_text("\n \n")
    Path("header.csv").write_text("text,label\n")
    Path("noise.parquet").write_bytes(b"PAR1" + b"noise" * 9 + b"PAR1")
    pq.write_table(pa.Table.from_pylist([], pa.schema([("text", pa.string()), ("label", pa.string())])), "none.parquet")
    kinds = "give a .jsonl, .json, .csv, .tsv, .parquet or .arrow file, or hub:org/name:split"
    assert sentence(load, "no.jsonl") == f"no.jsonl: no such file in {folder}; correct the path"
    jsonl("pets-train.jsonl", ROWS)
    assert sentence(load, "pets-trian.jsonl").endswith("; did you mean pets-train.jsonl?")
    assert sentence(load, "pets-test.jsonl").endswith("; correct the path"), "another split is no good guess"
    assert sentence(load, "t.txt") == f"t.txt: unknown file type; {kinds}"
    assert sentence(load, "t.zip") == "t.zip: unknown file type; unpack it first"
    assert sentence(load, "folder.csv") == f"folder.csv: contains no file of rows; {kinds}"
    for name in ("empty.jsonl", "blank.jsonl", "empty.csv", "header.csv", "none.parquet"):
        assert sentence(load, name) == f"{name}: is empty; give a split with at least one row"
    for name in ("broken.parquet", "noise.parquet"):
        assert sentence(load, name).startswith(f"{name}: is not a readable Parquet file (")
        assert sentence(load, name).endswith("); write it again")


def test_sentences_about_the_hub(load: Callable[..., Split]) -> None:
    form = "is not a valid data set of the Hub; write hub:org/name:split or hub:org/name/config:split"
    for source in ("hub:name", "hub:org/name", "hub:a/b/c/d:train", "hub:../x:train", "hub::train", "hub:a//b:train"):
        assert sentence(load, source) == f"{source}: {form}"
    message = sentence(load, "hub:nobody/nothing:train")
    assert message.startswith("hub:nobody/nothing:train: cannot be loaded (")
    assert message.endswith("); check name, split and network, or give a file")


def test_a_data_set_on_the_hub(load: Callable[..., Split], monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    hub = datasets.Dataset.from_list(ROWS).class_encode_column("label")

    def load_dataset(path: str, name: str | None, split: str) -> datasets.Dataset:
        calls.append((path, name, split))
        return hub

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    split = load("hub:org/name/config:train[:10%]")
    assert split.rows["label"][:] == [0, 1, 0]
    assert split.fingerprint == load(jsonl("t.jsonl", ROWS)).fingerprint
    load("hub:name:test")
    assert calls == [("org/name", "config", "train[:10%]"), ("name", None, "test")]


def test_builtin_tasks(load: Callable[..., Split], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "BUILTIN", tmp_path / "tasks")
    for split in ("train", "test"):
        (tmp_path / "tasks" / "kind").mkdir(parents=True, exist_ok=True)
        jsonl(str(tmp_path / "tasks" / "kind" / f"{split}.jsonl"), ROWS)
    assert load("builtin:kind/train").source == "builtin:kind/train"
    for source in ("builtin:kind/validation", "builtin:kind", "builtin:../tasks/kind/train"):
        assert sentence(load, source) == (f"{source}: no such built-in split; use one of builtin:kind/test, builtin:kind/train")


LINE = b'{"text": "a pear", "label": "fruit"}\n'


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (LINE + b'{"text": "a\0"}\n', "line 2: contains a NUL byte; save the file as UTF-8 text"),
        (LINE + LINE + b'{"text": "caf\xe9"}\n', "line 3: is not UTF-8 at byte 14; save the file as UTF-8"),
        ("{}\n".encode("utf-16-le"), "line 1: contains a NUL byte; save the file as UTF-8 text"),
        (b'{"text": "' + b"x" * 10_000_000 + b'"}\n', "line 1: is longer than 10 MB; write one row per line"),
        (LINE + b"[1]\n", "line 2: is not a JSON object; write one object per line"),
        (LINE + b'{"text": "a"\n', "line 2: is not a JSON object; write one object per line"),
        (b"[" * 100_000 + b"\n",
         "line 1: is not a JSON object (too deeply nested); write one object per line, or an array of objects"),
        (LINE + b'{"text": "\\ud800", "label": "fruit"}\n',
         "row 2: contains a lone surrogate (half a character); remove it"),
        (b'\n{"label": "fruit"}\n',
         "row 1 (line 2): the field 'text' is missing (found: 'label'); correct the data or the template"),
        (LINE + b'{"text": null, "label": "fruit"}\n', "row 2: the field 'text' is null; fill it or remove the row"),
        (LINE + b'{"text": NaN, "label": "fruit"}\n', "row 2: the field 'text' is null; fill it or remove the row"),
        (LINE + b'{"text": ["a"], "label": "fruit"}\n',
         "row 2: the field 'text' is a list, not a text; write it as text, or name one value: {text[0]}"),
        (LINE + b'{"text": "a", "label": "friut"}\n',
         "row 2: 'friut' is not one of the labels 'fruit', 'tool'; did you mean 'fruit'?"),
        (LINE + b'{"text": "a", "label": 3}\n',
         "row 2: '3' is not one of the labels 'fruit', 'tool'; correct the row or data.labels"),
    ],
)  # fmt: skip
def test_sentences_about_jsonl(load: Callable[..., Split], row_cache: Path, content: bytes, what: str) -> None:
    Path("t.jsonl").write_bytes(content)
    assert sentence(load, "t.jsonl") == sentence(load, "t.jsonl") == f"t.jsonl, {what}"
    assert not [file for file in row_cache.iterdir() if "-" not in file.name], "something half-finished stays in the cache"


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("text,label\na pear\n", "row 1 (line 2): has 1 values for 2 columns; put texts with commas in quotes"),
        ('text,label\n"a\nb",fruit\nc,d,tool\n',
         "row 2 (line 4): has 3 values for 2 columns; put texts with commas in quotes"),
        ("text,label,text\n", "line 1: the column 'text' occurs twice; rename one"),
        ("message,label\nx,tool\n",
         "row 1 (line 2): the field 'text' is missing (found: 'label', 'message'); "
         "correct the data or the template"),
        ('text,label\n"a pear,fruit\n', "line 2: is not valid CSV (unexpected end of data); check the quotes"),
        ("text,label\na,tool\nb\0,tool\n", "line 3: contains a NUL byte; save the file as UTF-8 text"),
    ],
)  # fmt: skip
def test_sentences_about_csv(load: Callable[..., Split], content: str, what: str) -> None:
    Path("t.csv").write_bytes(content.encode())
    assert sentence(load, "t.csv") == f"t.csv, {what}"


def test_sentences_about_columns(load: Callable[..., Split]) -> None:
    pq.write_table(pa.Table.from_pylist([{"message": "x", "label": "tool"}]), "t.parquet")
    assert sentence(load, "t.parquet") == (
        "t.parquet: the field 'text' is missing (found: 'label', 'message'); correct the data or the template"
    )
    pq.write_table(pa.Table.from_pylist([*ROWS, {"text": None, "label": "tool"}]), "u.parquet")
    assert sentence(load, "u.parquet") == "u.parquet, row 4: the field 'text' is null; fill it or remove the row"
    jsonl("t.jsonl", [ROWS[0] | {"references": [1]}])
    assert sentence(load, "t.jsonl", FREE, references="references") == (
        "t.jsonl, row 1: the field 'references' is not a list of texts; write it as a list of texts"
    )
    assert load("t.jsonl", FREE).rows["references"][:] == [["fruit"]]


def test_sentences_about_rows_that_do_not_fit(load: Callable[..., Split], tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = Encoder(KIND, tiny_tokenizer, 60)
    bare = KIND.model_copy(update={"input": "{text}"})
    path = jsonl("t.jsonl", [*ROWS, {"text": "", "label": "tool"}])
    assert sentence(load, path, bare, "validation") == ("t.jsonl, row 4: the input has no text; fill the row or remove it")
    assert load(path, bare).dropped == 1
    assert load(path, KIND, "validation").dropped == 0  # the template has words of its own

    long = jsonl("long.jsonl", [*ROWS, {"text": "\u00e9" * 40, "label": "tool"}])
    whole, reserve = len(encoder.input_ids({"text": "\u00e9" * 40})), max(map(len, encoder.label_ids))
    size = f"row 4: the input has {whole} tokens, {60 - reserve} fit (limit 60, {reserve} for the target)"
    refuse = KIND.model_copy(update={"truncate": "error"})
    for name in ("train", "test"):
        assert sentence(load, long, refuse, name, 60) == (
            f'long.jsonl, {size}; shorten the text, raise data.max_tokens or set data.truncate = "right"'
        )

    wide = jsonl("wide.jsonl", [ROWS[0], {"text": "a", "label": "\u00e9" * 60}])
    assert load(wide, FREE).dropped == 1
    whole, reserve = (
        len(encoder.input_ids({"text": "a"})),
        len(Encoder(FREE, tiny_tokenizer, 60).target_ids({"label": "\u00e9" * 60})),
    )
    assert sentence(load, wide, FREE, "test") == (
        f"wide.jsonl, row 2: the input has {whole} tokens, {100 - reserve} fit (limit 100, {reserve} for the target), "
        "and truncating a field is not enough; shorten the row, the template or the soft prompt"
    )
    assert sentence(load, path, KIND, "train", 5) == (
        "t.jsonl: none of its 4 rows has text that fits into 5 tokens; raise data.max_tokens"
    )


def test_sentences_about_labels_and_tokenizers(load: Callable[..., Split]) -> None:
    labels = tuple(f"label {number}" for number in range(77))
    path = jsonl("t.jsonl", [{"text": "x", "label": "zzz"}])
    listed = ", ".join(f"'{label}'" for label in labels[:20])
    assert sentence(load, path, KIND.model_copy(update={"labels": labels})) == (
        f"t.jsonl, row 1: 'zzz' is not one of the labels {listed}, ... (77 in all); correct the row or data.labels"
    )
    unknown = Encoder(Template(input="{x}", target="{y}", labels=("c", "x", "y")), words(), 10)
    with pytest.raises(DataError) as error:
        _ = unknown.label_ids
    assert str(error.value) == "the labels 'x' and 'y' have the same tokens; rename one in data.labels"
    with pytest.raises(DataError) as error:
        Encoder(KIND, PreTrainedTokenizerFast(tokenizer_object=words().backend_tokenizer), 10)
    assert str(error.value) == "the tokenizer has no end token; set eos_token in the base's tokenizer_config.json"


def test_a_request_without_the_field_is_told_so(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError) as error:
        Encoder(KIND, tiny_tokenizer, 100).fitted_ids({"message": "x"})
    assert str(error.value) == ("the field 'text' is missing (found: 'message'); correct the data or the template")


def test_a_cache_that_cannot_be_written(load: Callable[..., Split], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file")
    folder = tmp_path / "file" / "ptuning"
    assert sentence(load, jsonl("t.jsonl", ROWS)) == (
        f"{folder}: cannot be created (Not a directory); set HF_DATASETS_CACHE to a writable folder"
    )
