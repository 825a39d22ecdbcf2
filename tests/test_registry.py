"""The registry on a real MLflow: versions, references, the ledger of promotions, the gate; sqlite and a server over HTTP."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.racing import race
from test_soft_prompt import make
from test_tracking import free_port, migrated, new_database, server

from ptuning import storage
from ptuning.config import parse_experiment
from ptuning.errors import TrackingError, UserError
from ptuning.model import soft_prompt
from ptuning.model.base import find_base
from ptuning.registry.gate import GateError, promote
from ptuning.registry.promotions import Move, MovedMeanwhile, PromotionLog, State, delete
from ptuning.registry.publish import fetch, publish, retrieve
from ptuning.registry.registry import Reference, Registry, RegistryError, Version, check_name, parse_reference
from ptuning.settings.data import Template
from ptuning.settings.model import ModelConfig
from ptuning.tracking import client as tracking_client
from ptuning.training.run_setup import bring_parent, pin_parent

# MLflow 3.17 uses SQLAlchemy's noload, deprecated in 2.1 (store/tracking/sqlalchemy_store.py).
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A storage folder with an empty tracking store."""
    folder = tmp_path / "runs"
    folder.mkdir()
    new_database(folder)
    return folder


@pytest.fixture
def registry(store: Path) -> Registry:
    return Registry(tracking_client.default_uri(store))


@pytest.fixture(scope="module")
def http(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("server")
    shutil.copy(migrated(), folder / "server.db")
    with server(folder, free_port()) as uri:
        yield uri


def prompt(folder: Path, seed: int = 0, **card: Any) -> str:
    """A saved soft prompt of 4 vectors for the tiny base."""
    vectors = torch.randn(4, 32, generator=torch.Generator().manual_seed(seed)) * 0.1
    made = make(vectors, **{"metrics": {"test_accuracy": 0.5}, "data": {"test": "rows"}, **card})
    path = str(folder / f"prompt-{seed}-{random.getrandbits(32)}")
    made.save(path, layers=2, heads=4)
    return path


def put(registry: Registry, name: str, folder: str) -> Version:
    root = registry.uri.removeprefix("sqlite:///").replace("mlflow.db", "mlartifacts")
    return publish(registry, name, folder, None, None if registry.uri.startswith("http") else Path(root).as_uri())


def fill(registry: Registry, name: str, count: int) -> None:
    """Versions without content, for what only looks at numbers."""
    run = registry.create_run(name, "file:///tmp/none" if registry.uri.startswith("sqlite") else None, {})
    for number in range(count):
        registry.create(name, run, {"ptuning.base": "tiny", "ptuning.length": "4", "ptuning.value": str(number)})


@pytest.mark.fast
@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("sms-spam", Reference("sms-spam")),
        ("sms.spam:12", Reference("sms.spam", version=12)),
        ("a@champion", Reference("a", alias="champion")),
    ],
)
def test_references(text: str, reference: Reference) -> None:
    assert parse_reference(text) == reference and str(reference) == text


HOSTILE_NAMES = [
    "", ".", "..", "../x", "a/b", "/etc/passwd", "%2e%2e%2f", "..%5c", "a\\b", "a\0b", "a\n", "\u202eevil", "x" * 10_000, "a.",
    ".a", "-a", "ѕms", "a b", "a'b", "a\"; drop", "a~promotions",
]  # fmt: skip


@pytest.mark.fast
@pytest.mark.parametrize("name", HOSTILE_NAMES, ids=range(len(HOSTILE_NAMES)))
def test_path_tricks_in_names_are_a_sentence(name: str) -> None:
    with pytest.raises(RegistryError, match="is not a valid name; use at most 64 letters, digits"):
        check_name(name)
    with pytest.raises(RegistryError, match="is not a valid reference; write name, name:3 or name@champion"):
        parse_reference(name)


@pytest.mark.fast
@pytest.mark.parametrize("text", ["a:0", "a:-1", "a:x", "a@", "a@b c", "a:1@b", "a@champion/..", "a:9999999999"])
def test_what_is_no_reference(text: str) -> None:
    with pytest.raises(RegistryError):
        parse_reference(text)


def move(number: int, kind: Any, version: int, seen: int, request: str | None = None) -> Move:
    return Move(number, kind, version, seen, request or str(number), "me", 0, None)


