"""Files that somebody else made: headers that lie (S2), numbers that overflow (S3), and what makes a base this base (S4)."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from conftest import tiny_base
from test_soft_prompt import make, rewrite

from ptuning.errors import UserError
from ptuning.model import soft_prompt
from ptuning.model.base import find_base
from ptuning.settings.model import ModelConfig

pytestmark = pytest.mark.fast


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make(torch.randn(5, 32)).save(str(tmp_path / "toy"), layers=2, heads=4)
    rewrite(tmp_path / "toy")
    return tmp_path / "toy"


def entry(begin: int = 0, end: int = 640, shape: tuple[int, ...] = (5, 32), dtype: str = "F32") -> str:
    return json.dumps({"dtype": dtype, "shape": shape, "data_offsets": [begin, end]})


def write(folder: Path, header: str, data: int = 640, length: int | None = None) -> None:
    head = header.encode()
    content = struct.pack("<Q", len(head) if length is None else length) + head + b"\0" * data
    (folder / "adapter_model.safetensors").write_bytes(content)


@pytest.mark.parametrize(
    ("header", "data", "length"),
    [
        (f'{{"prompt_embeddings": {entry()}}}', 640, 1 << 63),
        (f'{{"prompt_embeddings": {entry()}}}', 640, 10_000),
        (f'{{"prompt_embeddings": {entry()}}}', 639, None),
        (f'{{"prompt_embeddings": {entry()}}}', 641, None),
        (f'{{"prompt_embeddings": {entry(dtype="F31")}}}', 640, None),
        (f'{{"prompt_embeddings": {entry(shape=(5, 1 << 62))}}}', 640, None),
        (f'{{"prompt_embeddings": {entry(shape=(-5, -32))}}}', 640, None),
        (f'{{"prompt_embeddings": {entry(0, 640)}, "other": {entry(320, 640, (80,))}}}', 640, None),
        (f'{{"prompt_embeddings": {entry(640, 0)}}}', 640, None),
        (f'{{"prompt_embeddings": {entry()}, "prompt_embeddings": {entry()}}}', 640, None),
        ("[" * 10_000, 0, None),
        ('{"a":' * 10_000, 0, None),
        ("\ud800".encode("utf-8", "surrogatepass").decode("latin-1"), 0, None),
        ("{}", 0, None),
        ("null", 0, None),
        ('{"__metadata__": {"x": "' + "y" * 99_000_000 + '"}}', 0, None),
        ('{"__metadata__": {"x": "' + "y" * 101_000_000 + '"}}', 0, None),
    ],
    ids=range(17),
)
def test_headers_that_lie_are_a_sentence(folder: Path, header: str, data: int, length: int | None) -> None:
    write(folder, header, data, length)
    with pytest.raises(UserError) as refusal:
        soft_prompt.load(str(folder))
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 600


def test_a_file_of_many_gigabytes_is_not_read(folder: Path) -> None:
    with (folder / "adapter_model.safetensors").open("r+b") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(UserError, match="has 1099511627776 bytes, too many for a soft prompt"):
        soft_prompt.load(str(folder))


@pytest.mark.parametrize(
    "content",
    [b"", b"null", b"[]", b'"x"', b'{"peft_type": null}', b'{"peft_type": "PROMPT_TUNING"}', b"[" * 5000, b"\xff\xfe"],
)
def test_configs_that_are_none(folder: Path, content: bytes) -> None:
    (folder / "adapter_config.json").write_bytes(content)
    with pytest.raises(UserError):
        soft_prompt.load(str(folder))


@pytest.mark.parametrize("content", [b"", b"null", b"[]", b"[" * 5000, b"\xff\xfe", b'{"format": 2}'])
def test_cards_that_are_none(folder: Path, content: bytes) -> None:
    (folder / "card.json").write_bytes(content)
    with pytest.raises(UserError, match="card.json is not valid"):
        soft_prompt.load(str(folder))


MANIFESTS = ["[]", "{}", '{"sha256": []}', '{"sha256": {"../../secret": "00"}}', "null", "x", "[" * 5000]


@pytest.mark.parametrize("manifest", MANIFESTS, ids=range(len(MANIFESTS)))
def test_manifests_that_are_none(folder: Path, manifest: str) -> None:
    (folder / "manifest.json").write_text(manifest)
    with pytest.raises(UserError):
        soft_prompt.load(str(folder))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_are_read(folder: Path, dtype: torch.dtype) -> None:
    vectors = torch.randn(5, 32).to(dtype)
    safetensors.torch.save_file({"prompt_embeddings": vectors}, folder / "adapter_model.safetensors")
    assert torch.equal(soft_prompt.load(str(folder)).vectors, vectors.float())


def test_a_double_beyond_single_precision_is_refused(folder: Path) -> None:
    vectors = torch.full((5, 32), 1e300, dtype=torch.float64)
    safetensors.torch.save_file({"prompt_embeddings": vectors}, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match="is not finite"):
        soft_prompt.load(str(folder))


def fingerprint(folder: Path) -> dict[str, str]:
    return find_base(ModelConfig(path=str(folder))).fingerprint.parts()


def test_the_fingerprint_is_of_the_tensors_not_of_their_files(tmp_path: Path, tiny_tokenizer: Any) -> None:
    base = tiny_base("llama", vocab_size=len(tiny_tokenizer))
    for name, size in (("whole", "1GB"), ("shards", "20KB")):
        base.save_pretrained(tmp_path / name, max_shard_size=size)
        tiny_tokenizer.save_pretrained(tmp_path / name)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    whole = fingerprint(tmp_path / "whole")
    assert fingerprint(tmp_path / "shards") == whole
    found = find_base(ModelConfig(path=str(tmp_path / "whole")))
    for dtype in (torch.bfloat16, torch.float16):  # read from the files, whatever was loaded from them
        found.load(dtype)
        assert found.fingerprint.parts() == whole
    shutil.copytree(tmp_path / "whole", tmp_path / "settings")
    config = json.loads((tmp_path / "settings" / "config.json").read_text())
    config |= {"use_cache": False, "dtype": "bfloat16", "transformers_version": "4.0.0"}
    (tmp_path / "settings" / "config.json").write_text(json.dumps(config))
    assert fingerprint(tmp_path / "settings") == whole


def test_the_fingerprint_names_what_changed(tmp_path: Path, tiny_base_folder: Path) -> None:
    original = fingerprint(tiny_base_folder)
    for part in ("config", "tokenizer", "weights"):
        copy = tmp_path / part
        shutil.copytree(tiny_base_folder, copy)
        if part == "config":
            config = json.loads((copy / "config.json").read_text())
            (copy / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
        elif part == "tokenizer":
            text = (copy / "tokenizer.json").read_text()
            (copy / "tokenizer.json").write_text(text.replace('"add_prefix_space": false', '"add_prefix_space": true'))
        else:
            tensors = safetensors.torch.load_file(copy / "model.safetensors")
            tensors["model.norm.weight"][-1] += 1
            safetensors.torch.save_file(tensors, copy / "model.safetensors", {"format": "pt"})
        changed = fingerprint(copy)
        assert [name for name in original if original[name] != changed[name]] == [part]
