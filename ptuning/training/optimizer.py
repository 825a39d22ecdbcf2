"""One optimiser for the soft prompts of all slots, which are rows of one tensor.

Every row has the learning rate, clipping and step number of its own soft prompt, and sums are over the rows of one soft prompt,
so its numbers do not depend on its neighbours. The number of operations does not depend on the number of soft prompts: a GPU
spends more time on starting such small ones than on computing them. AdamW gives on a CPU the bits of `torch.optim.AdamW`;
Adafactor gives what transformers' `Adafactor` gives, but for the order of sums.

Shapes: K soft prompts with P rows each, k of a block with N rows in all, H width of a row, which has all numbers of a virtual
token.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

Moments = dict[str, Tensor]
LARGEST = 3e38
"""A norm that nothing exceeds."""


class Trained(Protocol):
    """A soft prompt in training (`starts.Start`)."""

    vectors: Tensor
    """`[P, H]`, or `[P, ...]` of a key-value prefix; fp32."""
    optimizer: str
    weight_decay: float
    moments: Moments
    updates: int
    average: Tensor
    """As `vectors`."""
    average_decay: float
    frozen: int
    """Leading rows that stay."""


class Rule(Protocol):
    """How moments and vectors change."""

    @staticmethod
    def empty(vectors: Tensor) -> Moments:
        """The moments of one soft prompt `[P, H]` before its first update."""

    @staticmethod
    def numbers(update: int, rate: float, decay: float) -> list[float]:
        """What update number `update` (from 1) of one soft prompt needs, with its learning rate and weight decay."""

    @staticmethod
    def update(vectors: Tensor, gradient: Tensor, moments: Moments, numbers: Tensor, rows: Rows) -> None:
        """Change vectors and moments in place. `numbers` [n, K]."""


class Rows:
    """Which of K soft prompts each of N rows belongs to."""

    def __init__(self, sizes: Sequence[int], device: torch.device) -> None:
        many = torch.tensor(sizes)
        self.ends = [0, *itertools.accumulate(sizes)]
        """The first row of each soft prompt, and N."""
        self.owner = torch.repeat_interleave(torch.arange(len(sizes)), many).to(device)
        self.sizes = many.float().to(device)

    def spread(self, values: Tensor) -> Tensor:
        """`[..., K]` -> `[..., N, 1]`."""
        return values.index_select(-1, self.owner)[..., None]

    def sum(self, values: Tensor) -> Tensor:
        """Sums over the rows of each soft prompt: `[N, ...]` -> `[K, ...]`."""
        zeros = values.new_zeros(len(self.sizes), *values.shape[1:])
        return zeros.index_add_(0, self.owner, values)


class AdamW:
    """Loshchilov and Hutter 2019, with torch's defaults."""

    BETAS = 0.9, 0.999
    EPS = 1e-8

    @staticmethod
    def empty(vectors: Tensor) -> Moments:
        return {"exp_avg": torch.zeros_like(vectors), "exp_avg_sq": torch.zeros_like(vectors)}

    @staticmethod
    def numbers(update: int, rate: float, decay: float) -> list[float]:
        first, second = (1 - beta**update for beta in AdamW.BETAS)
        return [1 - rate * decay, -(rate / first), second**0.5]

    @staticmethod
    def update(vectors: Tensor, gradient: Tensor, moments: Moments, numbers: Tensor, rows: Rows) -> None:
        keep, step, root = rows.spread(numbers)
        first, second = moments["exp_avg"], moments["exp_avg_sq"]
        vectors.mul_(keep)
        first.lerp_(gradient, 1 - AdamW.BETAS[0])
        second.mul_(AdamW.BETAS[1]).addcmul_(gradient, gradient, value=1 - AdamW.BETAS[1])
        size = (second.sqrt() / root).add_(AdamW.EPS)
        vectors.add_((first * step).div_(size))