requests = st.lists(
    st.tuples(st.sampled_from(["promote", "promote", "rollback", "delete"]), st.integers(1, 4), st.integers(0, 3)), max_size=30
)


@pytest.mark.fast
@given(requests)
def test_whatever_is_asked_a_ledger_stays_sound(asked: list[tuple[str, int, int]]) -> None:
    state, lasts = State("a"), [0]
    for number, (kind, version, late) in enumerate(asked, 1):
        seen = lasts[max(0, len(lasts) - 1 - late)]
        after = state.after(move(number, kind, version, seen))
        if kind != "delete" and late and seen != state.last:
            assert after == state, "a request that saw an older state must lose"
        assert after.champion not in after.deleted
        assert (after.champion is None) <= (state.champion is None), "a champion is replaced, never lost"
        assert after.after(move(number + 1, kind, version, seen, request=str(number))) in (
            after,
            state.after(move(number, kind, version, seen)),
        )
        if after.last != state.last:
            lasts.append(after.last)
        state = after


@pytest.mark.fast
def test_of_two_that_saw_the_same_one_wins() -> None:
    state = State("a").after(move(1, "promote", 1, 0))
    both = state.after(move(2, "promote", 2, 1)).after(move(3, "promote", 3, 1))
    assert (both.champion, both.earlier) == (2, (1,))
    # Even if the champion is the same again meanwhile: it is the number of the move that counts.
    again = both.after(move(4, "rollback", 1, 2)).after(move(5, "promote", 3, 1))
    assert (again.champion, again.earlier) == (1, ())


@pytest.mark.fast
def test_publish_find_and_retrieve(registry: Registry, tmp_path: Path) -> None:
    first = put(registry, "toy", prompt(tmp_path, 1))
    folder = prompt(tmp_path, 2, parent="d" * 64)
    second = put(registry, "toy", folder)
    assert (str(first), str(second)) == ("toy:1", "toy:2")
    assert str(put(registry, "toy", folder)) == "toy:2", "the same again is the same version"
    found = registry.find("toy")
    assert found == second and found.tag("parent") == "d" * 64 and found.tag("state") == "new"
    assert (found.tag("metric"), found.number("value"), found.number("length")) == ("test_accuracy", 0.5, 4)
    loaded, files = retrieve(registry, found)
    assert torch.equal(loaded.vectors, soft_prompt.load(folder).vectors)
    assert files == storage.read_folder(folder)
    assert [str(version) for version in registry.with_content(loaded.card.content_hash)] == ["toy:2"]
    fetch(registry, found, str(tmp_path / "copy"))
    for name in ("adapter_config.json", "adapter_model.safetensors", "card.json", "manifest.json"):
        assert (tmp_path / "copy" / name).read_bytes() == (Path(folder) / name).read_bytes()
    with pytest.raises(UserError, match="exists already; choose a new or empty folder"):
        fetch(registry, found, str(tmp_path / "copy"))


@pytest.mark.fast
def test_what_is_not_there(registry: Registry, tmp_path: Path) -> None:
    put(registry, "toy", prompt(tmp_path))
    with pytest.raises(RegistryError, match="other: no soft prompt of this name in sqlite"):
        registry.find("other")
    with pytest.raises(RegistryError, match="toy:7: does not exist; toy has the versions 1 and no alias, choose one"):
        registry.find("toy:7")
    with pytest.raises(RegistryError, match="toy@champion: does not exist"):
        registry.find("toy@champion")
    with pytest.raises(RegistryError, match="other: no soft prompt of this name"):
        PromotionLog(registry, "other").state()


@pytest.mark.fast
def test_looking_creates_nothing(tmp_path: Path) -> None:
    registry = Registry(tracking_client.default_uri(tmp_path / "none"))
    assert registry.versions() == [] and not (tmp_path / "none").exists()


