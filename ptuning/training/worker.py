"""One training worker. Ray Train has set up its device and its process group."""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Callable
from typing import Any

import torch

from ptuning.config import Experiment
from ptuning.data.task import Task, load_task
from ptuning.errors import CannotRun, UserError
from ptuning.model.base import Base, find_base
from ptuning.training import base_loader
from ptuning.training.distributed import Workers
from ptuning.training.event_queue import EventSender
from ptuning.training.loop import Pack, train
from ptuning.training.messages import (
    Command,
    Event,
    Failed,
    Loaded,
    Loading,
    Source,
    StartRun,
    Stepped,
    Stuck,
    StuckReport,
    event_fields,
)
from ptuning.training.watchdog import Watchdog, worker_location

LOADING_S = 5.0
"""Seconds between heartbeats while a base is loaded."""


Connect = Callable[[Pack, Callable[[], None]], Source]
"""Given the pack and a heartbeat of the watchdog: the source of this worker's commands."""


def work(config: dict[str, Any]) -> None:
    """Train one soft prompt. `config`: as in `run_worker`, and the `folder` of the run."""
    start = StartRun(Experiment.model_validate(config["experiment"]), config["folder"])
    commands: list[list[Command]] = [[start]]
    run_worker(config, EventSender(config["events"]), lambda pack, heartbeat: lambda free: commands.pop() if commands else None)


def run_worker(config: dict[str, Any], sender: EventSender, connect: Connect) -> None:
    """Train soft prompts over one base; the first worker reports.

    `config` holds the experiment as plain tables, the actor that takes `events`, and the number of this group of workers if
    there are several.
    """
    experiment = Experiment.model_validate(config["experiment"])
    workers = Workers.current()
    torch.set_num_threads(config["threads"] or max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
    watchdog = _watchdog(experiment, config, workers.rank)

    def report(event: Event) -> None:
        if not isinstance(event, (Loading, Loaded)):  # afterwards progress is expected
            watchdog.heartbeat()
        if workers.is_main:
            sender.send(event_fields(event), now=not isinstance(event, Stepped))

    try:
        base = find_base(experiment.model)
        dtype = base.dtype(experiment.model.dtype)
        model = base_loader.load(
            base,
            experiment.zero,
            dtype,
            checkpoint_gradients=experiment.train.gradient_checkpointing,
            progress=_Progress(lambda share: report(Loading(experiment.name, 0, share))),
        )
        loaded = Loaded(
            experiment.name,
            0,
            dtype=str(dtype).removeprefix("torch."),
            shared_prefix=model.shared_prefix,
            shares=workers.all_gather(base_loader.sharding(model.base)),
            places=workers.all_gather(worker_location()),
            group=config.get("group", 0),
        )
        report(loaded)
        model.base.register_forward_pre_hook(lambda *_: watchdog.heartbeat())
        recorded_until = sender.recorded_until if workers.is_main else lambda: math.inf  # who reports has to remember
        pack = Pack(model, base, workers, _Tasks(base, watchdog.expect_idle), recorded_until=recorded_until)
        train(pack, connect(pack, watchdog.heartbeat), report)
    except UserError as error:  # the same on every worker: no restart would help
        report(Failed(experiment.name, 0, str(error)))
    except Exception as error:
        if not is_permanent(error):
            raise
        raise CannotRun(explain_permanent(experiment.model.path, error)) from error
    finally:
        watchdog.end()
        sender.flush()


def _watchdog(experiment: Experiment, config: dict[str, Any], rank: int) -> Watchdog:
    """This worker's watchdog; it sends its reports itself, from its own thread."""
    sender = EventSender(config["events"])

    def tell(report: StuckReport) -> None:
        event = Stuck(experiment.name, 0, group=config.get("group", 0), rank=rank, report=report)
        sender.send(event_fields(event), now=True)

    return Watchdog(tell, experiment.compute.hang_s)


_SAME_AGAIN = (ImportError, NotImplementedError, TypeError, AttributeError, LookupError)
_MISMATCH = re.compile(
    r"same dtype|dtype mismatch|shapes cannot be multiplied|size of tensor|must match|expanded size|inputs_embeds"
)


def is_permanent(error: Exception) -> bool:
    """Whether an error occurs again at every attempt: a missing package, an operation that an architecture lacks, or tensors
    that do not fit together. Other errors may come from a machine, its memory, its disk or the network."""
    if isinstance(error, _SAME_AGAIN) or (type(error) is ValueError):
        return True
    return type(error) is RuntimeError and bool(_MISMATCH.search(str(error)))


def explain_permanent(base: str, error: Exception) -> str:
    reason = next(iter(str(error).strip().splitlines()), "no message")[:200].rstrip(". ")
    what = "needs a package that is not installed on every node" if isinstance(error, ImportError) else "cannot be trained"
    fix = "install it" if isinstance(error, ImportError) else "choose another base, or report this"
    return f"model.path: {base} {what} ({type(error).__name__}: {reason}); {fix}"


class _Progress:
    """Passes a share on, now and then."""

    def __init__(self, tell: Callable[[float], None]) -> None:
        self._tell = tell
        self._told = time.monotonic()

    def __call__(self, share: float) -> None:
        if time.monotonic() - self._told > LOADING_S:
            self._told = time.monotonic()
            self._tell(share)


class _Tasks:
    """Tokenised rows, once for all trials that read the same."""

    def __init__(self, base: Base, rest: Callable[[], None]) -> None:
        self._base = base
        self._rest = rest
        self._known: dict[str, Task] = {}

    def __call__(self, experiment: Experiment) -> Task:
        self._rest()  # tokenising may take any time, and the other workers wait for the slowest
        room = None if experiment.data.max_tokens else experiment.prompt.length  # decides how many tokens a row may have
        key = json.dumps([room, experiment.data.model_dump(mode="json", exclude={"test"})])
        if experiment.data.test or key not in self._known:
            task = load_task(experiment, self._base)
            if experiment.data.test:
                return task
            self._known[key] = task
        return self._known[key]
