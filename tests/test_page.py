"""The page at `/`: what is sent, where it is off, and what it asks for; `test_page_browser` looks at it."""

from __future__ import annotations

import http.client
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import pytest
from conftest import REPOSITORY
from openai import OpenAI
from test_http_api import ADMIN, KEY, chat, publish_soft_prompt, serving
from test_interventions import begun, listening

from ptuning.config import parse_experiment
from ptuning.searching.interventions import SearchFolder
from ptuning.serving import page_routes
from ptuning.serving.app import build_app
from ptuning.serving.page_routes import FOLDER, TYPES, files, is_shown
from ptuning.settings.running import ServeConfig

pytestmark = [
    # MLflow 3.17 uses SQLAlchemy's noload, deprecated in 2.1 (store/tracking/sqlalchemy_store.py).
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path) -> Iterator[SimpleNamespace]:
    with serving(tmp_path_factory.mktemp("page") / "runs", tiny_base_folder) as served:
        yield served


def fetch(world: SimpleNamespace, path: str, method: str = "GET") -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection(world.url.removeprefix("http://").removesuffix("/v1"), timeout=30)
    connection.request(method, path)
    response = connection.getresponse()
    return response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()


def admin(world: SimpleNamespace, key: str = ADMIN) -> OpenAI:
    return OpenAI(base_url=world.url, api_key=key, max_retries=0, timeout=60)


def test_the_page_needs_no_key_and_has_a_policy(world: SimpleNamespace) -> None:
    for path, kind in (("/", "text/html"), *((f"/page/{name}", TYPES[Path(name).suffix]) for name in files())):
        status, headers, body = fetch(world, path)
        assert status == 200 and headers["content-type"].startswith(kind) and body
        policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
        assert policy["default-src"] == "'none'" and policy["script-src"] == policy["connect-src"] == "'self'"
        assert "unsafe" not in headers["content-security-policy"] and headers["x-content-type-options"] == "nosniff"
    assert fetch(world, "/", "HEAD")[2] == b""


def test_the_page_follows_its_own_policy() -> None:
    """No script and no style inside of the HTML, nothing from another server, and no text that becomes HTML."""
    page = (FOLDER / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"<script(?![^>]*\bsrc=)|\bstyle=|\bon\w+=|<style", page)
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    for path in FOLDER.iterdir():
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text), path
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text), path
    assert len(list(FOLDER.iterdir())) == len(files())


@pytest.mark.parametrize(
    "name", ["../page_routes.py", "..%2fpage_routes.py", "%2e%2e%2fapp.py", "page.py", "", "index.html%00", "."]
)
def test_only_the_files_of_the_page_are_sent(world: SimpleNamespace, name: str) -> None:
    status, _, body = fetch(world, f"/page/{name}")
    assert status == 404 and b"no such route" in body


