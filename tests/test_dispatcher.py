"""The dispatcher of a search, without Ray: who gets which slot, who hears what, and that nobody is lost or doubled."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptuning.searching.dispatcher import DispatcherActor, TrialDispatcher
from ptuning.training.dispatcher import Dispatcher

pytestmark = pytest.mark.fast


def experiment(length: int = 5) -> dict[str, Any]:
    return {"prompt": {"length": length}}


def enter(dispatcher: TrialDispatcher, trial: str, length: int = 5) -> str:
    dispatcher.register(trial, f"run-of-{trial}".replace("-", ""), f"folder/{trial}", [])
    run, folder = dispatcher.begin(trial)
    dispatcher.attach(trial, run, folder, experiment(length), {})
    return run


def event(kind: str, run: str, step: int = 0) -> dict[str, Any]:
    return {"kind": kind, "run": run, "step": step, "values": {}, "details": {}}


def attached(orders: list[dict[str, Any]] | None) -> list[str]:
    return [order["attach"]["run"] for order in orders or [] if "attach" in order]


def test_a_trial_waits_for_a_group_and_hears_its_results_once() -> None:
    dispatcher = TrialDispatcher()
    run = enter(dispatcher, "a")
    assert dispatcher.orders(0) == []
    dispatcher.register_group(0, 1)
    assert attached(dispatcher.orders(0)) == [run] and dispatcher.orders(0) == []
    dispatcher.put([event("step", run, 1), event("evaluation", run, 10), event("evaluation", run, 10)])
    assert [each["step"] for each in dispatcher.results("a")] == [10] and dispatcher.results("a") == []
    dispatcher.put([event("finished", run, 20)])
    assert [each["kind"] for each in dispatcher.results("a")] == ["finished"]
    assert dispatcher.release("a") == ""
    assert [each["kind"] for each in dispatcher.take(0)] == ["attached", "step", "evaluation", "evaluation", "finished"]


def test_a_slot_that_is_freed_is_refilled_in_the_same_orders() -> None:
    dispatcher = TrialDispatcher()
    dispatcher.register_group(0, 1)
    first, second = enter(dispatcher, "a"), enter(dispatcher, "b")
    dispatcher.orders(0)
    assert dispatcher.release("a") == "slot"
    orders = dispatcher.orders(0)
    assert orders is not None and orders[0] == {"run": first, "leave": "finish"} and attached(orders) == [second]


def test_a_trial_that_waits_can_be_released() -> None:
    dispatcher = TrialDispatcher()
    enter(dispatcher, "a")
    assert dispatcher.release("a") == "queue"
    dispatcher.register_group(0, 4)
    assert dispatcher.orders(0) == []


def test_a_trial_that_was_released_hears_so_and_can_end() -> None:
    dispatcher = TrialDispatcher()
    dispatcher.register_group(0, 1)
    enter(dispatcher, "a")
    assert not dispatcher.has_results("a")
    dispatcher.release("a")
    assert dispatcher.has_results("a")
    assert [each["kind"] for each in dispatcher.results("a")] == ["released"]


def test_what_is_known_from_before_comes_first_and_is_not_reported_again() -> None:
    dispatcher = TrialDispatcher()
    dispatcher.register_group(0, 1)
    dispatcher.register("a", "t0", "folder", [event("evaluation", "t0", 10)])
    run, folder = dispatcher.begin("a")
    dispatcher.attach("a", run, folder, experiment(), {})
    dispatcher.put([event("evaluation", run, 10), event("evaluation", run, 20)])
    assert [each["step"] for each in dispatcher.results("a")] == [10, 20]


def test_a_trial_that_comes_again_leaves_its_old_slot_without_a_trace() -> None:
    dispatcher = TrialDispatcher()
    dispatcher.register_group(0, 1)
    first = enter(dispatcher, "a")
    dispatcher.orders(0)
    dispatcher.put([event("evaluation", first, 20)])
    second, folder = dispatcher.begin("a")
    dispatcher.attach("a", second, folder, experiment(), {})
    assert second.partition("-")[0] == first and folder.startswith("folder/a/")
    orders = dispatcher.orders(0)
    assert orders is not None and orders[0] == {"run": first, "leave": "drop"} and attached(orders) == [second]
    dispatcher.put([event("finished", first, 20), event("evaluation", second, 10)])
    assert [(each["kind"], each["step"]) for each in dispatcher.results("a")] == [("evaluation", 10)]


def test_a_group_that_restarts_gets_its_trials_again() -> None:
    dispatcher = TrialDispatcher()
    dispatcher.register_group(0, 2)
    runs = [enter(dispatcher, "a"), enter(dispatcher, "b")]
    dispatcher.orders(0)
    dispatcher.put([event("failed", runs[0])])
    dispatcher.register_group(0, 2)
    assert attached(dispatcher.orders(0)) == runs[1:]


def test_who_was_killed_takes_nothing_from_who_follows() -> None:
    """A killed worker's question, and a stopped trial's, still wait in the actor for as long as others may wait."""

    async def story() -> None:
        actor = DispatcherActor.__ray_metadata__.modified_class()
        first = await actor.register_group(0, 1)
        run = enter(actor._dispatcher, "a")
        assert attached(await actor.orders(0, first)) == [run]
        killed, stopped = asyncio.create_task(actor.orders(0, first)), asyncio.create_task(actor.results("a", run))
        await asyncio.sleep(0.01)

        second = await actor.register_group(0, 1)
        await asyncio.sleep(0.01)
        assert await killed is None and attached(await actor.orders(0, second)) == [run]

        again, folder = await actor.begin("a")
        await actor.attach("a", again, folder, experiment(), {})
        await actor.put([event("evaluation", again, 10)])
        await asyncio.sleep(0.01)
        assert [each["kind"] for each in await stopped] == ["released"]
        assert [each["kind"] for each in await actor.results("a", again)] == ["evaluation"]

    asyncio.run(story())


def test_similar_lengths_go_together() -> None:
    dispatcher = TrialDispatcher()
    dispatcher.register_group(0, 2)
    dispatcher.register_group(1, 2)
    for trial, length in (("a", 100), ("b", 5), ("c", 6), ("d", 90)):
        enter(dispatcher, trial, length)
    lengths = [
        sorted(o["attach"]["experiment"]["prompt"]["length"] for o in dispatcher.orders(group) or []) for group in (0, 1)
    ]
    assert sorted(lengths) == [[5, 6], [90, 100]]


def test_a_closed_board_has_no_more_orders_and_a_broken_one_fails_its_trials() -> None:
    dispatcher = TrialDispatcher()
    dispatcher.register_group(0, 1)
    run = enter(dispatcher, "a")
    dispatcher.closed = True
    assert dispatcher.orders(0) is None
    dispatcher.broken = "the workers are gone"
    [failed] = dispatcher.results("a")
    assert run and failed["kind"] == "failed" and failed["details"]["message"] == "the workers are gone"


def enter_as(dispatcher: Dispatcher, owner: str, *runs: str) -> None:
    for run in runs:
        dispatcher.enter({"run": run, "owner": owner, "folder": run, "experiment": experiment()})


def test_owners_take_turns_and_have_a_quota() -> None:
    dispatcher = Dispatcher(slots_per_owner=2)
    enter_as(dispatcher, "a", "a1", "a2", "a3", "a4")
    enter_as(dispatcher, "b", "b1")
    dispatcher.register_group(0, 4)
    assert attached(dispatcher.orders(0)) == ["a1", "b1", "a2"], (
        "who has fewest comes first; a has two, and one place stays free"
    )
    enter_as(dispatcher, "c", "c1", "c2")
    assert attached(dispatcher.orders(0)) == ["c1"]
    dispatcher.put([event("finished", "a1")])
    assert attached(dispatcher.orders(0)) == ["a3"], "a has one, c has one, and a came first"
    dispatcher.put([event("finished", "b1")])
    assert attached(dispatcher.orders(0)) == ["c2"]


def test_a_run_that_asks_twice_has_one_slot() -> None:
    dispatcher = Dispatcher()
    enter_as(dispatcher, "a", "a1", "a1")
    dispatcher.register_group(0, 3)
    enter_as(dispatcher, "a", "a1")
    assert attached(dispatcher.orders(0)) == ["a1"] and not dispatcher.waiting()


def test_a_group_that_ends_gives_its_runs_back_and_one_may_train_alone() -> None:
    dispatcher = Dispatcher()
    dispatcher.register_group(0, 3)
    enter_as(dispatcher, "a", "a1", "a2", "a3", "a4")
    assert attached(dispatcher.orders(0)) == ["a1", "a2", "a3"]
    dispatcher.remove_group(0)
    assert dispatcher.waiting() == ["a1", "a2", "a3", "a4"] and dispatcher.training() == []
    first = dispatcher.register_group(0, 3)
    assert attached(dispatcher.orders(0)) == ["a1", "a2", "a3"]
    dispatcher.limit(1)
    assert dispatcher.training() == ["a1"] and dispatcher.waiting() == ["a4", "a2", "a3"]
    assert dispatcher.orders(0) == [{"run": "a2", "leave": "pause"}, {"run": "a3", "leave": "pause"}]
    assert dispatcher.register_group(0, 3) != first and attached(dispatcher.orders(0)) == ["a1"]
    dispatcher.limit(3)
    assert attached(dispatcher.orders(0)) == ["a4", "a2"]


class World:
    """A dispatcher, a worker that follows its orders, and trials that come, end and are stopped."""

    def __init__(self, places: int) -> None:
        self.dispatcher, self.places = TrialDispatcher(), places
        self.training: set[str] = set()
        self.alive: dict[str, str] = {}
        self.ended: set[str] = set()
        self.restart(0)

    def restart(self, pick: int) -> None:
        self.training.clear()
        self.dispatcher.register_group(0, self.places)

    def new(self, pick: int) -> None:
        trial = f"t{len(self.alive) + len(self.ended)}x{pick}"
        if trial not in self.alive:
            self.alive[trial] = enter(self.dispatcher, trial)

    def poll(self, pick: int = 0) -> None:
        for order in self.dispatcher.orders(0) or []:
            if "attach" in order:
                run = order["attach"]["run"]
                assert run not in self.training and run not in self.ended
                self.training.add(run)
            else:
                self.training.discard(order["run"])
        assert len(self.training) <= self.places

    def finish(self, pick: int) -> None:
        if self.training:
            run = sorted(self.training)[pick % len(self.training)]
            self.training.remove(run)
            self.ended.add(run)
            self.dispatcher.put([event("finished", run)])

    def stop(self, pick: int) -> None:
        if self.alive:
            trial = sorted(self.alive)[pick % len(self.alive)]
            self.ended.add(self.alive.pop(trial))
            self.dispatcher.release(trial)


ACTIONS = ["new", "finish", "stop", "poll", "restart"]


@given(st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(0, 9)), max_size=60), st.integers(1, 4))
def test_no_trial_is_lost_or_doubled(actions: list[tuple[str, int]], places: int) -> None:
    """A worker that follows its orders trains at most `places`, and everybody who is not over gets a slot in the end."""
    world = World(places)
    for action, pick in actions:
        getattr(world, action)(pick)
    for _ in range(len(actions) + 1):
        world.poll()
        world.finish(0)
    assert all(run in world.ended for run in world.alive.values())
