"""What one worker of a standing group does: the training loop, with commands from a dispatcher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ptuning.config import Experiment
from ptuning.training.dispatcher import DispatcherClient
from ptuning.training.loop import Pack
from ptuning.training.messages import Command, Source, StartRun, StopRun
from ptuning.training.worker import run_worker


def work_dispatched(config: dict[str, Any], count_slots: Callable[[Pack, Experiment], int]) -> None:
    """Train what a dispatcher orders. `config`: as in `training.worker.run_worker`; `events` is the actor with the dispatcher.
    `count_slots`: the slots of this group, the same on all workers."""
    experiment = Experiment.model_validate(config["experiment"])
    client = DispatcherClient(config["events"], config["group"])

    def connect(pack: Pack, heartbeat: Callable[[], None]) -> Source:
        pack.num_slots = count_slots(pack, experiment)
        if pack.workers.is_main:
            client.join(pack.num_slots)
            pack.has_news = client.has_news
        return commands_from(client, pack, heartbeat)

    run_worker(config, client, connect)


def commands_from(client: DispatcherClient, pack: Pack, heartbeat: Callable[[], None]) -> Source:
    """The dispatcher's commands, on all workers. When it says that there will be no more, what still trains leaves."""

    def source(free: int) -> Sequence[Command] | None:
        heartbeat()
        commands = pack.workers.broadcast(client.orders(wait=not pack.slots) if pack.workers.is_main else None)
        if commands is None:
            pack.slots.clear()
            return None
        return [_command(each) for each in commands]

    return source


def _command(fields: dict[str, Any]) -> Command:
    if "attach" in fields:
        wanted = fields["attach"]
        return StartRun(Experiment.model_validate(wanted["experiment"]), wanted["folder"], wanted.get("keep_best", False))
    return StopRun(fields["run"], fields["leave"])
