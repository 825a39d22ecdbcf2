"""A registry that is too large to be read at a look, and a replica that serves it."""

from __future__ import annotations

import asyncio
import json
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import pytest
from benchmarks.prompts import NAME, copy_version
from openai import OpenAI
from test_http_api import KEY, Running, chat, damage, fill_empty, publish_soft_prompt, settings
from test_tracking import free_port, server

from ptuning.config import parse_experiment
from ptuning.registry import listing
from ptuning.registry.changes import LOG
from ptuning.registry.listing import Listing
from ptuning.registry.promotions import PromotionLog, delete
from ptuning.registry.registry import Registry, Version, parse_reference
from ptuning.serving import brought, served_models, status
from ptuning.serving.app import build_app
from ptuning.serving.auth import read_keys
from ptuning.serving.service import Service

pytestmark = [
    # MLflow 3.17 uses SQLAlchemy's noload, deprecated in 2.1 (store/tracking/sqlalchemy_store.py).
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

MANY = 250
TAGS = {"ptuning.content_hash": "c" * 64, "ptuning.card_hash": "d" * 64}


def shape(version: Version) -> tuple[str, str | None]:
    return str(version), version.tag("state")


def add(registry: Registry, name: str) -> Version:
    """A version without files."""
    return registry.create(name, registry.create_run(name, None, {}), TAGS)


def everything(known: Listing[Any]) -> set[str]:
    """Read all in the background, from the first name on."""
    changed: set[str] = set()
    known.whole, known._token = False, None
    while not known.whole:
        known._credit = 1.0
        changed |= known.survey()
    return changed


@pytest.fixture
def many(tmp_path: Path) -> Registry:
    """More names than a page."""
    registry = fill_empty(tmp_path / "runs")
    copy_version(tmp_path / "runs" / "mlflow.db", add(registry, "first"), MANY)
    return registry


def test_a_look_reads_what_has_changed(many: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """Published, promoted, tagged, deleted: found at the next look, in few calls, whatever else is there."""
    known = Listing(many, shape)
    known.look()
    assert not known.whole and len(known.names) <= listing.NAMES
    everything(known)
    assert len(known.names) == MANY + 1
    name, calls = NAME.format(MANY - 1), []
    for method in ("search_model_versions", "search_registered_models", "get_registered_model"):
        asked = getattr(many.client, method)

        def count(*arguments: Any, method: str = method, asked: Any = asked, **more: Any) -> Any:
            calls.append(method)
            return asked(*arguments, **more)

        monkeypatch.setattr(many.client, method, count)
    assert known.look() == set() and calls == ["search_model_versions"]
    add(many, name)
    calls.clear()
    assert known.look() == {name} and known.names[name].current == 1 and set(known.names[name].versions) == {1, 2}
    assert len(calls) == 4
    log = PromotionLog(many, name)
    log.promote(2, log.state())
    assert known.look() == {name} and known.names[name].current == 2
    many.tag(many.find(f"{name}:2"), {"ptuning.state": "passed"})
    assert known.look() == {name} and known.names[name].versions[2] == (f"{name}:2", "passed")
    delete(many, parse_reference(f"{name}:1"))
    assert known.look() == {name} and set(known.names[name].versions) == {2}
    assert known.look() == set()


def test_what_is_not_in_the_log_is_found_later(many: Registry) -> None:
    """By hand in MLflow: another champion, a name that is gone, a new version, and an older copy of the whole log."""
    known = Listing(many, shape)
    known.look()
    everything(known)
    moved, gone, new = (NAME.format(number) for number in (3, 150, 249))
    many.client.delete_registered_model_alias(moved, "champion")
    many.client.delete_registered_model(gone)
    many.client.create_model_version(new, "file:///x", many.find(new).run_id, tags={"ptuning.format": "1"})
    assert known.look() == set()
    assert everything(known) == {moved, gone, new}
    assert known.names[moved].champion is None and gone not in known.names and 2 in known.names[new].versions
    many.client.delete_registered_model(LOG)
    assert known.look() == set() and not known.whole
    add(many, "again")
    assert known.look() == {"again"}


def test_what_was_changed_last_is_found_soon(many: Registry) -> None:
    """Without reading through all names."""
    known = Listing(many, shape)
    known.look()
    everything(known)
    new = NAME.format(120)
    many.client.create_model_version(new, "file:///x", many.find(new).run_id, tags={"ptuning.format": "1"})
    known._credit, known._recent = 0.001, 0.0
    assert new in known.survey()


def test_a_small_registry_is_compared_at_each_look(tmp_path: Path) -> None:
    registry = fill_empty(tmp_path / "runs")
    for name in ("one", "two"):
        add(registry, name)
    known = Listing(registry, shape, only=["one", "three"])
    assert known.look() == {"one"} and known.whole and known.look() == set()
    registry.client.set_registered_model_alias("one", "champion", "1")
    assert known.look() == {"one"} and known.names["one"].champion == 1
    registry.client.delete_registered_model("one")
    assert known.look() == {"one"} and not known.names


@pytest.mark.slow
def test_the_log_of_changes_through_a_server(tmp_path: Path) -> None:
    with server(tmp_path, free_port()) as uri:
        registry = Registry(uri)
        known = Listing(registry, shape)
        known.look()
        add(registry, "toy")
        assert known.look() == {"toy"} and [change.name for change in registry.changes.after(0)] == ["toy"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path) -> Iterator[SimpleNamespace]:
    """A server over many names that are one soft prompt, and `zz`, which is another; 3 of them are checked at once."""
    storage = tmp_path_factory.mktemp("many") / "runs"
    registry, scratch = fill_empty(storage), storage.parent / "scratch"
    publish_soft_prompt(registry, tiny_base_folder, scratch, "first", 1)
    copy_version(storage / "mlflow.db", registry.find("first"), MANY)
    for seed in (2, 3):
        publish_soft_prompt(registry, tiny_base_folder, scratch, "zz", seed)
    (storage / "keys").write_text(f"{KEY}\n", encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(served_models, "AT_ONCE", 3)
        service = Service(parse_experiment(settings(storage, tiny_base_folder)), read_keys(str(storage / "keys")), "one")
        running = Running(build_app(service))
        yield SimpleNamespace(service=service, registry=registry, storage=storage, base=tiny_base_folder, url=running.url)
        running.stop()
        service.close()


@pytest.fixture
def client(world: SimpleNamespace) -> Iterator[OpenAI]:
    with OpenAI(base_url=world.url, api_key=KEY, max_retries=0, timeout=60) as client:
        yield client


def test_a_name_that_was_not_read_yet_is_answered(world: SimpleNamespace, client: OpenAI) -> None:
    """It is read when it is asked: its champion, or a version; a name that there is not is one sentence."""
    models = world.service.models
    assert not models.is_whole and len(models._brought) == 3
    assert "zz" not in models._known
    answer = chat(client, model="zz")
    assert answer.model == "zz:2" and chat(client, model="zz:1").model == "zz:1"
    assert client.models.retrieve(NAME.format(MANY - 1)).labels == ["fruit", "tool"]
    with pytest.raises(openai.NotFoundError, match="there is no such model"):
        chat(client, model="nobody")
    assert models._absent, "it is not looked up again at once"


def test_all_are_listed_and_only_some_are_in_memory(
    world: SimpleNamespace, client: OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = world.service.models
    everything(models._listing)
    models._update(list(models._listing.names), check=False)
    whole = client.models.list().data
    monkeypatch.setattr(status, "WHOLE", 10)
    monkeypatch.setattr(status, "PIECE", 7)
    asked = urllib.request.Request(f"{world.url}/models", headers={"authorization": f"Bearer {KEY}"})
    with urllib.request.urlopen(asked) as response:
        assert response.headers["transfer-encoding"] == "chunked"
        pieces = json.load(response)["data"]
    assert [each["id"] for each in pieces] == [each.id for each in whole]
    listed = {each.id: each for each in whole}
    assert len(whole) == len(listed) == 2 * (MANY + 1) + 3 + 1 and models.versions == MANY + 3
    cold = listed[NAME.format(180)]
    assert cold.soft_prompt == f"{cold.id}:1" and cold.length == listed["first"].length and cold.labels is None
    assert len(models._brought) < 12 and models.residency.used


def test_the_least_used_leave_with_their_cards(world: SimpleNamespace, client: OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    models = world.service.models
    monkeypatch.setattr(brought, "CARDS", 4)
    for number in range(20, 28):
        chat(client, model=NAME.format(number))
    assert [entry.name for entry in models._brought._entries] == [NAME.format(number) for number in range(24, 28)]
    assert world.service.engine.residents == 1, "all of them are one"
    assert chat(client, model="zz").model == "zz:2" and world.service.engine.residents == 2


def test_who_is_asked_first_brings_it_for_all(world: SimpleNamespace) -> None:
    models, name = world.service.models, NAME.format(77)
    loads, load = [], models.loader.load

    def counted(entry: Any) -> Any:
        loads.append(entry)
        time.sleep(0.2)
        return load(entry)

    async def ask() -> list[Any]:
        return await asyncio.gather(*(models.bring(name) for _ in range(2)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models.loader, "load", counted)
        one, other = asyncio.run(ask())
    assert one is other and len(loads) == 1


def test_what_was_not_checked_is_refused_when_it_is_asked(world: SimpleNamespace, client: OpenAI, tmp_path: Path) -> None:
    """A champion that fails leaves the previous one; a version that fails is a sentence."""
    models, registry = world.service.models, world.registry
    for seed in (4, 5):
        publish_soft_prompt(registry, world.base, tmp_path / "scratch", "late", seed)
    damage(registry, "late:2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(served_models, "AT_ONCE", 0)
        assert models.sync() and "late" in models._known and not models.refused
        assert chat(client, model="late:1").model == "late:1"
        with pytest.raises(openai.NotFoundError, match=r"adapter_model\.safetensors differs from its hash"):
            chat(client, model="late")
        with pytest.raises(openai.NotFoundError, match=r"adapter_model\.safetensors differs from its hash"):
            chat(client, model="late:2")
        assert set(models.refused) == {"late:2"}
        log = PromotionLog(registry, "late")
        log.promote(1, log.state())
        models.sync()
        assert chat(client, model="late").model == "late:1"
        log.promote(2, log.state())
        models.sync()
        assert chat(client, model="late").model == "late:1", "the name keeps its champion"


def test_a_start_knows_what_was_served_last(world: SimpleNamespace, tmp_path: Path) -> None:
    """At once with the registry, which is asked before a name is used; and without it, as far as the files are on disk."""
    world.service.models.save(now=True)
    again = Service(parse_experiment(settings(world.storage, world.base)), {}, "two")
    try:
        models = again.models
        assert not models.is_whole and models.versions == world.service.models.versions
        name = NAME.format(MANY - 2)
        assert not models._listing.names[name].read
        world.registry.client.delete_registered_model(name)
        with pytest.raises(served_models.UnknownModel):
            models.find(name)
        assert models.find(NAME.format(MANY - 3)).id and models._listing.names[NAME.format(MANY - 3)].read
    finally:
        again.close()
    tables = settings(world.storage, world.base) | {"tracking": {"uri": "http://127.0.0.1:9"}}  # nothing listens there
    alone = Service(parse_experiment(tables), {}, "three")
    try:
        assert alone.models.find("zz").id == "zz:2" and alone.models.find(NAME.format(30)).length
    finally:
        alone.close()


def test_the_benchmark_fills_the_tables_of_this_mlflow(many: Registry) -> None:
    """What it writes is what MLflow reads."""
    found = many.find(NAME.format(1))
    first = many.find("first")
    assert (found.tags, found.run_id) == (first.tags, first.run_id) and "champion" in found.aliases
