"""Law 9: no artefact is half there."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from ptuning import storage
from ptuning.storage import StorageError
from ptuning.training import checkpoint

pytestmark = pytest.mark.fast


def test_a_folder_comes_back_as_it_was_written(tmp_path: Path) -> None:
    folder = str(tmp_path / "a" / "b")
    storage.write_folder(folder, {"x": b"1", "y": b"22"})
    assert storage.read_folder(folder) == {"x": b"1", "y": b"22"}
    storage.write_folder(folder, {"z": b"3"})
    assert storage.read_folder(folder) == {"z": b"3"}
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]


def test_law_9_a_damaged_or_incomplete_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    storage.write_folder(str(folder), {"x": b"1234"})
    (folder / "x").write_bytes(b"1235")
    with pytest.raises(StorageError, match="x differs from its hash in manifest.json; use another copy"):
        storage.read_folder(str(folder))
    (folder / "x").unlink()
    with pytest.raises(StorageError, match="x is missing"):
        storage.read_folder(str(folder))
    (folder / "manifest.json").unlink()
    with pytest.raises(StorageError, match="manifest.json is missing"):
        storage.read_folder(str(folder))
    assert storage.list_folders(str(tmp_path)) == []


def test_a_manifest_cannot_name_files_outside_its_folder(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"1")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "manifest.json").write_text('{"sha256": {"../secret": "x"}}')
    with pytest.raises(StorageError, match="which is not a file name; do not use"):
        storage.read_folder(str(tmp_path / "a"))


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    folder = str(tmp_path / "a")
    storage.write_folder(folder, {"x": b"old"})
    with pytest.raises(TypeError):
        storage.write_folder(folder, {"x": b"new", "y": None})  # type: ignore[dict-item]
    assert storage.read_folder(folder) == {"x": b"old"}
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_law_9_killed_while_writing_a_folder_is_whole_or_absent(tmp_path: Path) -> None:
    script = (
        "import sys; from ptuning import storage\n"
        "n = 0\n"
        "while True:\n"
        "    n += 1; storage.write_folder(sys.argv[1], {str(i): str(n).encode() * 1000 for i in range(20)})\n"
    )
    for attempt in range(5):
        writer = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "a")])
        while not storage.exists(str(tmp_path), "a") and writer.poll() is None:
            time.sleep(0.01)
        time.sleep(0.03 * (attempt + 1))
        writer.kill()
        writer.wait()
        # Between the two renames of a replacement the name may be free for an instant, but never half filled.
        if storage.exists(str(tmp_path), "a"):
            assert len(set(storage.read_folder(str(tmp_path / "a")).values())) == 1


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="compute.storage: .* cannot be written .*; choose another folder"):
        storage.check_writable(str(tmp_path / "file" / "runs"))
    storage.check_writable(str(tmp_path / "runs"))
    assert not (tmp_path / "runs").exists()


def test_an_unknown_scheme_is_a_sentence() -> None:
    with pytest.raises(StorageError, match="foo://bucket: cannot be opened"):
        storage.check_writable("foo://bucket")


def test_checkpoints_keep_the_two_newest(tmp_path: Path) -> None:
    folder = str(tmp_path / "checkpoints")
    assert checkpoint.newest(folder) is None
    for step in (10, 20, 1000):
        checkpoint.save(folder, step, {"v": torch.full((2,), float(step))}, {"step": step})
    assert storage.list_folders(folder) == ["step-000000020", "step-000001000"]
    saved = checkpoint.newest(folder)
    assert saved is not None and saved[1] == {"step": 1000} and saved[0]["v"].tolist() == [1000.0, 1000.0]


@pytest.mark.parametrize("seed", range(50))
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(tmp_path: Path, seed: int) -> None:
    folder = tmp_path / "checkpoints"
    for step in (10, 20):
        checkpoint.save(str(folder), step, {"v": torch.full((9,), float(step))}, {"step": step})
    generator = torch.Generator().manual_seed(seed)
    files = sorted((folder / "step-000000020").iterdir())
    victim = files[seed % len(files)]
    content = bytearray(victim.read_bytes())
    at = int(torch.randint(len(content), (1,), generator=generator))
    if seed % 3 == 0:
        victim.unlink()
    elif seed % 3 == 1:
        victim.write_bytes(content[:at])
    else:
        content[at] ^= 1 << int(torch.randint(8, (1,), generator=generator))
        victim.write_bytes(content)
    saved = checkpoint.newest(str(folder))
    assert saved is not None and saved[1]["step"] == 10


def test_checkpoints_are_written_beside_training_and_none_is_said_to_be_there_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As to an object store: what is written is the state of its moment; the next one, and the end, wait for it; its error is
    raised there."""
    monkeypatch.setattr(storage, "is_local", lambda folder: False)
    gate, write = threading.Event(), storage.write_folder

    def slowly(*arguments: Any) -> None:
        assert gate.wait(20)
        write(*arguments)

    monkeypatch.setattr(storage, "write_folder", slowly)
    folder, values, writer = str(tmp_path / "checkpoints"), torch.ones(3), checkpoint.Writer()
    state: dict[str, Any] = {"step": 10, "events": [1]}
    writer.save(folder, 10, {"v": values}, state)
    values.fill_(2.0)
    state["events"].append(2)
    assert checkpoint.newest(folder) is None
    threading.Timer(0.2, gate.set).start()
    writer.save(folder, 20, {"v": values}, state)
    saved = checkpoint.newest(folder)
    assert saved is not None
    writer.wait(folder)
    assert saved[0]["v"].tolist() == [1.0] * 3 and saved[1] == {"step": 10, "events": [1]}
    assert storage.list_folders(folder) == ["step-000000010", "step-000000020"]

    def fails(*arguments: Any) -> None:
        raise OSError("No space left")

    monkeypatch.setattr(storage, "write_folder", fails)
    for ask in (lambda: writer.wait(folder), lambda: writer.save(folder, 30, {"v": values}, state), writer.end):
        writer.save(folder, 30, {"v": values}, state)
        with pytest.raises(OSError, match="No space left"):
            ask()
    writer.save(folder, 30, {"v": values}, state)
    writer.settle()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs a full file system, made with a tmpfs by root")
def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount: {mounted.stderr.decode().strip()}")
    try:
        folder = str(tmp_path / "checkpoints")
        checkpoint.save(folder, 10, {"v": torch.ones(1000)}, {"step": 10})
        with pytest.raises(OSError, match="No space left"):
            checkpoint.save(folder, 20, {"v": torch.ones(1_000_000)}, {"step": 20})
        saved = checkpoint.newest(folder)
        assert saved is not None and saved[1]["step"] == 10
        checkpoint.save(folder, 20, {"v": torch.ones(1000)}, {"step": 20})
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_google_is_not_asked_for_a_quarter_of_an_hour() -> None:
    """Arrow's client would repeat for 15 minutes that there are no credentials. What it was made with is what it pickles."""

    def seconds(uri: str) -> float:
        system, path = storage.resolve(uri)
        assert path == "bucket/a"
        return next(
            float(each["retry_time_limit"].total_seconds()) for each in system.__reduce__()[1] if isinstance(each, dict)
        )

    assert seconds("gs://bucket/a") == seconds("gcs://bucket/a?scheme=https") == storage.RETRY
    assert seconds("gs://bucket/a?retry_limit_seconds=90") == 90
