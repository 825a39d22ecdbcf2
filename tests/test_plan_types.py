"""Plans of every kind of architecture: replayed without values, or estimated. Tiny random models, built here."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import tiny_config
from test_plan import invoke, keeping
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ptuning.config import read_experiment
from ptuning.errors import BaseError
from ptuning.model.attention_sizes import attention_sizes, token_numbers
from ptuning.model.packed_batch import PackedBatch
from ptuning.model.packing import pack_targets
from ptuning.model.prompted_model import PromptedModel
from ptuning.planning import meta_model
from ptuning.planning.capacity import Training
from ptuning.planning.formula import timeline_by_formula
from ptuning.planning.meta_model import MetaModel
from ptuning.planning.workload import Machine, RunShape, Workload
from ptuning.searching import slot_count

pytestmark = pytest.mark.fast

WORK = Workload(1, 5, 4, 12, 3)
SMALL = {
    "vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED = SMALL | {"num_key_value_heads": 2}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
TYPES: dict[str, dict[str, Any]] = {
    # Latent attention: values are narrower than keys.
    "deepseek_v3": SMALL | EXPERTS | {
        "num_key_value_heads": 4, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8,
        "v_head_dim": 6, "n_routed_experts": 4, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
    },
    # Grouped products, in float32.
    "mixtral": GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2},
    # Its residual sum changes a result in place.
    "falcon": SMALL | {"new_decoder_architecture": False, "multi_query": True, "parallel_attn": True},
    # Masks that ask for values, as it is concatenated.
    "stablelm": GROUPED,
    "lfm2": GROUPED | {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    # No attention heads at all.
    "mamba": {"vocab_size": 100, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2},
    # Other heads in every layer.
    "gemma4_text": GROUPED | {
        "head_dim": 8, "global_head_dim": 16, "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 100,
        "layer_types": ["sliding_attention", "full_attention"], "num_kv_shared_layers": 0,
    },
    # Embeddings that are narrower than the layers.
    "opt": SMALL | {"word_embed_proj_dim": 16, "ffn_dim": 64},
}  # fmt: skip


def config_of(kind: str) -> PretrainedConfig:
    config: PretrainedConfig = CONFIG_MAPPING[kind](**TYPES[kind])
    return config


@lru_cache
def model_of(kind: str) -> MetaModel:
    return MetaModel(config_of(kind), torch.float32)


@pytest.mark.parametrize("kind", TYPES)
def test_passes_are_replayed_without_values(kind: str) -> None:
    found = model_of(kind)
    training, evaluation = found.training(WORK), found.evaluation(WORK)
    assert found.estimated is None
    assert 0 < evaluation.peak < training.peak and any(not moment.forward for moment in training.moments)
    # Every parameter that a module uses itself has its moments; some weights of a state space are used by their owner.
    needed = {tensor for moment in training.moments if moment.forward for tensor in moment.tensors}
    names = [name for name, _ in found.model.named_parameters()]
    own = [name for name in names if "0" in name.split(".") and "conv" not in name and "dt_proj" not in name]
    assert needed >= {names.index(name) for name in own}


@pytest.mark.parametrize("kind", ["deepseek_v3", "mixtral", "falcon", "stablelm", "opt"])
def test_what_is_replayed_is_what_the_real_pass_keeps(kind: str) -> None:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config_of(kind), dtype=torch.float32)
    model = PromptedModel(base)
    width = model_of(kind).shape.width
    vectors = [torch.zeros(5, width, requires_grad=True)]
    with keeping(base) as kept:
        model(vectors, pack_targets([5], [[([5] * 9, [6, 7, 2])] * 4]))
    backward = next(moment for moment in model_of(kind).training(WORK).moments if not moment.forward)
    assert 0.7 * sum(kept.values()) <= backward.peak <= 1.5 * sum(kept.values())


@pytest.mark.parametrize("kind", ["llama_tied_gqa", "gpt2", "gpt_neo", "gpt_neox", *TYPES])
def test_keys_and_values_are_counted_as_the_cache_of_the_base_holds_them(kind: str) -> None:
    config = config_of(kind) if kind in TYPES else tiny_config(kind)
    base = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        out = base(input_ids=torch.full((1, 7), 5), use_cache=True)
    layers = out.past_key_values.layers if "past_key_values" in out else []
    tensors = [getattr(layer, name, None) for layer in layers for name in ("keys", "values")]
    held = sum(tensor.numel() for tensor in tensors if tensor is not None)
    assert token_numbers(base, cached=True) == held / 7


def test_latent_attention_is_stored_expanded_and_cached_compressed() -> None:
    base = model_of("deepseek_v3").model.base
    assert token_numbers(base) == 2 * 4 * (12 + 6)
    assert token_numbers(base, cached=True) == 2 * (8 + 4)
    assert [size.queries for size in attention_sizes(base)] == [24, 24]


def test_soft_prompts_are_as_wide_as_the_embedding() -> None:
    assert model_of("opt").shape.width == 16


def failing(self: PromptedModel, soft_prompts: Any, plan: PackedBatch) -> Any:
    raise RuntimeError("values are needed\nhere")


def test_a_pass_that_cannot_be_replayed_is_estimated(monkeypatch: pytest.MonkeyPatch) -> None:
    found = MetaModel(tiny_config("llama"), torch.float32)
    monkeypatch.setattr(PromptedModel, "forward", failing)
    training = found.training(WORK)
    assert found.estimated == "values are needed"
    assert training.peak > found.evaluation(WORK).peak > 0
    assert found.training(replace(WORK, slots=2)).peak > training.peak
    settings = RunShape(length=5, tokens=12, targets=3, batch=8, new_tokens=3)
    plans = Training(found.shape, settings, Machine(2, 4 * 10**9, 2, 1e9, 1e12), found.training, found.evaluation)
    assert plans.plan(2).needed > plans.plan(1).needed and plans.most_slots(4) == 4


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neo", "deepseek_v3", "mixtral", "stablelm"])
def test_an_estimate_is_an_upper_bound(kind: str, recompute: bool) -> None:
    config = config_of(kind) if kind in TYPES else tiny_config(kind)
    found = MetaModel(config, torch.float32, checkpoint_gradients=recompute)
    for work in (WORK, Workload(2, 20, 8, 40, 3), Workload(1, 5, 4, 12, 3, compared=4)):
        for backward, replayed in ((True, found.training(work)), (False, found.evaluation(work))):
            estimated = timeline_by_formula(
                found.model.base, found.shape, work,
                backward=backward, shared=found.model.shared_prefix, recompute=recompute,
            )  # fmt: skip
            assert estimated.sizes == replayed.sizes
            assert replayed.peak <= estimated.peak <= 8 * replayed.peak
    assert found.estimated is None


@pytest.mark.parametrize("slots", [3, "auto"])
@pytest.mark.parametrize("built", [True, False])
def test_a_search_starts_whatever_can_be_planned(
    slots: int | str, built: bool, toy_task: SimpleNamespace, write_toml: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slots that were asked for are used; one slot otherwise, if an estimate says that nothing fits."""
    toy_task.experiment["search"] = {"slots": slots, "trials": 4}
    experiment = read_experiment(str(write_toml(toy_task.experiment)), [])
    model = PromptedModel(AutoModelForCausalLM.from_config(tiny_config("llama")))
    rows = SimpleNamespace(lengths=torch.tensor([12] * 8), target_lengths=torch.tensor([3] * 8))
    workers = SimpleNamespace(size=1, all_gather=lambda value: [value], broadcast=lambda value: value)
    pack: Any = SimpleNamespace(
        load_task=lambda experiment: SimpleNamespace(train=rows), workers=workers, model=model,
        base=SimpleNamespace(config=tiny_config("llama"), stored_in=None),
    )  # fmt: skip
    monkeypatch.setattr(PromptedModel, "forward", failing)
    monkeypatch.setattr(slot_count, "_room", lambda workers: 1)
    monkeypatch.setattr(slot_count, "_measured", lambda pack, experiment, size: 1.0)
    if not built:
        monkeypatch.setattr(meta_model, "PromptedModel", failing)
    assert slot_count.count_slots(pack, experiment) == (3 if slots == 3 else 1)


