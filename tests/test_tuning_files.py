"""Files of clients in the storage: what is taken, what is refused and how, who sees them, and when they go."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from ptuning import storage
from ptuning.data.text_lines import LINE_LIMIT
from ptuning.tuning import files
from ptuning.tuning.file_check import FileError, TrainingLines
from ptuning.tuning.files import FileStore, QuotaExceeded, UnknownFile

pytestmark = pytest.mark.fast

PLAIN = b'{"text": "a pear", "label": "fruit"}\n'
CHAT = b'{"messages": [{"role": "user", "content": "a pear"}, {"role": "assistant", "content": "fruit"}]}\n'
PAIR = b'{"prompt": "a pear", "completion": "fruit"}\n'


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    return FileStore(storage.join(str(tmp_path), "tuning"), file_bytes=1000, owner_bytes=2500)


def folders(store: FileStore) -> list[str]:
    return storage.list_names(store._folder)


def test_a_file_is_kept_as_it_came_and_only_its_owner_sees_it(store: FileStore) -> None:
    made = store.create("ann", "rows.jsonl", "fine-tune", [PLAIN[:10], PLAIN[10:], CHAT[:0]])
    assert (made.bytes, made.rows, made.owner, made.filename) == (len(PLAIN), 1, "ann", "rows.jsonl")
    for owner in ("ann", None):
        assert store.get(made.id, owner) == made
        with store.open(made.id, owner) as stream:
            assert stream.read() == PLAIN
        assert [each.id for each in store.list(owner)] == [made.id]
    for asked in (lambda: store.get(made.id, "bob"), lambda: store.open(made.id, "bob"), lambda: store.delete(made.id, "bob")):
        with pytest.raises(UnknownFile):
            asked()
    assert not store.list("bob") and not store.list("ann", "batch")
    another = FileStore(store._folder.removesuffix("/files"))  # of another process
    assert another.get(made.id, "ann") == made
    another.delete(made.id, "ann")
    assert not store.list("ann") and not folders(store)
    with pytest.raises(UnknownFile):
        store.get(made.id, "ann")


def test_an_id_is_no_path(store: FileStore, tmp_path: Path) -> None:
    (tmp_path / "tuning" / "file.json").parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "tuning" / "file.json").write_text("{}")
    for wrong in ("..", ".", "file-../../../../../../etc/passwd", "file-" + "a" * 23, "file-" + "a" * 24 + "\n", ""):
        with pytest.raises(UnknownFile):
            store.get(wrong, None)


def test_a_name_is_only_a_label(store: FileStore, tmp_path: Path) -> None:
    before = {path for path in tmp_path.rglob("*")}
    for name, label in (
        ("../../evil", "evil"), ("/etc/passwd", "passwd"), ("C:\\a\\b.jsonl", "b.jsonl"), ("a\0b\n.jsonl", "ab.jsonl"),
        ("..", "upload"), ("a/", "upload"), ("", "upload"), ("x" * 1000, "x" * 255),
    ):  # fmt: skip
        made = store.create("ann", name, "batch", [b"x"])
        assert made.filename == label
        place = Path(store.data_source(made.id, "ann"))
        assert place == Path(store._folder) / made.id / "content.jsonl" and place.exists()
    names = {path.name for path in tmp_path.rglob("*")} - {path.name for path in before}
    assert {name for name in names if not name.startswith("file-")} == {"tuning", "files", "content.jsonl", "file.json"}


def test_what_is_too_large_leaves_nothing(store: FileStore) -> None:
    with pytest.raises(QuotaExceeded, match="larger than 0 MB; split it"):
        store.create("ann", "a", "batch", (b"x" * 100 for _ in range(11)))
    with pytest.raises(QuotaExceeded):
        store.begin("ann", "a", "batch", declared=1001)
    assert not folders(store)
    for _ in range(2):
        store.create("ann", "a", "batch", [b"x" * 1000])
    store.write_result("ann", "results", "batch_output", b"y" * 5000)  # what the server writes is not counted
    with pytest.raises(QuotaExceeded, match="files of this key would be larger"):
        store.create("ann", "a", "batch", [b"x" * 501])
    store.create("ann", "a", "batch", [b"x" * 500])
    store.create("bob", "a", "batch", [b"x" * 1000])


def test_files_expire(store: FileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = store.create("ann", "a", "fine-tune", [PLAIN])
    gone = store.create("ann", "a", "fine-tune", [PLAIN], expires_after=3600)
    batch = store.create("ann", "a", "batch", [PLAIN])
    assert kept.expires_at is None and gone.expires_at == gone.created_at + 3600
    assert batch.expires_at == batch.created_at + 30 * 86400
    now = time.time()
    monkeypatch.setattr(files.time, "time", lambda: now + 3601)
    with pytest.raises(UnknownFile):
        store.get(gone.id, "ann")
    assert {each.id for each in store.list(None)} == {kept.id, batch.id} == set(folders(store))


def test_what_a_killed_process_left_goes_after_a_day(store: FileStore) -> None:
    upload = store.begin("ann", "a", "batch")
    upload.write(b"x")
    upload._out._out._stream.close()  # as the end of its process does
    (left,) = Path(store._folder).iterdir()
    assert not store.list(None) and left.exists()
    with pytest.raises(UnknownFile):
        store.get(left.name, None)
    for path in left.iterdir():
        os.utime(path, (time.time() - 2 * 86400,) * 2)
    assert not store.list(None) and not left.exists()


def test_a_result_is_the_same_file_however_often_it_is_written(store: FileStore) -> None:
    own = files.new_id("file")
    for content in (b"half", b"whole"):
        store.write_result("ann", "results.csv", "fine-tune-results", [content], file_id=own)
    with store.open(own, "ann") as stream:
        assert stream.read() == b"whole"
    assert len(store.list("ann")) == 1
    assert store.data_source(own, None).endswith(f"/{own}/content.csv")


SHAPES = (
    PLAIN,
    CHAT,
    PAIR,
    b'{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}',
    b'{"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}',
    b'{"a": ["x", "y"], "n": 1, "z": null}\n\n',
)


@pytest.mark.parametrize("lines", SHAPES)
def test_known_shapes_are_taken(lines: bytes) -> None:
    for step in (1, 7, 1000):
        check = TrainingLines()
        for at in range(0, len(lines), step):
            check.feed(lines[at : at + step])
        check.end()
        assert check.rows == 1


WRONG = {
    b"": "the file is empty; send",
    b"\n \n": "the file has no rows; write",
    b"\xef\xbb\xbf" + PLAIN: "line 1: begins with a byte order mark; save",
    "\ufeffx".encode("utf-16"): "line 1: begins with a byte order mark; save",
    PLAIN + b'{"text": "\xff"}': "line 2: is not UTF-8 at byte 11; save",
    PLAIN + b"{": "line 2: is not valid JSON (expecting property name",
    PLAIN + b"[1]": "line 2: is not a JSON object; write",
    PLAIN + b'{"text": NaN}': "line 2: is not valid JSON (NaN is not JSON); write",
    PLAIN + b'{"text": "\\ud800"}': "line 2: contains a lone surrogate",
    PLAIN + b'{"text": ' + b"[" * 100_000: "line 2: is not valid JSON (too deeply nested); write",
    PLAIN + b'{"text": {"a": 1}}': "line 2: the field 'text' is an object, not a text; write",
    b"{}": "line 1: is an empty object; write",
    CHAT + PLAIN: "line 2: the field 'messages' is missing (found: 'text', 'label'); write",
    CHAT + b'{"messages": []}': "line 2: the field 'messages' is empty, not a list",
    b'{"messages": "x"}': "line 1: the field 'messages' is a str, not a list of messages; write",
    CHAT + b"\n" + b'{"messages": [{"role": "robot", "content": "a"}]}': "line 3: message 1 of 'messages': its role 'robot'",
    b'{"messages": [{"role": "user", "content": "a"}]}': "line 1: the last message of 'messages' is of the user; end",
    b'{"messages": [{"role": "user", "content": null}]}': "line 1: message 1 of 'messages': 'content' is null, not a text",
    PAIR + b'{"prompt": "a"}': "line 2: the field 'completion' is missing",
    PAIR + b'{"prompt": "a", "completion": " "}': "line 2: the field 'completion' is empty; write",
    PLAIN + b'{"text": "' + b"x" * LINE_LIMIT: "line 2: is longer than 10 MB; write",
}  # fmt: skip


@pytest.mark.parametrize("content", WRONG, ids=lambda content: WRONG[content][:40])
def test_what_is_wrong_is_named_with_line_and_key(content: bytes, tmp_path: Path) -> None:
    store = FileStore(str(tmp_path))
    with pytest.raises(FileError) as told:
        store.create("ann", "rows.jsonl", "fine-tune", [content[at : at + 4096] for at in range(0, len(content), 4096)])
    assert str(told.value).startswith(WRONG[content]) and ";" in str(told.value) and str(tmp_path) not in str(told.value)
    assert not folders(store)


def test_memory_is_that_of_a_line(tmp_path: Path) -> None:
    """50 MB of rows; the writer holds less than a fifth of them."""
    import tracemalloc

    row = json.dumps({"text": "x" * 1000}).encode() + b"\n"
    store = FileStore(str(tmp_path))
    tracemalloc.start()
    made = store.create("ann", "rows.jsonl", "fine-tune", (row * 64 for _ in range(850)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert made.bytes > 50 << 20 and peak < 10 << 20