@pytest.mark.fast
def test_a_changed_artifact_is_refused(registry: Registry, store: Path, tmp_path: Path) -> None:
    version = put(registry, "toy", prompt(tmp_path))
    [weights] = store.rglob("adapter_model.safetensors")
    kept = weights.read_bytes()
    weights.write_bytes(kept[:-1] + b"\0")
    with pytest.raises(RegistryError, match="toy:1: adapter_model.safetensors differs from its hash in manifest.json"):
        retrieve(registry, version)
    weights.unlink()
    (weights.parent / "adapter_model.bin").write_bytes(b"\x80\x02]q\x00.")
    with pytest.raises(RegistryError, match="toy:1: adapter_model.safetensors not found in file://.*; mount that folder again"):
        retrieve(registry, version)
    shutil.rmtree(weights.parent)
    shutil.copytree(prompt(tmp_path, 5), weights.parent)  # whole, and of the same name, but another one
    with pytest.raises(RegistryError, match="toy:1: the vectors in its run .* are not those that were published"):
        retrieve(registry, version)
    with weights.open("ab") as file:
        file.truncate((1 << 30) + 1)  # sparse
    with pytest.raises(RegistryError, match="has 1073741825 bytes, too many for a soft prompt"):
        retrieve(registry, version)


@pytest.mark.fast
def test_a_symlink_in_the_store_gives_nothing_away(registry: Registry, store: Path, tmp_path: Path) -> None:
    version = put(registry, "toy", prompt(tmp_path))
    secret = tmp_path / "secret"
    secret.write_text('{"password": "swordfish"}')
    [card] = store.rglob("card.json")
    card.unlink()
    card.symlink_to(secret)
    with pytest.raises(UserError) as refusal:
        retrieve(registry, version)
    assert "swordfish" not in str(refusal.value)


@pytest.mark.fast
def test_promote_rollback_and_delete(registry: Registry) -> None:
    fill(registry, "toy", 4)
    ledger = PromotionLog(registry, "toy")
    for version in (1, 3, 4):
        ledger.promote(version, ledger.state())
        assert registry.find("toy@champion").version == version
    with pytest.raises(RegistryError, match="toy:4: is the champion; promote another version first, then delete this one"):
        delete(registry, Reference("toy", 4))
    delete(registry, Reference("toy", 3))
    assert PromotionLog(registry, "toy").rollback().champion == 1, "a rollback skips what was deleted"
    assert registry.find("toy").version == 1
    with pytest.raises(RegistryError, match="toy: has no earlier champion to go back to; promote a version instead"):
        PromotionLog(registry, "toy").rollback()
    with pytest.raises(RegistryError, match="is not a single version; write toy:N"):
        delete(registry, Reference("toy"))
    with pytest.raises(RegistryError, match="toy:9: does not exist"):
        ledger.promote(9, ledger.state())
    assert [(entry.kind, entry.version) for entry in ledger.state().moves] == [
        ("promote", 1),
        ("promote", 3),
        ("promote", 4),
        ("delete", 3),
        ("rollback", 1),
    ]


@pytest.mark.fast
def test_a_promotion_that_saw_an_older_champion_changes_nothing(registry: Registry) -> None:
    fill(registry, "toy", 3)
    ledger = PromotionLog(registry, "toy")
    seen = ledger.state()
    ledger.promote(1, seen)
    with pytest.raises(MovedMeanwhile, match="toy: its champion has just changed from none to 1, so nothing was done"):
        ledger.promote(2, seen)
    ledger.promote(3, ledger.state())
    ledger.rollback()
    with pytest.raises(MovedMeanwhile):  # the champion is 1 as before, and yet it moved
        ledger.promote(2, State("toy", champion=1, last=1))
    assert registry.find("toy@champion").version == 1


@pytest.mark.fast
def test_a_promoter_that_dies_leaves_a_ledger_that_the_next_one_completes(registry: Registry) -> None:
    fill(registry, "toy", 3)
    ledger = PromotionLog(registry, "toy")
    ledger.promote(1, ledger.state())
    ledger._append("promote", 2, ledger.state().last, None)  # and dies before it writes the alias
    assert registry.find("toy@champion").version == 1
    assert ledger.state().champion == 2
    assert not promote(registry, Reference("toy", 2)).moved
    assert registry.find("toy@champion").version == 2


