"""Lines where there is no terminal."""

from __future__ import annotations

import pytest

from ptuning import display
from ptuning.display import Display
from ptuning.training.messages import Event, Started, Stepped

pytestmark = pytest.mark.fast


def step(number: int) -> Event:
    return Stepped("toy", number, {"loss": 0.5, "tokens_per_second": 10.0})


def start(number: int) -> Event:
    return Started("toy", number, 9)


def test_what_is_told_again_after_a_restart_is_shown_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(display, "EVERY", 0.0)
    show = Display()
    # Killed after step 4 with a checkpoint of step 2: its events come again, then step 3 and 4 are repeated.
    for event in [start(0), step(1), step(2), step(3), step(4)]:
        show(event)
    show.say("warning: worker 1 was killed")
    for event in [step(1), step(2), start(2), step(3), step(4), step(5)]:
        show(event)
    said = capsys.readouterr().err.splitlines()
    first, again = said[: said.index("resumed at step 2 of 9")], said[said.index("resumed at step 2 of 9") + 1 :]
    assert [line.split()[1] for line in first[:-1]] == ["1/9", "2/9", "3/9", "4/9"]
    assert first[-1] == "warning: worker 1 was killed"
    assert [line.split()[1] for line in again] == ["3/9", "4/9", "5/9"]


def test_what_a_resumed_run_is_told_again_is_not_shown_before_it_begins(capsys: pytest.CaptureFixture[str]) -> None:
    show = Display()
    for event in [step(1), step(2), start(2), step(3)]:
        show(event)
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "resumed at step 2 of 9" and said[1].startswith("step 3/9") and len(said) == 2
