"""One base on disk, what plain transformers makes of it, and how results are compared."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from matrix.bases import load_plain
from matrix.reference import STAND_INS, Reference
from matrix.shrink import END, VOCABULARY
from ptuning.model.base import Base, find_base
from ptuning.model.label_trie import LabelTrie
from ptuning.model.packing import Row
from ptuning.model.prompted_model import PromptedModel
from ptuning.settings.model import ModelConfig
from ptuning.settings.training import ZeroConfig
from ptuning.training import base_loader

LOSS, GRADIENT = 1e-4, 1e-3
"""Largest error of a token's loss, relative to the largest loss if that is above 1, and of a gradient, relative to its norm."""
LOGITS = 1e-3
"""Largest error of an exported base's logits, relative to their spread."""
NEW = 8
"""Tokens to generate."""
LABELS = LabelTrie(((40, END), (41, 42, END), (41, 43, END), (41, 42, 50, 60, END), (70, 71, END)))


class Wrong(Exception):
    """The numbers are not those of plain transformers, and nothing was said."""


@dataclass
class Subject:
    """One base on disk, and what plain transformers makes of it."""

    folder: Path
    work: Path
    """For what the checks write."""
    facts: dict[str, object] = field(default_factory=dict)

    @cached_property
    def base(self) -> Base:
        return find_base(ModelConfig(path=str(self.folder)))

    @cached_property
    def reference(self) -> Reference:
        return Reference(load_plain(self.folder))

    @cached_property
    def references(self) -> list[Reference]:
        """Bases that look up ids in their layers may use any stand-in for virtual tokens."""
        if self.reference.takes_vectors():
            return [self.reference]
        self.facts["ids"] = True
        return [Reference(self.reference.model, stand_in) for stand_in in STAND_INS]

    def trained(self) -> PromptedModel:
        """The base as training loads it."""
        model = base_loader.load(self.base, ZeroConfig(stage=0), torch.float32)
        self.facts["way"] = "fast" if model.shared_prefix else "slow"
        return model

    def soft_prompt(self, length: int, seed: int = 0) -> Tensor:
        """Vectors about as long as those of the base's tokens."""
        table = self.reference.embed(range(3, VOCABULARY // 2))
        generator = torch.Generator().manual_seed(100 * seed + length)
        return torch.randn(length, self.reference.width, generator=generator) * float(table.std())

    def against(self, check: Callable[[Reference], str]) -> None:
        """Raise unless one of the references agrees; `check` returns the difference."""
        differences = []
        for reference in self.references:
            difference = check(reference)
            if not difference:
                return
            differences.append(difference)
        raise Wrong(differences[0])


def ids(length: int, seed: int) -> list[int]:
    """A text of ordinary tokens."""
    generator = torch.Generator().manual_seed(seed)
    found: list[int] = torch.randint(4, VOCABULARY - 20, (length,), generator=generator).tolist()
    return found


def row(source: int, target: int, seed: int) -> Row:
    """A row of training: a text, and a target that ends."""
    return ids(source, seed), [*ids(target - 1, seed + 50), END]


def distance(mine: Tensor, theirs: Tensor) -> float:
    """The norm of the difference, relative to the norm."""
    norm = float(theirs.norm())
    return float((mine - theirs).norm()) / norm if norm else float(mine.norm())


def far(name: str, got: Tensor, expected: Tensor, tolerance: float, relative: bool = True) -> str:
    """Empty if two tensors agree, else the difference."""
    if got.shape != expected.shape:
        return f"{name}: shape {tuple(got.shape)} instead of {tuple(expected.shape)}"
    error = float((got.float() - expected.float()).abs().max()) if got.numel() else 0.0
    scale = max(1.0, float(expected.abs().max())) if relative and got.numel() else 1.0
    return "" if math.isfinite(error) and error <= tolerance * scale else f"{name} differs by {error / scale:.1e}"


def first_line(error: BaseException) -> str:
    """The type of an error and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:240]}"
