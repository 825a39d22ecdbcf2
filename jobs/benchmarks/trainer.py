"""Hugging Face's Trainer with PEFT's prompt tuning: an epoch of the same rows, ours and a plain loop beside it."""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from benchmarks.ideas import BATCH, as_they_come, batched, mixed_rows
from benchmarks.measuring import heading, line, settle, times_as_long
from benchmarks.steps import padded, peft_model, random_llama, random_vectors
from ptuning.model.packing import Row, pack_targets
from ptuning.model.prompted_model import PromptedModel

Epoch = Callable[[], float]
"""Seconds of an epoch: its steps with their batches, clipping and updates, without what stands before the first one."""
RATE = 0.001


class _Clock(TrainerCallback):
    """Times Trainer's steps."""

    def on_train_begin(self, *arguments: Any, **options: Any) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, *arguments: Any, **options: Any) -> None:
        settle()
        self.ended = time.perf_counter()


def trainer_epoch(model: nn.Module, rows: list[Row], sampling: str, device: str) -> Epoch:
    """Trainer at its best here: padding to the batch's longest row, nothing logged, saved or evaluated."""
    data = [{"input_ids": source + target, "row": (source, target)} for source, target in rows]

    def run() -> float:
        clock = _Clock()
        with tempfile.TemporaryDirectory() as folder:
            settings = TrainingArguments(
                folder,
                per_device_train_batch_size=BATCH,
                num_train_epochs=1,
                learning_rate=RATE,
                train_sampling_strategy=sampling,
                use_cpu=device == "cpu",
                logging_strategy="no",
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                remove_unused_columns=False,
                dataloader_pin_memory=False,
            )
            collate = lambda some: padded([one["row"] for one in some])  # noqa: E731
            runner = Trainer(model, settings, train_dataset=data, data_collator=collate, callbacks=[clock])
            runner.remove_callback(PrinterCallback)  # its words would stand between the table's lines
            runner.train()
        return clock.ended - clock.began

    return run


def loop_epoch(weight: Tensor, batches: list[list[Row]], loss: Callable[[list[Row]], Tensor]) -> Epoch:
    """The plain loop that Trainer replaces."""
    optimizer = torch.optim.AdamW([weight], lr=RATE, weight_decay=0.0)

    def run() -> float:
        began = time.perf_counter()
        for rows in batches:
            optimizer.zero_grad()
            loss(rows).backward()
            torch.nn.utils.clip_grad_norm_([weight], 1.0)
            optimizer.step()
            settle()
        return time.perf_counter() - began

    return run


def epochs(dtype: torch.dtype, device: str, length: int, rows: list[Row]) -> dict[str, Epoch]:
    """Each side on a base of its own: they change it, or its soft prompt."""
    ours, vectors = PromptedModel(random_llama(dtype, device=device)), random_vectors(length)
    soft_prompt = nn.Parameter(vectors.to(device, copy=True))
    model, weight = peft_model(random_llama(dtype, device=device), vectors)
    return {
        "ours": loop_epoch(soft_prompt, batched(rows), lambda some: ours([soft_prompt], pack_targets([length], [some])).mean()),
        "PEFT, plain loop": loop_epoch(weight, as_they_come(rows), lambda some: model(**padded(some, device)).loss),
        "PEFT, Trainer": trainer_epoch(model, rows, "random", device),
        "PEFT, Trainer, group_by_length": trainer_epoch(model, rows, "group_by_length", device),
    }


def trainer(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds per step of an epoch (rows of 8 to 128 tokens, 16 a step, P = 20) with Hugging Face's Trainer."""
    heading("dtype", "side", "seconds per step", "times ours", "95 %")
    found = []
    batches = 2 if arguments.quick else 4
    for name in arguments.dtypes:
        sides = epochs(getattr(torch, name), arguments.device, 20, mixed_rows(batches))
        for run in sides.values():
            run()
        times: dict[str, list[float]] = {side: [] for side in sides}
        for number in range(arguments.pairs):
            for side in list(sides)[:: -1 if number % 2 else 1]:
                times[side].append(sides[side]())
        for side, seconds in times.items():
            step, (ratio, low, high) = statistics.median(seconds) / batches, times_as_long(times["ours"], seconds)
            found.append({"dtype": name, "side": side, "step_s": step, "ratio": ratio, "ratio_95": [low, high]})
            line(name, side, f"{step:.3f}", f"**{ratio:.2f}**", f"{low:.2f} to {high:.2f}")
    return found
