"""What people tell a search that runs: their words, the ledger, and a real search whose other trials notice nothing."""

from __future__ import annotations

import json
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from ptuning.cli.app import app
from ptuning.config import parse_experiment
from ptuning.errors import UserError
from ptuning.searching.interventions import Instructions, SearchFolder, clone_values, instruct, parse
from ptuning.searching.listener import Listener
from ptuning.searching.trial_store import TrialRecord, TrialStore
from ptuning.training.run_setup import write_run

RATE = "train.learning_rate"


def begun(storage: Path, tables: dict[str, Any], status: str = "running") -> TrialStore:
    """The folder of a search with two trials, as its driver leaves it: t000 runs, t001 has failed."""
    folder = storage / tables["name"]
    write_run(str(folder), parse_experiment(tables), status, kind="search")
    store = TrialStore(str(folder))
    for run, rate in (("t000", 0.1), ("t001", 0.2)):
        values = {"prompt.length": 4, "prompt.init": "random", RATE: rate}
        store.add(TrialRecord(run, run, values, str(folder / "trials" / run), step=10))
    store.entries["t000"].results = [{"step": 5, "values": {"accuracy": 0.5, "loss": 1.0}, "time_ms": 0}]
    store.entries["t001"].status, store.entries["t001"].message = "failed", f"{folder}/secret/place: is full; make room"
    store.flush()
    return store


def listening(storage: Path, tables: dict[str, Any], store: TrialStore, withdrawn: list[str]) -> Listener:
    """The driver's end."""
    return Listener(str(storage / tables["name"]), tables, store, withdrawn.append, print)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["stop"], "stop: the trial is missing; write stop t003"),
        (["stop", "t000", "t001"], "stop: takes one trial; leave t001 out"),
        (["extend"], "extend: give the number of further trials, such as extend +8"),
        (["extend", "-4"], "extend: give the number of further trials, such as extend +8"),
        (["clone", "t000", "train.lr=1"], "clone: 'train.lr' is not a searchable setting; did you mean train.clip?"),
        (["clone", "t000", f"{RATE}=auto"], "clone: train.learning_rate: 'auto' is not a number; give one, such as 0.1"),
        (["clone", "t000", "fast"], "clone: 'fast' is not a change; write key=value, such as train.learning_rate=0.1"),
        (["clone", f"{RATE}=1"], "clone: the trial is missing; write clone t003"),
    ],
)
def test_wrong_words_are_one_sentence(words: list[str], message: str) -> None:
    with pytest.raises(UserError) as refused:
        parse(words[0], words[1:])  # type: ignore[arg-type]
    assert str(refused.value).startswith(message)


@pytest.fixture
def tables(toy_task: SimpleNamespace) -> dict[str, Any]:
    found: dict[str, Any] = parse_experiment(
        toy_task.experiment | {"search": {"trials": 3, "length": [4], "init": ["random"]}}
    ).model_dump(mode="json")
    return found


@pytest.mark.fast
@pytest.mark.parametrize(
    ("changes", "warm", "message"),
    [
        ([f"{RATE}=0.1"], False, "clone: t000 has these settings; change at least one with key=value"),
        ([], False, "clone: t000 has these settings"),
        ([f"{RATE}=-1"], False, "clone: train.learning_rate: input should be greater than 0 or 'auto' (got -1)"),
        (["prompt.length=8"], True, "--warm: the checkpoint of t000 fixes prompt.length"),
    ],
)
def test_a_clone_that_is_none_is_refused(tables: dict[str, Any], changes: list[str], warm: bool, message: str) -> None:
    origin = TrialRecord("t000", "k", {"prompt.length": 4, "prompt.init": "random", RATE: 0.1}, "f")
    with pytest.raises(UserError) as refused:
        clone_values(tables, origin, parse("clone", ["t000", *changes], warm=warm))
    assert str(refused.value).startswith(message)


