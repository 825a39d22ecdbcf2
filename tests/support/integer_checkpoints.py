"""Weights quantised and packed as GPTQ and AWQ store them, in numpy, and the weights that they then mean.

Layouts: AutoGPTQ 0.7 (`nn_modules/qlinear/qlinear_cuda.py`, `pack`), AutoAWQ 0.2 (`modules/linear/gemm.py`, `from_linear`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Integers = NDArray[np.int64]
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def words(numbers: Integers, bits: int) -> torch.Tensor:
    """Each row `[n]` as one long integer, its first number lowest, cut into int32 `[32 n / bits]`."""
    rows = []
    for row in numbers.tolist():
        whole = sum(number << (bits * at) for at, number in enumerate(row))
        rows.append([whole >> at & 0xFFFFFFFF for at in range(0, bits * len(row), 32)])
    return torch.from_numpy(np.array(rows, dtype=np.uint32).view(np.int32))


def packed(weight: torch.Tensor, settings: Mapping[str, Any], seed: int = 0) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The parts in which a weight `[O, I]` is stored, and the weight that they mean, fp32."""
    outputs, inputs = weight.shape
    bits, largest = settings["bits"], 2 ** settings["bits"] - 1
    size = settings["group_size"] if settings["group_size"] > 0 else inputs
    group = np.arange(inputs) // size
    if settings.get("desc_act"):
        group = np.random.default_rng(seed).permutation(group)
    values = weight.float().numpy()
    scales = np.empty((group.max() + 1, outputs), np.float16)
    zeros = np.empty(scales.shape, np.int64)
    for each in range(len(scales)):
        part = values[:, group == each]
        low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
        scales[each] = (high - low) / largest
        zeros[each] = np.clip(np.round(-low / scales[each]), 1, largest)
    numbers = np.clip(np.round(values / scales[group].T) + zeros[group].T, 0, largest).astype(np.int64)  # [O, I]
    meant = ((numbers - zeros[group].T) * scales[group].T.astype(np.float32)).astype(np.float32)
    parts = {"scales": torch.from_numpy(scales)}
    if settings["quant_method"] == "awq":
        order = np.arange(outputs).reshape(-1, 8)[:, AWQ_ORDER].flatten()
        parts |= {"qweight": words(numbers.T[:, order], 4), "qzeros": words(zeros[:, order], 4)}
    else:
        stored = zeros if settings.get("checkpoint_format") == "gptq_v2" else zeros - 1
        parts |= {"qweight": words(numbers, bits).t().contiguous(), "qzeros": words(stored, bits)}
    if settings.get("desc_act"):
        parts["g_idx"] = torch.from_numpy(group.astype(np.int32))
    return parts, torch.from_numpy(meant)
