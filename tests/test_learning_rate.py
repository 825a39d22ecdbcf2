"""The automatic learning rate: in units of the base's embeddings."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.training import Run, experiment

from ptuning.model.base import Base, find_base
from ptuning.model.prompted_model import PromptedModel
from ptuning.settings.model import ModelConfig
from ptuning.settings.training import TrainConfig, ZeroConfig
from ptuning.training import base_loader
from ptuning.training.slot import embedding_size

pytestmark = pytest.mark.fast

WRITERS = ("embed_tokens.weight", "o_proj.weight", "down_proj.weight")
"""What writes into the residual stream of a Llama. All else reads it through a norm."""


def loaded(folder: Path) -> tuple[Base, PromptedModel]:
    base = find_base(ModelConfig(path=str(folder)))
    return base, base_loader.load(base, ZeroConfig(stage=0), torch.float32)


@pytest.fixture(scope="module")
def larger(tiny_base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same function with ten times the embeddings: its output is that of the norm before the (tied) head."""
    folder = tmp_path_factory.mktemp("larger") / "base"
    shutil.copytree(tiny_base_folder, folder)
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if name.endswith(WRITERS):
            tensors[name] = tensors[name] * 10
        if name == "model.norm.weight":
            tensors[name] = tensors[name] / 10
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize(("rate", "same"), [("auto", True), (0.1, False)])
def test_a_base_with_larger_embeddings_learns_the_same(
    toy_task: SimpleNamespace, tiny_base_folder: Path, larger: Path, tmp_path: Path, rate: object, same: bool
) -> None:
    """With a fixed learning rate it does not: its vectors move a tenth as far."""
    found = []
    for folder in (tiny_base_folder, larger):
        base, model = loaded(folder)
        task = experiment(
            toy_task, model__path=str(folder), train__learning_rate=rate, train__clip=0.0, train__steps=15, prompt__length=4
        )
        found.append(Run(model, base, tmp_path / folder.name)(task).result("toy").vectors)
    small, large = found
    # AdamW moves a number whose gradient is about 0 by its sign, which rounding decides: 0.0034 here.
    difference = float((large / 10 - small).norm() / small.norm())
    assert difference < 0.02 if same else difference > 0.1


def test_the_card_has_the_number(toy_task: SimpleNamespace, tiny_base_folder: Path, tmp_path: Path) -> None:
    base, model = loaded(tiny_base_folder)
    size = float(model.base.get_input_embeddings().weight.pow(2).mean(1).sqrt().median())
    for more, expected in (
        ({}, float(f"{0.8 * size:.1g}")),
        ({"train__learning_rate_multiplier": 2.0}, 2 * float(f"{0.8 * size:.1g}")),
        ({"train__learning_rate": 0.07, "train__learning_rate_multiplier": 2.0}, 0.14),
        ({"prompt__kind": "kv"}, 0.1),
    ):
        task = experiment(toy_task, **{"train__learning_rate": "auto", "train__steps": 1, "train__warmup": 0.0} | more)
        done = Run(model, base, tmp_path / str(expected))(task)
        card = done.result("toy").card.experiment
        assert card is not None and card["train"]["learning_rate"] == pytest.approx(expected)
        assert card["train"]["learning_rate_multiplier"] == 1.0, "a card can be trained again"
        assert done.of("step")[0].values["learning_rate"] == pytest.approx(expected)


def test_tokens_that_were_never_trained_do_not_count() -> None:
    rows = torch.full((5000, 4), 0.2)
    rows[4000:] = 1e-3
    assert embedding_size(lambda ids: rows[ids], len(rows)) == pytest.approx(0.2)
    assert TrainConfig().with_learning_rate(0.2).peak == 0.2 and TrainConfig().with_learning_rate(None).peak == 0.1
