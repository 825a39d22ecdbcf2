"""Events on their way: who sends them learns how many of them the driver has on its disk."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
import ray
from hypothesis import given
from hypothesis import strategies as st

from ptuning.training.event_queue import EventBuffer, EventQueue, EventSender


@pytest.mark.fast
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 3), st.booleans())))
def test_who_is_told_that_all_is_recorded_had_everything_taken(actions: list[tuple[int, int, bool]]) -> None:
    """Two senders, and a driver that takes now and then and records what it took before."""
    pile, taken = EventBuffer(), []
    sent: list[tuple[int, list[Any]]] = []
    recorded = 0
    for sender, many, take in actions:
        events = [{"sender": sender, "number": len(sent), "part": part} for part in range(many)]
        arrived, known = pile.put(events)
        sent.append((arrived, events))
        assert known == recorded
        assert all(event in taken[:known] for until, earlier in sent if until <= known for event in earlier)
        if take:
            recorded = len(taken)
            taken += pile.take(recorded)
    assert taken + pile.take(0) == [event for _, events in sent for event in events]


@pytest.mark.usefixtures("local_ray")
def test_a_sender_learns_what_is_recorded_and_no_more() -> None:
    queue = EventQueue.remote()  # type: ignore[attr-defined]  # added by ray.remote
    post = EventSender(queue)

    def tell(number: int) -> float:
        told = time.monotonic()
        post.send({"number": number}, now=True)
        post.flush()
        return told

    first = tell(1)
    assert post.recorded_until() == -math.inf
    assert len(ray.get(queue.take.remote(0))) == 1
    second = tell(2)
    assert post.recorded_until() == -math.inf  # taken is not recorded
    assert len(ray.get(queue.take.remote(1))) == 1
    third = tell(3)
    assert first < post.recorded_until() <= second
    ray.get(queue.take.remote(3))
    fourth = tell(4)
    assert third < post.recorded_until() <= fourth
    ray.kill(queue)