class Adafactor:
    """Shazeer and Stern 2018 as in Lester et al. 2021, section 3: external learning rate, no scaling by the parameters, beta2
    decay 0.8."""

    DECAY, EPS, CLIP = -0.8, 1e-30, 1.0

    @staticmethod
    def empty(vectors: Tensor) -> Moments:
        return {"exp_avg_sq_row": vectors.new_zeros(len(vectors)), "exp_avg_sq_col": vectors.new_zeros(1, vectors.shape[1])}

    @staticmethod
    def numbers(update: int, rate: float, decay: float) -> list[float]:
        beta = 1.0 - math.pow(update, Adafactor.DECAY)
        return [beta, 1.0 - beta, rate, 1.0 - decay * rate]

    @staticmethod
    def update(vectors: Tensor, gradient: Tensor, moments: Moments, numbers: Tensor, rows: Rows) -> None:
        beta, rest, rate, keep = rows.spread(numbers)
        squares = gradient.square().add_(Adafactor.EPS)
        per_row, per_column = moments["exp_avg_sq_row"], moments["exp_avg_sq_col"]
        per_row.mul_(beta[:, 0]).add_(squares.mean(1) * rest[:, 0])
        columns = rows.sum(squares) / rows.sizes[:, None]
        per_column.mul_(numbers[0][:, None]).add_(columns * numbers[1][:, None])
        mean = rows.spread(rows.sum(per_row) / rows.sizes)[:, 0]
        factors = (per_row / mean).rsqrt_()[:, None], per_column.rsqrt().index_select(0, rows.owner)
        update = (factors[0] * factors[1]).mul_(gradient)
        size = (rows.sum(update.square().sum(1)) / (rows.sizes * vectors.shape[1])).sqrt_()
        update.div_(rows.spread((size / Adafactor.CLIP).clamp_(min=1.0))).mul_(rate)
        vectors.mul_(keep).sub_(update)


RULES: Mapping[str, type[Rule]] = {"adamw": AdamW, "adafactor": Adafactor}


class _Group:
    """The soft prompts of one rule in a block."""

    def __init__(self, name: str, starts: Sequence[Trained], device: torch.device) -> None:
        self.rule = RULES[name]
        self.members = [number for number, start in enumerate(starts) if start.optimizer == name]
        mine = [starts[number] for number in self.members]
        self.rows = Rows([len(start.vectors) for start in mine], device)
        self.index: Tensor | None = None
        """`[n]` the rows of its soft prompts among those of the block; None: all."""
        if len(mine) < len(starts):
            here = [torch.full((len(start.vectors),), start.optimizer == name) for start in starts]
            self.index = torch.cat(here).nonzero()[:, 0].to(device)
        self.moments = {}
        for key in mine[0].moments:
            self.moments[key] = torch.cat([start.moments[key] for start in mine])
            parts = self.moments[key].split([len(start.moments[key]) for start in mine])
            for start, part in zip(mine, parts, strict=True):
                start.moments[key] = part