def test_a_pass_with_other_moments_counts_every_slot_like_the_first() -> None:
    one, other = model_of("stablelm").training(WORK), model_of("falcon").training(WORK)
    assert one.with_slots(other, 3).peak == 3 * one.peak


def test_a_plan_reports_that_it_is_an_estimate(
    toy_task: SimpleNamespace, write_toml: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_config("llama").save_pretrained(tmp_path / "bare")
    toy_task.experiment["model"]["path"] = str(tmp_path / "bare")
    common = ["plan", str(write_toml(toy_task.experiment)), "--gpus", "2", "--tokens", "20", "--gpu-memory", "4"]
    code, out, _ = invoke(*common, "--json")
    assert code == 0 and json.loads(out.splitlines()[-1])["estimated"] is None
    monkeypatch.setattr(PromptedModel, "forward", failing)
    code, out, _ = invoke(*common, "--json")
    assert code == 0 and json.loads(out.splitlines()[-1])["estimated"] == "values are needed"
    code, out, _ = invoke(*common)
    assert code == 0 and "activations are estimated, as the pass of this base cannot be replayed without values (" in out


def test_a_base_that_cannot_be_built_is_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(base: nn.Module) -> PromptedModel:
        raise AttributeError("no such attribute\nand more")

    monkeypatch.setattr(meta_model, "PromptedModel", broken)
    with pytest.raises(
        BaseError, match=r"^llama: cannot be planned \(no such attribute\); correct the config, or choose another base$"
    ):
        MetaModel(tiny_config("llama"), torch.float32)