@pytest.mark.fast
def test_a_late_writer_of_the_alias_puts_it_right(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(registry, "toy", 2)
    late, quick = PromotionLog(registry, "toy"), PromotionLog(Registry(registry.uri), "toy")
    write = registry.client.set_registered_model_alias

    def after_another_promotion(*arguments: str) -> None:
        if quick.state().champion == 1:
            quick.promote(2, quick.state())
            assert quick.registry.find("toy@champion").version == 2
        write(*arguments)

    monkeypatch.setattr(registry.client, "set_registered_model_alias", after_another_promotion)
    assert late.promote(1, late.state()).champion == 2, "the promotion counted, and so did the one behind it"
    assert registry.find("toy@champion").version == 2


@pytest.mark.fast
def test_a_name_that_is_created_again_has_an_empty_ledger(registry: Registry) -> None:
    fill(registry, "toy", 1)
    ledger = PromotionLog(registry, "toy")
    ledger.promote(1, ledger.state())
    registry.client.delete_registered_model("toy")
    fill(registry, "toy", 1)
    assert ledger.state() == State("toy")


@pytest.mark.fast
def test_the_gate(registry: Registry, tmp_path: Path, tiny_base_folder: Path) -> None:
    base = find_base(ModelConfig(path=str(tiny_base_folder)))
    mine = {
        "base": str(tiny_base_folder),
        "base_fingerprint": base.fingerprint.parts(),
        "template": Template(input="Text: {text}\nKind:", target=" {label}", labels=("fruit", "tool")),
    }
    put(registry, "toy", prompt(tmp_path, 1, **mine))
    put(registry, "toy", prompt(tmp_path, 2, **mine, metrics={"test_accuracy": 0.48}))
    put(registry, "toy", prompt(tmp_path, 3, **mine, metrics={"test_accuracy": 0.495}))
    put(registry, "toy", prompt(tmp_path, 4, **mine, data={"test": "others"}))
    put(registry, "toy", prompt(tmp_path, 5, **mine | {"base_fingerprint": mine["base_fingerprint"] | {"weights": "e" * 64}}))
    huge = make(torch.full((4, 32), 3.39e38), **mine, metrics={"test_accuracy": 1.0}, data={"test": "rows"})
    huge.save(str(tmp_path / "huge"))
    put(registry, "toy", str(tmp_path / "huge"))
    assert promote(registry, Reference("toy", 1)).moved and registry.find("toy@champion").tag("state") == "passed"
    with pytest.raises(GateError, match=r"toy:2: its test accuracy 0.4800 is worse than the champion's 0.5000 .toy:1. by"):
        promote(registry, Reference("toy", 2))
    assert promote(registry, Reference("toy", 2), margin=0.03).previous == 1
    PromotionLog(registry, "toy").rollback()
    assert promote(registry, Reference("toy", 3)).moved
    with pytest.raises(GateError, match="it has no metric on the same rows as the champion toy:3; nothing was changed"):
        promote(registry, Reference("toy", 4))
    with pytest.raises(GateError, match="cannot be tested on its base .*weights eeee.*use the base it was made for"):
        promote(registry, Reference("toy", 5))
    with pytest.raises(GateError, match="its vectors are too large for float32, in which its base computes"):
        promote(registry, Reference("toy", 6))
    forced = promote(registry, Reference("toy", 4), force=True)
    assert forced.moved and registry.find("toy@champion").tag("state") == "forced"
    assert registry.find("toy@champion").tag("forced") == forced.findings[0]
    assert PromotionLog(registry, "toy").state().moves[-1].forced == forced.findings[0]


@pytest.mark.fast
def test_a_parent_from_the_registry_is_pinned_in_the_runs_folder(
    registry: Registry, store: Path, tmp_path: Path, toy_task: Any, tiny_base_folder: Path
) -> None:
    base = find_base(ModelConfig(path=str(tiny_base_folder)))
    own = {"base_fingerprint": base.fingerprint.parts()}
    put(registry, "toy", prompt(tmp_path, 1, **own))
    put(registry, "toy", prompt(tmp_path, 2, **own))
    put(registry, "foreign", prompt(tmp_path, 3))
    ledger = PromotionLog(registry, "toy")
    ledger.promote(1, ledger.state())
    toy_task.experiment["compute"]["storage"] = str(store)
    toy_task.experiment["prompt"] |= {"init": "soft-prompt", "init_from": "toy@champion"}
    written = parse_experiment(toy_task.experiment)
    pinned = pin_parent(written, str(tmp_path / "run"))
    assert pinned.prompt.init_from == str(tmp_path / "run" / "parent" / "toy@champion")
    bring_parent(written, pinned, base)
    parent = soft_prompt.load(str(pinned.prompt.init_from))
    assert parent.card.content_hash == registry.find("toy:1").tag("content_hash")
    ledger.promote(2, ledger.state())
    bring_parent(written, pinned, base)  # a resumed run keeps its parent
    assert soft_prompt.load(str(pinned.prompt.init_from)).card == parent.card
    toy_task.experiment["prompt"]["init_from"] = str(tmp_path)
    written = parse_experiment(toy_task.experiment)
    assert pin_parent(written, "run") == written
    for source, message in (
        ("nobody@champion", "nobody: no soft prompt of this name"),
        ("foreign:1", "foreign:1: was made for tiny .*use the base it was made for"),
    ):
        toy_task.experiment["prompt"]["init_from"] = source
        written = parse_experiment(toy_task.experiment)
        with pytest.raises(UserError, match=message):
            bring_parent(written, pin_parent(written, str(tmp_path / "run")), base)


RACES = int(os.environ.get("PTUNING_RACES", "3"))
"""How many double promotions. `make test-all` runs ten; PTUNING_RACES=200 runs as many (5 minutes on two cores)."""


def run_races(uri: str, tries: int) -> None:
    """Two processes promote at once, `tries` times: one of them wins every time, and the alias is always that of a winner."""
    registry, name = Registry(uri), f"race-{random.getrandbits(32)}"
    fill(registry, name, 2 * tries)
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2, timeout=120), context.Queue()
    both = [context.Process(target=race, args=(uri, name, version, tries, barrier, results)) for version in (1, 2)]
    for process in both:
        process.start()
    found, seen = [], []
    for _ in range(2 * tries):
        found.append(results.get(timeout=120))
        seen.append(int(registry.client.get_registered_model(name).aliases["champion"]))  # a third, who only looks
    for process in both:
        process.join()
    champions = []
    for attempt in range(tries):
        outcomes = {version: (won, alias) for number, version, won, alias in found if number == attempt}
        winners = [version for version, (won, _) in outcomes.items() if won]
        assert len(winners) == 1, f"try {attempt}: {outcomes}"
        champions.append(2 * attempt + winners[0])
        assert {alias for _, alias in outcomes.values()} == {champions[-1]}, f"try {attempt}: {outcomes}"
    assert set(seen) <= set(champions)
    ledger = PromotionLog(registry, name)
    state = ledger.state()
    assert (state.champion, state.earlier) == (champions[-1], tuple(champions[:-1]))
    for earlier in reversed(champions[-4:-1]):
        assert ledger.rollback().champion == registry.find(f"{name}@champion").version == earlier