def test_the_page_is_off_on_open_addresses_without_keys(world: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    everywhere = ServeConfig(host="0.0.0.0")
    assert is_shown(ServeConfig(), {}) and is_shown(everywhere, {"0" * 64: "inference"}) and not is_shown(everywhere, {})
    for shown in (True, False):
        monkeypatch.setattr(page_routes, "is_shown", lambda limits, keys, shown=shown: shown)
        assert ("/" in {getattr(route, "path", "") for route in build_app(world.service).routes}) is shown


def test_the_package_contains_the_page() -> None:
    """The wheel is built of everything in the package that git knows."""
    assert not any(
        pattern in (REPOSITORY / ".gitignore").read_text().split() for pattern in ("*.js", "*.html", "*.css", "page/")
    )


def test_an_administrator_moves_the_champion(world: SimpleNamespace, tmp_path: Path) -> None:
    """Served at once; the checks are those of the command line; other keys may not."""
    with admin(world) as client, admin(world, KEY) as other:
        for what, body in (("promote", {"model": "fruits:2"}), ("rollback", {"model": "fruits"})):
            with pytest.raises(openai.PermissionDeniedError, match="not administrate"):
                other.post(f"/admin/{what}", body=body, cast_to=object)
        with pytest.raises(openai.BadRequestError, match="no metric on the same rows.*send force to promote it anyway"):
            client.post("/admin/promote", body={"model": "fruits:2"}, cast_to=object)
        assert chat(other).model == "fruits:1"
        moved: Any = client.post("/admin/promote", body={"model": "fruits:2", "force": True}, cast_to=object)
        assert moved["champion"] == "fruits:2" and "no metric on the same rows" in moved["findings"][0]
        assert chat(other).model == "fruits:2"
        back: Any = client.post("/admin/rollback", body={"model": "fruits"}, cast_to=object)
        assert back["champion"] == "fruits:1" and chat(other).model == "fruits:1"
        first: Any = client.post("/admin/promote", body={"model": "writer:1"}, cast_to=object)
        assert first == {"champion": "writer:1", "findings": []}
        for body, error, words in (
            ({"model": "fruits"}, openai.BadRequestError, "is not a single version; write fruits:3"),
            ({"model": "fruits:9"}, openai.NotFoundError, "no such model"),
            ({"model": "a b"}, openai.NotFoundError, "no such model|not a valid reference"),
            ({"model": "fruits:2", "by": "me"}, openai.BadRequestError, "by: is not supported"),
        ):
            with pytest.raises((error, openai.BadRequestError), match=words):
                client.post("/admin/promote", body=body, cast_to=object)


def test_an_administrator_tells_a_search(world: SimpleNamespace, toy_task: SimpleNamespace) -> None:
    """The trials with their curves; instructions go to the driver; nothing about this machine is told."""
    folder = Path(world.service.runs)
    tables = parse_experiment(toy_task.experiment | {"name": "found"}).model_dump(mode="json")
    store = begun(folder, tables)
    begun(folder, tables | {"name": "over"}, "finished")
    with admin(world) as client, admin(world, KEY) as other:
        for method in (other.get, other.post):
            with pytest.raises(openai.PermissionDeniedError, match="not administrate"):
                method("/admin/searches/found", cast_to=object)
        with pytest.raises(openai.PermissionDeniedError, match="not administrate"):
            other.get("/admin/searches", cast_to=object)
        listed: Any = client.get("/admin/searches", cast_to=object)
        assert [(each["name"], each["status"]) for each in listed["data"]] == [("found", "interrupted"), ("over", "finished")]
        assert (
            listed["data"][0] | {"name": "found", "best": 0.5, "best_trial": "t000", "ended": 1, "trials": 2}
            == listed["data"][0]
        )

        def tell(name: str = "found", **body: Any) -> Any:
            return client.post(f"/admin/searches/{name}", body=body, cast_to=object)

        clone = tell(action="clone", trial="t000", changes={"train.learning_rate": 0.5})
        assert clone["taken"] is None and clone["by"].startswith("key ")
        warm = tell(action="clone", trial="t000", changes={"train.learning_rate": 0.3}, warm=True)
        tell(action="extend", more=2)
        tell(action="stop", trial="t000")
        withdrawn: list[str] = []
        listener = listening(folder, tables, store, withdrawn)
        listener.start()
        listener.stop()
        found: Any = client.get("/admin/searches/found", cast_to=object)
        assert withdrawn == ["t000"] and [each["taken"] for each in found["interventions"]] == [True, False, True, True]
        assert found["interventions"][1]["id"] == warm["id"] and found["interventions"][1]["answer"].startswith(
            "warm: t000 has no"
        )
        first, failed, added = found["data"]
        assert (first["status"], first["curve"], added["origin"]) == ("stopped", [[5, 0.5]], "t000")
        assert added["settings"]["train.learning_rate"] == 0.5 and failed["message"] == "place: is full; make room"
        assert str(folder) not in str(found) and "secret" not in str(found)
        for name, body, error, words in (
            ("found", {"action": "stop", "trial": "t000"}, openai.BadRequestError, "stop: t000 has ended already"),
            ("found", {"action": "stop", "trial": "t9"}, openai.BadRequestError, "'t9' is not a trial of this search"),
            ("found", {"action": "extend", "more": 1, "warm": True}, openai.BadRequestError, "^(?!.*--).*warm: is for clone"),
            ("found", {"action": "clone", "trial": "t001", "changes": {"train.lr": 1}}, openai.BadRequestError, "did you mean"),
            ("found", {"action": "kill", "trial": "t001"}, openai.BadRequestError, "action"),
            ("over", {"action": "extend", "more": 1}, openai.BadRequestError, "the search is finished"),
            ("none", {"action": "extend", "more": 1}, openai.NotFoundError, "there is no such search"),
            ("..", {"action": "extend", "more": 1}, openai.NotFoundError, "there is no such"),
            ("%2e%2e", {"action": "extend", "more": 1}, openai.NotFoundError, "there is no such"),
        ):
            with pytest.raises(error, match=words):
                tell(name, **body)
        assert not SearchFolder(str(folder / "over")).pending()


def test_an_administrator_sees_where_a_version_comes_from(world: SimpleNamespace, tmp_path: Path) -> None:
    """Card, lineage and nearest words, without a place of this machine."""
    publish_soft_prompt(world.registry, world.base, tmp_path / "scratch", "shown", 9, metrics={"test_accuracy": 0.5})
    with admin(world) as client, admin(world, KEY) as other:
        found: Any = client.get("/admin/prompts/shown:1", cast_to=object)
        assert (found["name"], found["version"], found["card"]["metrics"]) == ("shown", 1, {"test_accuracy": 0.5})
        assert len(found["nearest_words"]) == found["card"]["length"] and found["norms"]["mean"] > 0
        assert str(world.base.parent) not in str(found) and "@" not in str(found["promotions"])
        with pytest.raises(openai.NotFoundError, match="no soft prompt of this name"):
            client.get("/admin/prompts/absent", cast_to=object)
        with pytest.raises(openai.PermissionDeniedError):
            other.get("/admin/prompts/shown:1", cast_to=object)