@pytest.mark.fast
def test_each_instruction_is_followed_once_and_recorded(tables: dict[str, Any], tmp_path: Path) -> None:
    """Also by the driver that comes after one that was killed between the ledger and the instruction."""
    folder = str(tmp_path)
    store = TrialStore(folder)
    store.add(TrialRecord("t000", "k", {"prompt.length": 4, "prompt.init": "random", RATE: 0.1}, str(tmp_path / "t000")))
    told = [
        parse("extend", ["+2"], by="ann"),
        parse("clone", ["t000", f"{RATE}=5"], by="bob"),
        parse("clone", ["t000", f"{RATE}=5"], by="bob"),
        parse("clone", ["t000", f"{RATE}=2"], warm=True),
        parse("stop", ["t000"], by="ann"),
        parse("stop", ["t000"]),
    ]
    withdrawn: list[str] = []
    for each in told:
        Instructions(folder).add(each)
    listener = Listener(folder, tables, store, withdrawn.append, print)
    listener.start()
    listener.stop()
    assert withdrawn == ["t000"] and not Instructions(folder).pending()
    Instructions(folder).add(told[0])
    again = TrialStore(folder)
    later = Listener(folder, tables, again, withdrawn.append, print)
    later.start()
    later.stop()
    assert [each.taken for each in again.interventions] == [True, True, False, False, True, False]
    assert again.added() == 3 and not Instructions(folder).pending()
    assert "has no checkpoint yet" in again.interventions[3].answer
    first, clone = again.trials()
    assert first.status == "stopped" and first.message == "stopped by ann" and clone.origin == "t000"
    assert clone.run == "t001" and clone.values == {**first.values, RATE: 5}
    again.complete = True
    Instructions(folder).add(parse("extend", ["+1"]))
    last = Listener(folder, tables, again, withdrawn.append, print)
    last.start()
    last.stop()
    assert again.interventions[-1].taken is False and "the finalists are trained" in again.interventions[-1].answer


@pytest.mark.fast
def test_an_instruction_that_cannot_be_recorded_is_taken_later(tables: dict[str, Any], tmp_path: Path) -> None:
    store, withdrawn = begun(tmp_path, tables), []
    SearchFolder(str(tmp_path / "toy")).tell(instruct("stop", trial="t000"))
    ledger = tmp_path / "toy" / "ledger.json"
    kept = ledger.read_bytes()
    ledger.unlink()
    (ledger / "in the way").mkdir(parents=True)
    listener = listening(tmp_path, tables, store, withdrawn)
    listener.start()
    listener.stop()
    assert store.entries["t000"].status == "running" and not store.interventions and not withdrawn
    shutil.rmtree(ledger)
    ledger.write_bytes(kept)
    again = listening(tmp_path, tables, store, withdrawn)
    again.start()
    again.stop()
    assert withdrawn == ["t000"] and TrialStore(str(tmp_path / "toy")).entries["t000"].status == "stopped"