@pytest.mark.slow
@pytest.mark.timeout(120 + 10 * RACES)
def test_two_promotions_at_once_leave_one_winner(registry: Registry) -> None:
    run_races(registry.uri, RACES)


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.timeout(120 + 10 * RACES)
def test_two_promotions_at_once_leave_one_winner_over_http(http: str) -> None:
    run_races(http, RACES)


@pytest.mark.slow
def test_everything_over_http(http: str, tmp_path: Path) -> None:
    registry = Registry(http)
    assert registry.versions("toy") == []
    folder = prompt(tmp_path, 1)
    first = put(registry, "toy", folder)
    put(registry, "toy", prompt(tmp_path, 2))
    assert retrieve(registry, first)[1] == storage.read_folder(folder)
    with pytest.raises(GateError, match="cannot be tested on its base"):
        promote(registry, Reference("toy", 1))
    promote(registry, Reference("toy", 1), force=True)
    assert "tiny" in str(registry.find("toy@champion").tag("forced"))
    promote(registry, Reference("toy", 2), force=True)
    assert PromotionLog(registry, "toy").rollback().champion == registry.find("toy").version == 1
    delete(registry, Reference("toy", 2))
    assert [version.version for version in registry.versions("toy")] == [1]
    with pytest.raises(RegistryError, match="is the champion"):
        delete(registry, Reference("toy", 1))


@pytest.mark.fast
def test_a_server_that_does_not_answer_is_a_sentence() -> None:
    with pytest.raises(TrackingError, match="MLflow .http://127.0.0.1:9. does not respond; is it running") as refusal:
        Registry("http://127.0.0.1:9").versions()
    assert "\n" not in str(refusal.value)
