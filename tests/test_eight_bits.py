"""A base stored in 8 bits computes what its stored weights mean, everywhere: passes, gradients, engines, plans, exports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_base
from torch import nn

from ptuning.errors import BaseError
from ptuning.inference.transformers_engine import TransformersEngine
from ptuning.inference.types import End, EngineConfig, Request
from ptuning.model.base import Base, find_base
from ptuning.model.compatibility import base_of, check_base, next_logits
from ptuning.model.eight_bits import EightBitLinear, coded, restored, store
from ptuning.model.label_trie import LabelTrie
from ptuning.model.packing import pack_labels, pack_targets
from ptuning.model.prompted_model import PromptedModel
from ptuning.model.soft_prompt import Card, SoftPrompt, SoftPromptError, content_hash
from ptuning.planning.meta_model import MetaModel
from ptuning.registry.merged_export import write_merged
from ptuning.settings.data import Template
from ptuning.settings.fields import EightBits
from ptuning.settings.model import ModelConfig
from ptuning.settings.training import ZeroConfig
from ptuning.training import base_loader

pytestmark = pytest.mark.fast

KINDS: list[EightBits] = ["int8", "fp8"]
ROWS = [([5, 6, 7, 9, 11], [8, 2]), ([9, 4], [3, 2]), ([12], [7, 13, 2])]
PASSES = {"llama": True, "gpt2": True, "gpt_neo": False, "falcon": False}
"""Architectures, and whether they take the packed pass."""


def found(folder: Path, kind: EightBits | None) -> Base:
    return find_base(ModelConfig(path=str(folder), quantization=kind))


@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_the_nearest_numbers(kind: EightBits) -> None:
    weight = torch.randn(7, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-4, 2, 7)[:, None]
    weight[3] = 0
    codes, scales = coded(weight, kind)
    assert codes.dtype == torch.int8 and torch.equal(scales, scales.bfloat16().float())
    if kind == "int8":
        numbers = np.arange(-127, 128, dtype=np.float64)
        meant = codes.double().numpy()
    else:
        every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double().numpy()
        numbers = every[np.isfinite(every)]
        meant = codes.view(torch.float8_e4m3fn).double().numpy()
    wanted = weight.double().numpy() / scales.double().numpy()[:, None]
    nearest = np.abs(wanted[..., None] - numbers).min(-1)
    np.testing.assert_allclose(np.abs(wanted - meant), nearest, atol=1e-6)
    largest = np.abs(wanted).max(1)[[0, 1, 2, 4, 5, 6]] / numbers.max()
    assert (largest > 0.98).all() and (largest <= 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_is_the_linear_map_of_its_weight(kind: EightBits, dtype: torch.dtype) -> None:
    plain = nn.Linear(48, 24).to(dtype)
    layer = EightBitLinear(plain.weight, plain.bias, kind)
    values = torch.randn(5, 3, 48, dtype=dtype, requires_grad=True)
    bias: Any = layer.bias
    for result, expected in (
        (layer(values), nn.functional.linear(values.float(), layer.weight.float(), bias.float())),
        (layer(values[1, 1]), nn.functional.linear(values[1, 1].float(), layer.weight.float(), bias.float())),
    ):
        near: Any = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
        assert result.dtype == dtype
        torch.testing.assert_close(result.float(), expected, **near)
        gradients = [torch.autograd.grad(each.float().square().sum(), values)[0].float() for each in (result, expected)]
        torch.testing.assert_close(*gradients, rtol=near["rtol"], atol=10 * near["atol"])
    assert torch.equal(layer(values)[:2], layer(values[:2].contiguous())) or dtype != torch.float32


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", PASSES)
def test_all_passes_are_those_of_the_weights_that_are_meant(architecture: str, kind: EightBits) -> None:
    base = tiny_base(architecture, attention=None)
    before = sum(parameter.numel() * parameter.element_size() for parameter in base.parameters())
    store(base, kind, architecture)
    layers = [module for module in base.modules() if isinstance(module, EightBitLinear)]
    assert not any(isinstance(module, EightBitLinear) for module in (base.get_input_embeddings(), base.get_output_embeddings()))
    assert len(layers) >= 8 and sum(parameter.numel() * parameter.element_size() for parameter in base.parameters()) < before
    other = tiny_base(architecture, attention=None)
    store(other, kind, architecture)
    restored(other)
    assert not any(isinstance(module, EightBitLinear) for module in other.modules())
    models = [PromptedModel(base), PromptedModel(other)]
    assert models[0].shared_prefix == PASSES[architecture]
    vectors = [torch.randn(length, 32, generator=torch.Generator().manual_seed(length)) for length in (4, 6)]
    trie = LabelTrie(((5, 2), (5, 9, 2), (7, 2)))
    losses, gradients, labels = [], [], []
    for model in models:
        given = [each.clone().requires_grad_() for each in vectors]
        losses.append(model(given, pack_targets([4, 6], [ROWS, ROWS[:2]])))
        gradients.append(torch.autograd.grad(losses[-1].sum(), given))
        with torch.no_grad():
            labels.append(model(given, pack_labels([4, 6], [[row[0] for row in ROWS]] * 2, trie)))
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(*labels, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ["llama_tied_gqa", "gpt_neo"], ids=["paged", "plain"])
def test_both_engines_answer_as_the_weights_that_are_meant(architecture: str) -> None:
    answers = []
    for plain in (False, True):
        base = tiny_base(architecture, attention=None)
        store(base, "int8", architecture)
        if plain:
            restored(base)
        engine = TransformersEngine(
            base, 2, EngineConfig(running=6, waiting=40, batch_tokens=48, cache_bytes=1 << 20, context=128)
        )
        try:
            handle = engine.add(torch.randn(5, 32, generator=torch.Generator().manual_seed(1)), "one")
            told = []
            for ids in ([5, 6, 7], [9], [4] * 9):
                *tokens, end = engine.generate(Request(ids, handle, 12))
                assert isinstance(end, End) and end.reason in ("stop", "length"), end
                told.append([token.id for token in tokens])
            answers.append(told)
        finally:
            engine.close()
    assert answers[0] == answers[1]


def prompt(base: Base) -> SoftPrompt:
    vectors = torch.randn(4, base.width, generator=torch.Generator().manual_seed(0)) * 0.3
    card = Card(
        name="toy",
        base=base.name,
        base_fingerprint=base.fingerprint.parts(),
        base_notes=tuple(base.notes),
        length=4,
        width=base.width,
        template=Template(input="{text}", target="{text}"),
        content_hash=content_hash(vectors),
    )
    return SoftPrompt(vectors, card)


def test_a_soft_prompt_fits_only_the_base_it_was_trained_on(tiny_base_folder: Path) -> None:
    plain, small, other = (found(tiny_base_folder, kind) for kind in (None, "int8", "fp8"))
    assert small.notes == ["stored in int8"] and not plain.notes
    assert "quantization" not in plain.fingerprint.parts()
    name = small.name
    for trained, now, fix in (
        (small, plain, f'trained on {name} stored in int8, but {name} is plain; set model.quantization = "int8"'),
        (plain, small, f"trained on {name} stored in plain, but {name} is int8; leave out model.quantization"),
        (small, other, f'trained on {name} stored in int8, but {name} is fp8; set model.quantization = "int8"'),
    ):
        with pytest.raises(SoftPromptError, match="folder: was ") as refused:
            check_base(prompt(trained), "folder", now)
        assert str(refused.value) == f"folder: was {fix}"
    for base in (plain, small, other):
        check_base(prompt(base), "folder", base)
        assert base_of(prompt(base).card, "toy").stored_in == base.stored_in


def test_a_base_without_linear_layers_is_refused() -> None:
    with pytest.raises(BaseError, match="model.quantization: toy has no linear layers that could be stored in int8; leave"):
        store(nn.ModuleDict({"embedding": nn.Embedding(3, 2)}), "int8", "toy")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_plan_counts_its_bytes(dtype: torch.dtype, tiny_base_folder: Path) -> None:
    base = found(tiny_base_folder, "int8")
    loaded = base_loader.load(base, ZeroConfig(stage=0), dtype)
    real = sum(parameter.numel() * parameter.element_size() for parameter in loaded.base.parameters())
    assert base.bytes(dtype) == real == base_loader.sharding(loaded.base).held
    shape = MetaModel(base.config, dtype, quantization="int8").shape
    parameters = len(list(loaded.base.parameters()))
    assert real <= shape.bytes - shape.buffers <= real + parameters * dtype.itemsize
    assert real < found(tiny_base_folder, None).bytes(dtype)


def test_sharded_over_two_processes(tiny_base_folder: Path, tmp_path: Path) -> None:
    from matrix.sharded import gradients_of_two

    torch.set_num_threads(1)  # the two processes are forked, and threads do not survive that
    for kind in KINDS:
        base = found(tiny_base_folder, kind)
        model = base_loader.load(base, ZeroConfig(stage=0), torch.float32)
        vectors = torch.randn(4, base.width, requires_grad=True)
        (expected,) = torch.autograd.grad(model([vectors], pack_targets([4], [ROWS])).sum(), [vectors])
        (by_two,) = gradients_of_two(tiny_base_folder, [vectors.detach()], [ROWS], tmp_path, kind)
        torch.testing.assert_close(by_two, expected, rtol=1e-4, atol=1e-5)


def test_a_merged_export_has_the_weights_that_are_meant(tiny_base_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = found(tiny_base_folder, "int8")
    loaded = prompt(base)
    merged = write_merged(loaded, base, "toy", tmp_path / "merged")
    assert merged.lines("toy:1", "folder")[1].startswith("its weights are those that the base stored in int8 means")
    text = base.tokenizer("one two three", return_tensors="pt")["input_ids"]
    expected = next_logits(base.load(torch.float32), loaded.vectors, text)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    rows = AutoTokenizer.from_pretrained(tmp_path / "merged")("one two three", return_tensors="pt")["input_ids"]
    assert rows.shape[1] == text.shape[1] + 4
    with torch.no_grad():
        torch.testing.assert_close(again(rows).logits[0, -1, : len(expected)], expected, rtol=1e-4, atol=1e-4)