@pytest.mark.fast
@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"action": "stop"}, "stop: the trial is missing"),
        ({"action": "stop", "trial": "t000", "changes": {RATE: 1}}, "stop: takes one trial, and nothing else"),
        ({"action": "stop", "trial": "t000", "more": 1}, "stop: takes one trial, and nothing else"),
        ({"action": "clone", "trial": "t000", "more": 1}, "clone: takes a trial and changes, and nothing else"),
        ({"action": "extend"}, "extend: takes the number of further trials, and nothing else"),
        ({"action": "extend", "more": 1, "trial": "t000"}, "extend: takes the number of further trials"),
        ({"action": "extend", "more": 1, "warm": True}, "--warm: is for clone"),
        (
            {"action": "clone", "trial": "t000", "changes": {"train.steps": 1}},
            "clone: 'train.steps' is not a searchable setting",
        ),
    ],
)
def test_what_does_not_belong_to_an_instruction_is_refused(told: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as refused:
        instruct(told.pop("action"), **told)
    assert str(refused.value).startswith(message)


@pytest.mark.fast
def test_a_finished_search_takes_no_instruction(tables: dict[str, Any], tmp_path: Path) -> None:
    begun(tmp_path, tables, "finished")
    with pytest.raises(UserError, match="the search is finished; start another one"):
        SearchFolder(str(tmp_path / "toy")).tell(instruct("extend", more=1))
    assert not SearchFolder(str(tmp_path / "toy")).pending()


@pytest.mark.fast
def test_no_search_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no search; give the name of one"):
        SearchFolder(str(tmp_path / "none"))
    done = CliRunner().invoke(app, ["search", "none", "stop", "t000", "--storage", str(tmp_path)])
    assert done.exit_code == 2 and "there is no search" in done.stderr


@pytest.mark.fast
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["none", "stop", "t000", "--resume"], "--resume: is nothing for stop"),
        (["none", "extend", "+1", "--register", "x"], "--register: is nothing for extend"),
        (["none.toml", "--warm"], "--warm: is for clone; leave it out"),
        (["none.toml", "--storage", "runs"], "--storage: is for stop, clone and extend; leave it out"),
    ],
)
def test_an_option_without_effect_is_refused(words: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["search", *words])
    assert done.exit_code == 2 and message in done.stderr


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.timeout(400)
def test_the_other_trials_of_a_search_notice_nothing(local_ray: Path, toy_task: SimpleNamespace) -> None:
    """One is stopped, one cloned, one cloned from its checkpoint, one more is tried: the others learn the same to the bit."""
    from ptuning.searching.run import run_search

    tables = toy_task.experiment
    tables["prompt"]["length"] = 4
    tables["train"] |= {"steps": 400, "evaluate_every": 50, "checkpoint_every": 50, "learning_rate": 0.05}
    tables["search"] = {
        "trials": 3,
        "slots": 2,
        "length": [4],
        "init": ["random"],
        "algorithm": "random",
        "scheduler": "fifo",
        "finalists": 1,
        "seeds": 1,
    }
    run_search(parse_experiment(tables))
    place = Path(tables["compute"]["storage"])
    calm = TrialStore(str(place / "toy")).entries
    tables["name"] = "disturbed"
    folder = str(place / "disturbed")
    said: list[Any] = []

    def disturb() -> None:
        until = time.monotonic() + 200
        while time.monotonic() < until and not (
            (place / "disturbed" / "ledger.json").exists() and TrialStore(folder).entries["t000"].step >= 100
        ):
            time.sleep(0.05)
        for words in (
            ["stop", "t001"],
            ["clone", "t000", f"{RATE}=0.5"],
            ["clone", "t000", f"{RATE}=0.01", "--warm"],
            ["extend", "+1"],
        ):
            done = CliRunner().invoke(app, ["search", "disturbed", *words, "--storage", str(place), "--json"])
            said.append((done.exit_code, done.stderr, done.stdout))

    thread = threading.Thread(target=disturb)
    thread.start()
    result = run_search(parse_experiment(tables))
    thread.join()
    assert [code for code, _, _ in said] == [0] * 4, said
    assert all(json.loads(out)["taken"] for _, _, out in said)
    store = TrialStore(folder)
    found = store.entries
    assert len(store.trials()) == 6 and [each.action for each in store.interventions] == ["stop", "clone", "clone", "extend"]
    assert found["t001"].status == "stopped" and found["t001"].step < 400
    assert Path(str(found["t001"].soft_prompt)).is_dir(), "its best soft prompt is kept"
    for run in ("t000", "t002"):
        one = next(each for each in calm.values() if each.values == found[run].values)
        assert [each["values"] for each in one.results] == [each["values"] for each in found[run].results]
    clones = [each for each in store.trials() if each.origin == "t000"]
    assert {each.values[RATE] for each in clones} == {0.5, 0.01}
    cold, warm = sorted(clones, key=lambda each: each.warm)
    assert [each["step"] for each in cold.results] == list(range(50, 401, 50))
    assert warm.warm and warm.results[0]["step"] > 50 and warm.status == "finished"
    assert "clone of t000" in str(result.leaderboard.rows)
