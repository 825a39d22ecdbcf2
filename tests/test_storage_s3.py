"""Storage on an object store: a real S3 protocol server (moto) on loopback."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import datasets
import pyarrow.parquet as pq
import pytest
import torch
from pyarrow import fs
from test_batches import Flaky, new_batch, output_of
from test_predict import KIND, toy_prompt

from ptuning import storage
from ptuning.data.readers import Columns
from ptuning.data.sources import read_source
from ptuning.errors import DataError, UserError
from ptuning.model import soft_prompt
from ptuning.prediction.parts import Parts
from ptuning.storage import StorageError
from ptuning.training import checkpoint, lease
from ptuning.tuning import batch_runner
from ptuning.tuning.batch_runner import BatchRunner
from ptuning.tuning.batch_store import BatchStore
from ptuning.tuning.file_check import FileError
from ptuning.tuning.files import FileStore, QuotaExceeded

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    before = dict(os.environ)
    os.environ |= {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
    }
    try:
        for _ in range(200):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        system = fs.S3FileSystem(endpoint_override=f"127.0.0.1:{port}", scheme="http", allow_bucket_creation=True)
        system.create_dir("tests")
        yield "s3://tests"
    finally:
        os.environ.clear()
        os.environ |= before
        server.send_signal(signal.SIGTERM)
        server.wait()


def test_law_9_folders_are_whole_or_absent(bucket: str) -> None:
    folder = f"{bucket}/a/b"
    storage.check_writable(folder)
    storage.write_folder(folder, {"x": b"1", "y": b"22"})
    assert storage.read_folder(folder) == {"x": b"1", "y": b"22"}
    storage.write_folder(folder, {"z": b"3"})
    assert storage.read_folder(folder) == {"z": b"3"} and not storage.exists(folder, "x")
    storage.write_file(folder, "extra", b"4")
    assert storage.list_folders(f"{bucket}/a") == ["b"]
    storage.delete_folder(folder)
    assert storage.list_folders(f"{bucket}/a") == [] and not storage.exists(folder, "extra")


def test_checkpoints_live_in_an_object_store(bucket: str) -> None:
    for step in (10, 20, 30):
        checkpoint.save(f"{bucket}/run/checkpoints", step, {"v": torch.full((3,), float(step))}, {"step": step})
    assert storage.list_folders(f"{bucket}/run/checkpoints") == ["step-000000020", "step-000000030"]
    storage.write_file(f"{bucket}/run/checkpoints/step-000000030", "state.json", b"{}")
    saved = checkpoint.newest(f"{bucket}/run/checkpoints")
    assert saved is not None and saved[1]["step"] == 20


def test_of_two_drivers_at_once_one_wins(bucket: str) -> None:
    """In threads: who of them has it is decided in the bucket."""
    results: list[str] = []
    done = threading.Event()

    def drive() -> None:
        try:
            with lease.held(f"{bucket}/leased", print):
                results.append("held")
                done.wait(10)
        except UserError as error:
            results.append(str(error))
            done.set()

    threads = [threading.Thread(target=drive) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(result[:4] for result in results) == ["held", "s3:/"]
    assert not storage.exists(f"{bucket}/leased", lease.FILE)


def test_rows_in_a_bucket(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    storage.write_file(f"{bucket}/rows", "a.csv", b"text,label\nx,1\n")
    system, path = storage.resolve(f"{bucket}/rows")
    with system.open_output_stream(f"{path}/b.jsonl.gz", compression=None) as out:
        out.write(gzip.compress(b'{"text": "y", "label": 2}\n'))
    columns = Columns.of(["text", "label"])
    for source in (f"{bucket}/rows", f"{bucket}/rows/*", [f"{bucket}/rows/a.csv", f"{bucket}/rows/b.jsonl.gz"]):
        assert read_source(source, columns).rows[:] == {"label": ["1", "2"], "text": ["x", "y"]}
    with pytest.raises(DataError, match="s3://tests/rows/no.csv: no such file; correct the address"):
        read_source(f"{bucket}/rows/no.csv", columns)


def test_a_bucket_that_is_not_there_is_a_sentence(bucket: str) -> None:
    with pytest.raises(StorageError, match="compute.storage: s3://nowhere/x cannot be written .*; choose another folder"):
        storage.check_writable("s3://nowhere/x")


@pytest.mark.nightly
@pytest.mark.cluster
@pytest.mark.timeout(480)
def test_a_run_with_its_storage_in_an_object_store(
    bucket: str, toy_task: SimpleNamespace, write_toml: Callable[..., Path], tmp_path: Path
) -> None:
    """A command: the processes of its own cluster know the server."""
    toy_task.experiment["compute"] |= {"storage": f"{bucket}/runs", "workers": 1}
    toy_task.experiment["train"] |= {"steps": 5, "evaluate_every": 5}
    toy_task.experiment["tracking"] = {"uri": f"sqlite:///{tmp_path}/mlflow.db"}
    command = [sys.executable, "-m", "ptuning", "train", str(write_toml(toy_task.experiment)), "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["soft_prompt"] == f"{bucket}/runs/toy/soft_prompt"
    assert soft_prompt.load(summary["soft_prompt"]).card.metrics == summary["metrics"]
    assert not (tmp_path / "s3:").exists()


@pytest.mark.nightly
@pytest.mark.cluster
@pytest.mark.timeout(480)
def test_a_table_in_an_object_store(bucket: str, tiny_base_folder: Path, tmp_path: Path) -> None:
    """Rows, answers on their way, and output; the driver is killed, and another one continues."""
    toy_prompt(tiny_base_folder, KIND, 0).save(str(tmp_path / "kind"))
    text = "many words " * 180  # 2 kB, so that there are several blocks
    rows = "".join(json.dumps({"id": row, "text": f"{row} apple {text}"}) + "\n" for row in range(800))
    storage.write_file(f"{bucket}/rows", "rows.jsonl", rows.encode())
    output = f"{bucket}/answers/out.parquet"
    command = [sys.executable, "-m", "ptuning", "predict", "./kind", f"{bucket}/rows/rows.jsonl", "-o", output, "--json"]
    parts = Parts(output)
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as driver:
        until = time.monotonic() + 120
        while driver.poll() is None and not len(parts.clean()) and time.monotonic() < until:
            time.sleep(0.2)
        assert driver.poll() is None
        driver.kill()
    assert not storage.exists(f"{bucket}/answers", "out.parquet")
    done = subprocess.run([*command, "--resume"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert (summary["rows"], summary["errors"]) == (800, 0) and summary["answered"] < 800
    system, path = storage.resolve(output)
    assert pq.read_table(path, filesystem=system)["id"].to_pylist() == list(range(800))
    assert parts.begun() is None and not (tmp_path / "s3:").exists()


def test_files_and_batches_of_clients(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a disk: uploaded in pieces, read as a stream, answered in parts, and nothing is left of what was refused."""
    monkeypatch.setattr(batch_runner, "POLL_S", 0.05)
    root = f"{bucket}/clients/tuning"
    files, batches = FileStore(root, file_bytes=30 << 20), BatchStore(root)
    block = b'{"text": "' + b"x" * 1000 + b'"}\n'
    made = files.create("ann", "rows.jsonl", "fine-tune", (block * 1000 for _ in range(12)))  # more than one part of S3
    with files.open(made.id, "ann") as stream:
        assert stream.readline() == block and len(stream.read()) == made.bytes - len(block)
    assert files.data_source(made.id, "ann") == f"{root}/files/{made.id}/content.jsonl"
    for content, kind in (((b"x" * (1 << 20) for _ in range(31)), QuotaExceeded), ([b"[]"], FileError)):
        with pytest.raises(kind):
            files.create("ann", "rows.jsonl", "fine-tune" if kind is FileError else "batch", content)
    assert [record.id for record in files.list("ann")] == [made.id] == storage.list_names(f"{root}/files")

    batch = new_batch(root, 30)
    asyncio.run(BatchRunner(root, Flaky(), 8).run(idle_s=0.3))
    record = batches.get(batch.id, "ann")
    good, wrong = output_of(root, record)
    assert record.status == "completed" and len(good) + len(wrong) == 30 == record.total
    assert not batches.has_open and not list(batches.parts(batch.id))
    for file in files.list(None):
        files.delete(file.id, None)
    assert not storage.list_names(f"{root}/files")
