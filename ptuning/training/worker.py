"""What one training worker does. Ray Train has set up its device and its process group."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch

from ptuning.config import Experiment, UserError
from ptuning.model.base import Base, find_base
from ptuning.searching.dispatcher import Line
from ptuning.searching.slot_count import count_slots
from ptuning.training import zero
from ptuning.training.distributed import Workers
from ptuning.training.event_queue import Post
from ptuning.training.loop import Pack, train
from ptuning.training.messages import Assignment, Detachment, Event, Order, Source, Task
from ptuning.training.run_setup import load_task
from ptuning.training.watchdog import Watchdog, here

LOADING_S = 5.0
"""Seconds between signs of life while a base is loaded."""


def work(config: dict[str, Any]) -> None:
    """Train soft prompts over one base; the first worker reports.

    `config` holds the experiment as plain tables, and either a mailbox and the folder of the one run to train, or the hub of a
    search and the number of this group of workers.
    """
    experiment = Experiment.model_validate(config["experiment"])
    workers = Workers.current()
    torch.set_num_threads(config["threads"] or max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
    line = Line(config["hub"], config["group"]) if "hub" in config else None
    post = line or Post(config["mailbox"])
    watchdog = _watchdog(experiment, config, workers.rank)

    def report(event: Event) -> None:
        if event.kind not in ("loading", "loaded"):  # afterwards progress is expected
            watchdog.beat()
        if workers.first:
            post.send(asdict(event), now=event.kind != "step")

    try:
        base = find_base(experiment.model)
        dtype = base.dtype(experiment.model.dtype)
        model = zero.load(
            base,
            experiment.zero,
            dtype,
            checkpoint_gradients=experiment.train.gradient_checkpointing,
            progress=_Progress(lambda share: report(Event("loading", experiment.name, 0, {"share": share}))),
        )
        loaded = {
            "shares": workers.gather(asdict(zero.sharding(model.base))),
            "dtype": str(dtype).removeprefix("torch."),
            "shared_prefix": model.shared_prefix,
            "workers": workers.size,
            "places": workers.gather(here()),
            "group": config.get("group", 0),
        }
        report(Event("loaded", experiment.name, 0, details=loaded))
        model.base.register_forward_pre_hook(lambda *_: watchdog.beat())
        recorded_until = post.recorded_until if workers.first else lambda: math.inf  # who reports has to remember
        pack = Pack(model, base, workers, _Tasks(base, watchdog.rest), recorded_until=recorded_until)
        if line:
            pack.places = count_slots(pack, experiment)
            if workers.first:
                line.join(pack.places)
                pack.ringing = line.ringing
            source = orders_from(line, pack, watchdog.beat)
        else:
            assignments: list[list[Order]] = [[Assignment(experiment, config["folder"])]]
            source = lambda free: assignments.pop() if assignments else None  # noqa: E731
        train(pack, source, report)
    except UserError as error:  # the same on every worker: no restart would help
        report(Event("failed", experiment.name, 0, details={"message": str(error)}))
    finally:
        watchdog.end()
        post.flush()


def _watchdog(experiment: Experiment, config: dict[str, Any], rank: int) -> Watchdog:
    """This worker's watchdog; its words go the way of all events, past the training thread."""
    post = Post(config["hub"] if "hub" in config else config["mailbox"])
    known = {"rank": rank, "group": config.get("group", 0)}

    def tell(words: dict[str, Any]) -> None:
        post.send(asdict(Event("stuck", experiment.name, 0, details=known | words)), now=True)

    return Watchdog(tell, experiment.compute.hang_s)


class _Progress:
    """Passes a share on, now and then."""

    def __init__(self, tell: Callable[[float], None]) -> None:
        self._tell = tell
        self._told = time.monotonic()

    def __call__(self, share: float) -> None:
        if time.monotonic() - self._told > LOADING_S:
            self._told = time.monotonic()
            self._tell(share)


def orders_from(line: Line, pack: Pack, beat: Callable[[], None]) -> Source:
    """The hub's orders, on all workers. The search is over when the hub says so: who still trains then leaves."""

    def source(free: int) -> Sequence[Order] | None:
        beat()
        orders = pack.workers.from_first(line.orders(wait=not pack.slots) if pack.workers.first else None)
        if orders is None:
            pack.slots.clear()
            return None
        return [_order(each) for each in orders]

    return source


def _order(fields: dict[str, Any]) -> Order:
    if "attach" in fields:
        wanted = fields["attach"]
        return Assignment(Experiment.model_validate(wanted["experiment"]), wanted["folder"])
    return Detachment(fields["run"], fields["keep"])


class _Tasks:
    """Tokenised rows, once for all trials that read the same."""

    def __init__(self, base: Base, rest: Callable[[], None]) -> None:
        self._base = base
        self._rest = rest
        self._known: dict[str, Task] = {}

    def __call__(self, experiment: Experiment) -> Task:
        self._rest()  # tokenising takes what it takes, and the other workers wait for the slowest
        room = None if experiment.data.max_tokens else experiment.prompt.length  # decides how many tokens a row may have
        key = json.dumps([room, experiment.data.model_dump(mode="json", exclude={"test"})])
        if experiment.data.test or key not in self._known:
            task = load_task(experiment, self._base)
            if experiment.data.test:
                return task
            self._known[key] = task
        return self._known[key]