class Block:
    """The starts whose rows have the same width: their vectors as one tensor, their moments and their averages. From then on
    those of each start are a part of it."""

    def __init__(self, everyone: Sequence[Trained], members: Sequence[int], device: torch.device) -> None:
        starts = [everyone[number] for number in members]
        self.starts = starts
        self.members = None if len(members) == len(everyone) else torch.tensor(members, device=device)
        """`[k]` its starts among all; None: all."""
        sizes = [len(start.vectors) for start in starts]
        self.vectors = torch.cat([start.vectors.flatten(1) for start in starts]).requires_grad_()
        """`[N, H]` fp32, what has the gradient."""
        self.averages = torch.cat([start.average.flatten(1) for start in starts])
        self.rows = Rows(sizes, device)
        stay = [begin + row for begin, start in zip(self.rows.ends, starts, strict=False) for row in range(start.frozen)]
        self.frozen = torch.tensor(stay, device=device) if stay else None
        """Rows that no gradient and no decay moves; None: none."""
        parts = self.vectors.detach().split(sizes), self.averages.split(sizes)
        for start, vectors, average in zip(starts, *parts, strict=True):
            shape = start.vectors.shape
            start.vectors, start.average = vectors.view(shape), average.view(shape)
        self._groups = [_Group(name, starts, device) for name in RULES if any(start.optimizer == name for start in starts)]

    def of(self, values: Tensor) -> Tensor:
        """Its part of `values` [K] of all starts."""
        return values if self.members is None else values.index_select(0, self.members)

    def numbers(self, updates: Sequence[int], rates: Sequence[float]) -> list[Tensor]:
        shares = [1 - decay_at(update, start.average_decay) for update, start in zip(updates, self.starts, strict=True)]
        tables = [torch.tensor([shares])]
        for group in self._groups:
            columns = [
                group.rule.numbers(updates[number], rates[number], self.starts[number].weight_decay) for number in group.members
            ]
            tables.append(torch.tensor(columns, dtype=torch.float64).t().float().contiguous())
        return tables

    def clipped(self, gradient: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
        if self.frozen is not None:
            gradient = gradient.index_fill(0, self.frozen, 0)
        norms = self.rows.sum(torch.linalg.vector_norm(gradient, dim=1).square_()).sqrt_()
        return gradient * self.rows.spread((limits / norms).clamp_(max=1.0)), norms

    def update(self, gradient: Tensor, numbers: Iterator[Tensor]) -> None:
        shares = next(numbers)
        vectors = self.vectors.detach()
        before = vectors.index_select(0, self.frozen) if self.frozen is not None else None
        for group in self._groups:
            table = next(numbers)
            if group.index is None:
                group.rule.update(vectors, gradient, group.moments, table, group.rows)
                continue
            part = vectors.index_select(0, group.index)
            group.rule.update(part, gradient.index_select(0, group.index), group.moments, table, group.rows)
            vectors.index_copy_(0, group.index, part)
        if before is not None and self.frozen is not None:
            vectors.index_copy_(0, self.frozen, before)  # weight decay
        self.averages.lerp_(vectors, self.rows.spread(shares[0]))


class Together:
    """The vectors of all starts, in one block for each width of their rows: soft prompts of one kind are one block.

    What a step gives and takes is a list with one tensor per block.
    """

    def __init__(self, starts: Sequence[Trained]) -> None:
        self.starts = list(starts)
        members: dict[int, list[int]] = {}
        for number, start in enumerate(starts):
            members.setdefault(start.vectors[0].numel(), []).append(number)
        device = starts[0].vectors.device
        self.blocks = [Block(starts, mine, device) for mine in members.values()]
        self._place = {number: (block, at) for block, mine in enumerate(members.values()) for at, number in enumerate(mine)}

    def soft_prompts(self, starts: Sequence[int]) -> list[Tensor]:
        """What the pass takes of some starts, ascending, with the gradient: neighbours of kind embedding as one tensor
        `[sum of P, H]`, each key-value prefix by itself."""
        found: list[tuple[int, int, int]] = []  # block, first and last row
        shapes: list[torch.Size] = []
        for number in starts:
            block, at = self._place[number]
            begin, end = self.blocks[block].rows.ends[at], self.blocks[block].rows.ends[at + 1]
            shape = self.starts[number].vectors.shape[1:]
            if found and len(shape) == 1 and (found[-1][0], found[-1][2]) == (block, begin) and shapes[-1] == shape:
                found[-1] = (block, found[-1][1], end)
            else:
                found.append((block, begin, end))
                shapes.append(shape)
        return [
            self.blocks[block].vectors[begin:end].unflatten(1, shape)
            if len(shape) > 1
            else self.blocks[block].vectors[begin:end]
            for (block, begin, end), shape in zip(found, shapes, strict=True)
        ]

    def numbers(self, updates: Sequence[int], rates: Sequence[float]) -> list[Tensor]:
        """What an update needs, by `updates` (from 1) and learning rates of all starts, on the CPU. For each block: the
        shares of the new vectors in the averages `[1, k]`, and `[n, k]` of each rule."""
        tables: list[Tensor] = []
        for number, block in enumerate(self.blocks):
            mine = [start for start in range(len(self.starts)) if self._place[start][0] == number]
            tables += block.numbers([updates[start] for start in mine], [rates[start] for start in mine])
        return tables

    def forget_gradients(self) -> None:
        for block in self.blocks:
            block.vectors.grad = None

    def gradients(self) -> list[Tensor]:
        """The gradients that the passes have left."""
        vectors = (block.vectors for block in self.blocks)
        return [each.grad if each.grad is not None else torch.zeros_like(each) for each in vectors]

    def unscaled(self, gradients: Sequence[Tensor], scales: Tensor) -> list[Tensor]:
        """The gradients divided by the scales `[K]` of their starts."""
        return [each / block.rows.spread(block.of(scales)) for block, each in zip(self.blocks, gradients, strict=True)]

    @torch.no_grad()
    def clipped(self, gradients: Sequence[Tensor], limits: Tensor) -> tuple[list[Tensor], Tensor]:
        """The gradients, where the norm over a start's rows is at most the start's of `limits` [K]; and the norms [K]
        before."""
        found = [block.clipped(each, block.of(limits)) for block, each in zip(self.blocks, gradients, strict=True)]
        if len(found) == 1:
            return [found[0][0]], found[0][1]
        norms = torch.empty_like(limits)
        for block, (_, own) in zip(self.blocks, found, strict=True):
            norms[block.members] = own
        return [each for each, _ in found], norms

    @torch.no_grad()
    def update(self, gradients: Sequence[Tensor], numbers: Sequence[Tensor]) -> None:
        """Move all vectors. `numbers`: as from `numbers`, on the device."""
        tables = iter(numbers)
        for block, each in zip(self.blocks, gradients, strict=True):
            block.update(each, tables)
        for start in self.starts:
            start.updates += 1


def decay_at(update: int, decay: float) -> float:
    """The decay of an average at update number `update` (from 1). It begins low, so that the initial vectors are forgotten."""
    return min(decay, (1 + update) / (10 + update))
