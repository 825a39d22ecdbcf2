"""What one training worker does. Ray Train has set up its device and its process group."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import Any

import torch

from ptuning import zero
from ptuning.base import find_base
from ptuning.config import Experiment, UserError
from ptuning.mailbox import Post
from ptuning.prepare import load_task
from ptuning.train import Assignment, Event, Pack, train
from ptuning.workers import Workers


def work(config: dict[str, Any]) -> None:
    """Train the experiment's soft prompt; the first worker reports to the mailbox.

    `config` holds the experiment as plain tables, the run's folder and the mailbox.
    """
    experiment = Experiment.model_validate(config["experiment"])
    workers = Workers.current()
    torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
    post = Post(config["mailbox"])

    def report(event: Event) -> None:
        if workers.first:
            post.send(asdict(event), now=event.kind != "step")

    try:
        base = find_base(experiment.model)
        dtype = base.dtype(experiment.model.dtype)
        model = zero.load(base, experiment.zero, dtype, checkpoint_gradients=experiment.train.gradient_checkpointing)
        loaded = {
            "shares": workers.gather(asdict(zero.sharding(model.base))),
            "dtype": str(dtype).removeprefix("torch."),
            "shared_prefix": model.shared_prefix,
            "workers": workers.size,
        }
        report(Event("loaded", experiment.name, 0, details=loaded))
        pack = Pack(model, base, workers, lambda experiment: load_task(experiment, base))
        assignments = iter([[Assignment(experiment, config["folder"])]])
        train(pack, lambda free: next(assignments, None), report)
    except UserError as error:  # the same on every worker: no restart would help
        report(Event("failed", experiment.name, 0, details={"message": str(error)}))
    finally:
        post.flush()
