"""Checks of a merged export: its logits are those of base and soft prompt, in memory and after it was written and loaded again.

What plain transformers loads may differ from what was saved: weights that were tied in memory are filled with random numbers,
or an added bias is lost. So nothing gets its final name before it was loaded the way everyone will load it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from ptuning.errors import UserError

TOLERANCE = {torch.float32: 1e-4}
"""Maximum change of a logit, relative to the largest: scaling an embedding down and up again rounds."""
HALF = 1e-2
"""The same in 16 bits."""
OTHERWISE = "export the adapter instead"


class ExportError(UserError):
    """This soft prompt cannot be merged into its base."""


@contextmanager
def merging(name: str, kind: str) -> Iterator[None]:
    """Make one sentence of what the code of a base raises.

    Raises:
        ExportError: names the soft prompt, the class of the base, and the reason.
    """
    try:
        yield
    except (UserError, OSError, MemoryError):
        raise
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
        raise ExportError(f"{name}: cannot be merged into a {kind} ({reason}); {OTHERWISE}") from error


@torch.no_grad()
def last_logits(model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> Tensor:
    """Logits `[R, V]` of the token after each row of ids, fp32."""
    return torch.stack([model(input_ids=torch.tensor([row]), use_cache=False).logits[0, -1].float() for row in rows])


def check_logits(model: PreTrainedModel, ids: list[int], found: Tensor, expected: Tensor, name: str) -> None:
    """Check that the merged model, fed with ids (`found` `[R, V + P]`), gives the logits of base and soft prompt (`[R, V]`)."""
    real = torch.ones(found.shape[1], dtype=torch.bool)
    real[ids] = False
    real[expected.shape[1] :] = False
    if not _close(found[:, real], expected[:, real[: expected.shape[1]]], expected, model.dtype):
        raise ExportError(
            f"{name}: {type(model).__name__} treats ids and vectors differently and cannot be merged; {OTHERWISE}"
        )


def check_suppressed(model: PreTrainedModel, ids: list[int], found: Tensor, name: str) -> None:
    """Check that no virtual token is the most likely one by logits `[R, V + P]`."""
    if bool(torch.isin(found.argmax(1), torch.tensor(ids)).any()):
        raise ExportError(
            f"{name}: the head of {type(model).__name__} cannot keep its virtual tokens from being generated; {OTHERWISE}"
        )


def check_written(
    kind: Any,
    folder: Path,
    dtype: torch.dtype,
    rows: Sequence[Sequence[int]],
    found: Tensor,
    ids: list[int],
    name: str,
    trust: bool,
) -> None:
    """Load a written export with plain transformers (`kind` is the class), and compare its logits with those it had in memory.

    Raises:
        ExportError: weights are missing or left over, or logits differ.
    """
    disable_progress_bar()
    model, report = kind.from_pretrained(
        folder,
        dtype=dtype,
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=trust,
        output_loading_info=True,
    )
    model = model.eval()
    for part, words in (("missing", "misses"), ("unexpected", "does not use"), ("mismatched", "has other sizes of")):
        keys = [str(key[0] if isinstance(key, tuple) else key) for key in report[f"{part}_keys"]]
        if keys:
            which = ", ".join(sorted(keys)[:3])
            raise ExportError(f"{name}: {type(model).__name__} loaded again {words} {which}; {OTHERWISE}")
    real = torch.ones(found.shape[1], dtype=torch.bool)
    real[ids] = False
    again = last_logits(model, rows)
    if again.shape != found.shape or not _close(again, found, found[:, real], dtype):
        raise ExportError(f"{name}: {type(model).__name__} loaded again gives other logits; {OTHERWISE}")


def _close(found: Tensor, expected: Tensor, scale: Tensor, dtype: torch.dtype) -> bool:
    return bool((found - expected).abs().max() <= TOLERANCE.get(dtype, HALF) * scale.abs().max())
