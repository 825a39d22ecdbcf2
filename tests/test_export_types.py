"""Merged exports of architectures that are not plain decoders, and the checks before an export gets its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_export import base_in, prompt_for, virtual
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ptuning.model.base import Base, find_base
from ptuning.model.compatibility import next_logits
from ptuning.model.soft_prompt import SoftPrompt
from ptuning.registry import merged_checkpoint, token_suppression
from ptuning.registry.merged_check import ExportError
from ptuning.registry.merged_export import write_merged
from ptuning.settings.model import ModelConfig

pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning"), pytest.mark.filterwarnings("ignore:TypedStorage")]

MAMBA = {"state_size": 4, "num_hidden_layers": 2}
STATE_SPACES: dict[str, dict[str, Any]] = {
    "mamba": MAMBA,
    "rwkv": {"attention_hidden_size": 32, "num_hidden_layers": 2, "context_length": 256},
}
OTHERS: dict[str, dict[str, Any]] = {
    "falcon_mamba": MAMBA,
    "mamba2": MAMBA | {"num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 8},
    "recurrent_gemma": {
        "lru_width": 32, "head_dim": 8, "attention_window_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 1, "intermediate_size": 64,
    },
    # Blocks that are shared in memory only if embedding and head are tied.
    "zamba": {
        "num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "mamba_d_state": 4,
        "n_mamba_heads": 1, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 64, "mamba_dt_rank": 4,
        "attention_hidden_size": 64, "attention_head_dim": 16, "use_mamba_kernels": False,
    },
}  # fmt: skip
BERT = {"is_decoder": True, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "type_vocab_size": 1}


def random_base(folder: Path, tokenizer: PreTrainedTokenizerFast, kind: str, **changes: Any) -> Base:
    """A random base of a model type of transformers with the tiny tokenizer."""
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = CONFIG_MAPPING[kind](**special | {"vocab_size": len(tokenizer), "hidden_size": 32} | changes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return find_base(ModelConfig(path=str(folder)))


def same_logits_behind(merged: Path, loaded: SoftPrompt, base: Base) -> Tensor:
    """Compare logits of the merged checkpoint with those of base and soft prompt. Returns the logits of the virtual tokens."""
    tokenizer, model = AutoTokenizer.from_pretrained(merged), AutoModelForCausalLM.from_pretrained(merged)
    text = torch.tensor([base.tokenizer("the old saw")["input_ids"]])
    expected = next_logits(base.load(torch.float32).eval(), loaded.vectors, text)
    with torch.no_grad():
        found = model.eval()(input_ids=tokenizer("the old saw", return_tensors="pt")["input_ids"], use_cache=False).logits[
            0, -1
        ]
    assert torch.allclose(found[: len(base.tokenizer)], expected, rtol=1e-3, atol=1e-3)
    return found[virtual(merged)]


@pytest.mark.fast
@pytest.mark.parametrize(
    ("kind", "changes"),
    [*STATE_SPACES.items(), *(pytest.param(*each, marks=[pytest.mark.nightly, pytest.mark.slow]) for each in OTHERS.items())],
)
def test_state_spaces_and_hybrids_are_exported(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, kind: str, changes: dict[str, Any]
) -> None:
    base = random_base(tmp_path / "base", tiny_tokenizer, kind, **changes)
    loaded = prompt_for(base)
    write_merged(loaded, base, "toy", tmp_path / "merged")
    same_logits_behind(tmp_path / "merged", loaded, base)


@pytest.mark.fast
@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_a_bias_with_a_second_name_is_exported_with_the_rows_of_the_virtual_tokens(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, kind: str
) -> None:
    base = random_base(tmp_path / "base", tiny_tokenizer, kind, max_position_embeddings=160, **BERT)
    loaded = prompt_for(base)
    assert write_merged(loaded, base, "toy", tmp_path / "merged").suppression.exact
    assert float(same_logits_behind(tmp_path / "merged", loaded, base).max()) < -9000


@pytest.mark.fast
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("model.norm.weight"), "LlamaForCausalLM loaded again misses model.norm.weight"),
        (lambda weights: weights.update(extra=torch.zeros(1)), "LlamaForCausalLM loaded again does not use extra"),
        (lambda weights: weights["lm_head.weight"].mul_(1.01), "LlamaForCausalLM loaded again gives other logits"),
        (lambda weights: weights.update({"model.norm.weight": torch.zeros(3)}), "cannot be merged into a LlamaForCausalLM"),
    ],
)
def test_what_is_loaded_otherwise_is_refused_before_it_has_its_name(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, change: Any, message: str
) -> None:
    base = base_in(tmp_path / "base", tiny_tokenizer, "llama")
    save = merged_checkpoint._save

    def damage(model: Any, folder: Path, untied: bool) -> None:
        save(model, folder, untied)
        file = folder / "model.safetensors"
        weights = load_file(file)
        change(weights)
        save_file(weights, file, {"format": "pt"})

    monkeypatch.setattr(merged_checkpoint, "_save", damage)
    with pytest.raises(ExportError, match=f"toy: {message}.*; export the adapter instead$") as refused:
        write_merged(prompt_for(base), base, "toy", tmp_path / "merged")
    assert "\n" not in str(refused.value)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["base"]


@pytest.mark.fast
def test_an_error_of_the_code_of_a_base_is_one_sentence(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any) -> Any:
        raise AttributeError("no such attribute\nand more")

    base = base_in(tmp_path / "base", tiny_tokenizer, "llama")
    monkeypatch.setattr(token_suppression, "hidden_states", broken)
    with pytest.raises(ExportError) as refused:
        write_merged(prompt_for(base), base, "toy", tmp_path / "merged")
    message = "toy: cannot be merged into a LlamaForCausalLM (no such attribute); export the adapter instead"
    assert str(refused.value) == message


@pytest.mark.fast
def test_all_end_tokens_are_kept(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    base_in(tmp_path / "base", tiny_tokenizer, "llama", eos_token_id=[2, 134])
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps({"eos_token_id": [135, 2]}))
    base = find_base(ModelConfig(path=str(tmp_path / "base")))
    write_merged(prompt_for(base), base, "toy", tmp_path / "merged")
    settings = GenerationConfig.from_pretrained(tmp_path / "merged")
    assert settings.eos_token_id == [2, 135, 134]
