"""The artefact: PEFT reads ours, we read PEFT's; law 8: what is loaded is what was saved for this base."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from conftest import tiny_base
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel, PromptTuningConfig, get_peft_model
from torch import Tensor

from ptuning.model import compatibility, initializers, soft_prompt
from ptuning.model.packing import pack_targets
from ptuning.model.prompted_model import PromptedModel
from ptuning.model.soft_prompt import Card, SoftPrompt, SoftPromptError
from ptuning.settings.data import Template
from ptuning.storage import StorageError

pytestmark = pytest.mark.fast

FINGERPRINT = {"config": "a" * 64, "tokenizer": "b" * 64, "weights": "c" * 64}


def make(vectors: Tensor, **changes: Any) -> SoftPrompt:
    fields: dict[str, Any] = {
        "name": "toy",
        "base": "tiny",
        "base_fingerprint": FINGERPRINT,
        "length": len(vectors),
        "width": vectors.shape[1],
        "template": Template(input="{text}", target=" {label}", labels=("a", "b")),
        "content_hash": soft_prompt.content_hash(vectors),
    }
    return SoftPrompt(vectors, Card(**fields | changes))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make(torch.randn(5, 32, generator=torch.Generator().manual_seed(0))).save(str(tmp_path / "toy"), layers=2, heads=4)
    return tmp_path / "toy"


def test_a_soft_prompt_comes_back_bit_by_bit(tmp_path: Path) -> None:
    saved = make(torch.randn(5, 32), parent="d" * 64, metrics={"test_accuracy": 0.5})
    saved.save(str(tmp_path / "toy"))
    loaded = soft_prompt.load(str(tmp_path / "toy"))
    assert torch.equal(saved.vectors, loaded.vectors) and saved.card == loaded.card
    assert sorted(path.name for path in (tmp_path / "toy").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "card.json",
        "manifest.json",
    ]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3", "gemma2"])
def test_peft_loads_ours_with_the_same_logits(folder: Path, architecture: str) -> None:
    rows = [([5, 6, 7, 8], [9, 2]), ([11, 12], [13, 14, 2])]
    plan = pack_targets([5], [rows])
    with torch.no_grad():
        ours = PromptedModel(tiny_base(architecture))([soft_prompt.load(str(folder)).vectors], plan)
        theirs = PeftModel.from_pretrained(tiny_base(architecture), str(folder)).eval()
        expected = []
        for source, target in rows:
            ids = torch.tensor([source + target])
            logits = theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
            predicted = logits[-len(target) - 1 : -1]
            expected.append(torch.nn.functional.cross_entropy(predicted, torch.tensor(target), reduction="none"))
    assert torch.allclose(ours, torch.cat(expected), atol=1e-5)


def test_a_peft_adapter_made_elsewhere_loads_here(tmp_path: Path) -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=6)
    theirs = get_peft_model(tiny_base("llama"), config)
    theirs.save_pretrained(str(tmp_path / "elsewhere"))
    loaded = soft_prompt.load(str(tmp_path / "elsewhere"))
    weights = theirs.prompt_encoder["default"].embedding.weight
    assert torch.equal(loaded.vectors, weights.detach())
    assert loaded.card.template is None and loaded.card.base_fingerprint is None and loaded.card.length == 6


@given(st.integers(1, 20), st.integers(1, 40), st.integers(0, 2**31))
def test_content_hash_is_of_shape_and_content(length: int, width: int, seed: int) -> None:
    vectors = torch.randn(length, width, generator=torch.Generator().manual_seed(seed))
    assert soft_prompt.content_hash(vectors) == soft_prompt.content_hash(vectors.clone())
    changed = vectors.clone()
    changed[-1, -1] += 1
    assert soft_prompt.content_hash(vectors) != soft_prompt.content_hash(changed)
    if vectors.shape != vectors.T.shape:
        assert soft_prompt.content_hash(vectors) != soft_prompt.content_hash(vectors.reshape(width, length))


def test_law_8_another_base_is_refused_with_both_sides(folder: Path) -> None:
    loaded = soft_prompt.load(str(folder))
    compatibility.check_made_for(loaded, "toy", 32, "tiny", FINGERPRINT)
    compatibility.check_made_for(loaded, "toy", 32, "tiny", None)
    with pytest.raises(SoftPromptError, match=r"toy: was made for width 32 \(tiny\), but other has width 64; use its base"):
        compatibility.check_made_for(loaded, "toy", 64, "other", FINGERPRINT)
    with pytest.raises(SoftPromptError, match=r"made for tiny \(weights c{12}\), but other has weights e{12}; use the base"):
        compatibility.check_made_for(loaded, "toy", 32, "other", FINGERPRINT | {"weights": "e" * 64})


def rewrite(folder: Path, tensors: dict[str, Tensor] | None = None, config: dict[str, Any] | None = None) -> None:
    """Change a folder without a trace: as an adapter from elsewhere, without manifest and card."""
    for name in ("manifest.json", "card.json"):
        (folder / name).unlink(missing_ok=True)
    if tensors is not None:
        safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")
    if config is not None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        ({"other": torch.ones(5, 32)}, None, "must contain the single tensor prompt_embeddings, not"),
        ({"prompt_embeddings": torch.ones(5, 32), "x": torch.ones(1)}, None, "must contain the single tensor"),
        ({"prompt_embeddings": torch.ones(4, 32)}, None, r"is torch.float32 \(4, 32\), but adapter_config.json says \(5, 32\)"),
        ({"prompt_embeddings": torch.ones(160)}, None, "says"),
        ({"prompt_embeddings": torch.ones(5, 32, dtype=torch.int32)}, None, "is torch.int32"),
        ({"prompt_embeddings": torch.ones(0, 32)}, {"num_virtual_tokens": 0}, "says"),
        ({"prompt_embeddings": torch.full((5, 32), float("nan"))}, None, "is not finite"),
        ({"prompt_embeddings": torch.full((5, 32), float("inf"))}, None, "is not finite"),
        (None, {"peft_type": "LORA"}, "is a PEFT adapter of type LORA, not PROMPT_TUNING"),
    ],
)
def test_hostile_tensors_are_a_sentence(folder: Path, tensors: Any, config: Any, message: str) -> None:
    rewrite(folder, tensors, config)
    with pytest.raises(SoftPromptError, match=message):
        soft_prompt.load(str(folder))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 8,
        b"\xff" * 8 + b"{}",
        (1 << 63).to_bytes(8, "little") + b"{}",
        b"\x02\0\0\0\0\0\0\0{}",
        b"\x10\0\0\0\0\0\0\0not json at all!",
        b"\x80\x02]q\x00.",
    ],
)
def test_hostile_files_are_a_sentence(folder: Path, content: bytes) -> None:
    rewrite(folder)
    (folder / "adapter_model.safetensors").write_bytes(content)
    with pytest.raises(SoftPromptError):
        soft_prompt.load(str(folder))


def test_a_pickle_is_never_opened(folder: Path, tmp_path: Path) -> None:
    class Canary:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "opened",))

    rewrite(folder)
    (folder / "adapter_model.safetensors").unlink()
    for name in ("adapter_model.bin", "prompt.pt", "card.pkl"):
        torch.save(Canary(), folder / name)
    with pytest.raises(SoftPromptError, match="has no adapter_model.safetensors, the only format that is opened"):
        soft_prompt.load(str(folder))
    shutil.copy(folder / "adapter_model.bin", folder / "adapter_model.safetensors")
    with pytest.raises(SoftPromptError, match="is not a safetensors file"):
        soft_prompt.load(str(folder))
    assert not (tmp_path / "opened").exists()


def test_a_changed_card_or_tensor_is_refused(folder: Path) -> None:
    card = json.loads((folder / "card.json").read_text())
    (folder / "manifest.json").unlink()
    (folder / "card.json").write_text(json.dumps(card | {"content_hash": "0" * 64}))
    with pytest.raises(SoftPromptError, match="the vectors do not match the card"):
        soft_prompt.load(str(folder))
    (folder / "card.json").write_text(json.dumps(card | {"surprise": 1}))
    with pytest.raises(SoftPromptError, match=r"card.json is not valid \(surprise"):
        soft_prompt.load(str(folder))


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"adapter_config.json is missing \(the folder is incomplete, or was not"):
        soft_prompt.load(str(tmp_path))


EMBEDDING = torch.arange(40.0)[:, None] * torch.ones(1, 3)


def embed(ids: list[int]) -> Tensor:
    return EMBEDDING[ids]


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def test_text_rows_repeat_or_cut() -> None:
    assert initializers.text_rows(5, [7, 8], embed)[:, 0].tolist() == [7, 8, 7, 8, 7]
    assert initializers.text_rows(1, [7, 8], embed)[:, 0].tolist() == [7]


def test_vocabulary_rows_are_drawn_without_repetition_while_they_last() -> None:
    rows = initializers.vocabulary_rows(6, [1, 2, 3], embed, generator())[:, 0].tolist()
    assert sorted(rows[:3]) == sorted(rows[3:]) == [1, 2, 3]


def test_label_rows_average_the_tokens_of_a_label() -> None:
    rows = initializers.label_rows(4, [[10, 20], [30]], [1, 2], embed, generator())
    assert rows[:2, 0].tolist() == [15, 30] and set(rows[2:, 0].tolist()) == {1, 2}
    assert initializers.label_rows(1, [[10, 20], [30]], [1], embed, generator())[:, 0].tolist() == [15]


def test_random_rows_have_the_spread_of_the_embeddings() -> None:
    sample = torch.randn(2000, 8, generator=generator()) * 0.02 + 0.5
    rows = initializers.random_rows(2000, sample, generator())
    assert float(rows.mean()) == pytest.approx(0.5, abs=0.005) and float(rows.std()) == pytest.approx(0.02, rel=0.1)


def test_transferred_rows_cut_or_fill_up() -> None:
    source = torch.full((3, 3), 99.0)
    assert initializers.transferred_rows(2, source, [1, 2], embed, generator()).tolist() == source[:2].tolist()
    longer = initializers.transferred_rows(5, source, [1, 2], embed, generator())
    assert longer[:3].tolist() == source.tolist() and set(longer[3:, 0].tolist()) == {1, 2}
