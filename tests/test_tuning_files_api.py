"""/v1/files, by the stock client and without one: every call, every refusal, each key for itself, uploads that are attacks."""

from __future__ import annotations

import gzip
import http.client
import io
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import pytest
from jobs_world import ANN, BOB, client_of, served
from openai import OpenAI
from test_http_api import ADMIN, KEY

from ptuning.serving.auth import caller_of

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

ROWS = b"".join(json.dumps({"text": f"row {n}", "label": "fruit"}).encode() + b"\n" for n in range(10))
FORM = "multipart/form-data; boundary=xx"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path) -> Iterator[SimpleNamespace]:
    folder = tmp_path_factory.mktemp("files") / "runs"
    with served(folder, tiny_base_folder, tuning={"file_mb": 1, "files_mb_per_key": 3}) as world:
        yield world


@pytest.fixture
def client(world: SimpleNamespace) -> Iterator[OpenAI]:
    with client_of(world) as client:
        yield client
        for file in client.files.list():
            client.files.delete(file.id)
    assert not list((world.storage / "tuning" / "files").iterdir())


def upload(client: OpenAI, content: bytes = ROWS, name: str = "rows.jsonl", **more: Any) -> Any:
    return client.files.create(file=(name, content), **{"purpose": "fine-tune", **more})


def send(world: SimpleNamespace, body: bytes, key: str | None = ANN, **headers: str) -> tuple[int, dict[str, Any]]:
    connection = http.client.HTTPConnection("127.0.0.1", world.port, timeout=30)
    own = {"authorization": f"Bearer {key}"} if key else {}
    connection.request("POST", "/v1/files", body, {"content-type": FORM} | own | headers)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, json.loads(content)


def form(*parts: tuple[str, bytes], filename: str = "a.jsonl", end: bytes = b"--xx--\r\n") -> bytes:
    text = b""
    for name, value in parts:
        named = f'; filename="{filename}"' if name == "file" else ""
        text += f'--xx\r\ncontent-disposition: form-data; name="{name}"{named}\r\n\r\n'.encode() + value + b"\r\n"
    return text + end


def test_every_call_of_the_stock_client(client: OpenAI, tmp_path: Path) -> None:
    path = tmp_path / "reviews.jsonl"
    path.write_bytes(ROWS)
    made = client.files.create(file=path.open("rb"), purpose="fine-tune")
    assert (made.object, made.bytes, made.filename, made.purpose, made.status) == (
        "file", len(ROWS), "reviews.jsonl", "fine-tune", "processed",
    )  # fmt: skip
    assert made.id.startswith("file-") and made.expires_at is None and made.created_at > 1.7e9
    expiring = upload(client, b"anything", purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600})
    assert expiring.expires_at == expiring.created_at + 3600
    assert client.files.wait_for_processing(made.id).id == made.id
    assert client.files.retrieve(made.id) == made
    assert client.files.content(made.id).read() == ROWS
    assert {file.id for file in client.files.list()} == {made.id, expiring.id}
    assert [file.id for file in client.files.list(purpose="batch")] == [expiring.id]
    gone = client.files.delete(made.id)
    assert gone.deleted and gone.id == made.id
    for asked in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError) as told:
            asked(made.id)
        assert told.value.code == "not_found"


def test_pages(client: OpenAI) -> None:
    ids = [upload(client).id for _ in range(5)]
    newest = [file.id for file in client.files.list()]
    assert newest == ids[::-1]
    assert [file.id for file in client.files.list(limit=2)] == newest  # follows the pages
    first = client.files.list(limit=2)
    assert first.has_more and [file.id for file in first.data] == newest[:2]
    assert [file.id for file in client.files.list(after=newest[3])] == newest[4:]
    assert [file.id for file in client.files.list(order="asc")] == newest[::-1]
    for wrong in ({"limit": 0}, {"limit": 10001}, {"order": "up"}, {"after": "file-x"}, {"extra_query": {"colour": "red"}}):
        with pytest.raises(openai.BadRequestError) as told:
            client.files.list(**wrong)
        assert (
            told.value.param in (*wrong, "colour")
            and ";" in told.value.body["message"]
            or "must be" in told.value.body["message"]
        )


def test_each_key_sees_its_own_and_the_admin_all(world: SimpleNamespace, client: OpenAI) -> None:
    mine = upload(client)
    with client_of(world, BOB) as bob, client_of(world, ADMIN) as admin, client_of(world, KEY) as asker:
        assert not list(bob.files.list())
        for asked in (bob.files.retrieve, bob.files.content, bob.files.delete):
            with pytest.raises(openai.NotFoundError) as told:
                asked(mine.id)
            assert "there is no such file" in told.value.body["message"]
        assert admin.files.content(mine.id).read() == ROWS and [file.id for file in admin.files.list()] == [mine.id]
        own = upload(admin)
        assert [file.id for file in client.files.list()] == [mine.id]
        admin.files.delete(own.id)
        for call in (lambda: upload(asker), asker.files.list, lambda: asker.files.retrieve(mine.id)):
            with pytest.raises(openai.PermissionDeniedError, match="may ask but not tune; use one with the scope tuning"):
                call()
    with client_of(world, "wrong-key-0123456789") as nobody, pytest.raises(openai.AuthenticationError):
        nobody.files.list()


def test_who_owns_what_is_a_hash_that_names_no_key(world: SimpleNamespace, client: OpenAI) -> None:
    made = upload(client)
    record = (world.storage / "tuning" / "files" / made.id / "file.json").read_text(encoding="utf-8")
    caller = caller_of(f"Bearer {ANN}", world.service.keys)
    assert caller and len(caller.owner) == 16 and json.loads(record)["owner"] == caller.owner and ANN not in record
    assert caller.owner not in client.files.with_raw_response.retrieve(made.id).text


def test_the_fields_may_come_in_any_order(world: SimpleNamespace, client: OpenAI) -> None:
    for parts in ((("file", ROWS), ("purpose", b"fine-tune")), (("purpose", b"batch"), ("file", b"not json"))):
        status, made = send(world, form(*parts))
        assert status == 200 and made["purpose"] == dict(parts)["purpose"].decode()
    status, told = send(world, form(("file", b"{}\n[]"), ("purpose", b"fine-tune")))
    assert status == 400 and told["error"]["message"].startswith("line 1: is an empty object")


def test_a_line_that_is_wrong_is_named(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as told:
        upload(client, ROWS + b'{"text": {"a": 1}, "label": "x"}\n')
    assert told.value.body == {
        "message": "line 11: the field 'text' is an object, not a text; write it as text",
        "type": "invalid_request_error", "param": "file", "code": "invalid_file",
    }  # fmt: skip


BATCH, ANCHOR, LARGE = ("purpose", b"batch"), "expires_after[anchor]", "the file is larger than 1 MB"
SECONDS = "expires_after[seconds]"
BASE64 = b'--xx\r\ncontent-disposition: form-data; name="file"\r\ncontent-transfer-encoding: base64\r\n\r\neA==\r\n--xx--\r\n'

REFUSED: dict[str, tuple[bytes, dict[str, str], int, str]] = {
    "no form": (b"{}", {"content-type": "application/json"}, 415, "the body must be a form"),
    "no boundary": (b"", {"content-type": "multipart/form-data"}, 415, "the body must be a form"),
    "a long boundary": (b"", {"content-type": f"multipart/form-data; boundary={'x' * 71}"}, 415, "the body must be a form"),
    "compressed": (gzip.compress(b"0" * 10_000_000), {"content-encoding": "gzip"}, 415, "must not be compressed"),
    "compressed twice": (b"x", {"content-encoding": "deflate, br"}, 415, "must not be compressed"),
    "garbage": (bytes(range(256)) * 40, {}, 400, "the body is not a valid form"),
    "cut off": (form(BATCH, ("file", b"x"), end=b""), {}, 400, "the form is cut off"),
    "nothing": (b"", {}, 400, "the form is cut off"),
    "no file": (form(BATCH), {}, 400, "file: is missing"),
    "an empty file": (form(BATCH, ("file", b"")), {}, 400, "the file is empty"),
    "two files": (form(BATCH, ("file", b"x"), ("file", b"y")), {}, 400, "file: was sent twice"),
    "no purpose": (form(("file", b"x")), {}, 400, "purpose: is missing"),
    "another purpose": (form(("purpose", b"vision"), ("file", b"x")), {}, 400, "purpose: must be 'fine-tune' or 'batch'"),
    "another field": (form(BATCH, ("colour", b"red"), ("file", b"x")), {}, 400, "colour: is not supported"),
    "a long field": (form(("purpose", b"b" * 5000), ("file", b"x")), {}, 400, "a field of more than 1000 bytes"),
    "many fields": (form(*((f"f{n}", b"") for n in range(40))), {}, 400, "too many of them"),
    "an early end": (form(BATCH, (ANCHOR, b"created_at"), (SECONDS, b"9"), ("file", b"x")), {}, 400, "must be at least 3600"),
    "no anchor": (form(BATCH, (SECONDS, b"3600"), ("file", b"x")), {}, 400, "expires_after: needs both"),
    "too large": (form(BATCH, ("file", b"x" * (1 << 21))), {}, 413, LARGE),
    "a little too large": (form(BATCH, ("file", b"x" * ((1 << 20) + 1))), {}, 413, LARGE),
    "base64": (BASE64, {}, 400, "leave Content-Transfer-Encoding out"),
    "a long header": (b"--xx\r\nx: " + b"y" * 100_000 + b"\r\n\r\n", {}, 400, "the body is not a valid form"),
    "many headers": (b"--xx\r\n" + b"x: y\r\n" * 1000 + b"\r\n", {}, 400, "the body is not a valid form"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_attacks_are_refused_in_a_sentence(world: SimpleNamespace, client: OpenAI, name: str) -> None:
    body, headers, status, words = REFUSED[name]
    told = send(world, body, **headers)
    assert told[0] == status and words in told[1]["error"]["message"], told
    assert ";" in told[1]["error"]["message"] or "must be" in told[1]["error"]["message"]
    assert str(world.storage) not in str(told)


def test_chunked_bodies_have_the_same_limit(world: SimpleNamespace, client: OpenAI) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", world.port, timeout=30)
    blocks = io.BytesIO(form(("purpose", b"batch"), ("file", b"x" * (3 << 20))))
    headers = {"content-type": FORM, "authorization": f"Bearer {ANN}"}
    connection.request("POST", "/v1/files", blocks, headers, encode_chunked=True)
    answer = connection.getresponse()
    assert answer.status == 413 and b"the file is larger than 1 MB" in answer.read()
    connection.close()


def test_a_key_has_so_much_room(client: OpenAI) -> None:
    for _ in range(3):
        upload(client, b"x" * 1_000_000, purpose="batch")
    with pytest.raises(openai.APIStatusError) as told:
        upload(client, b"x" * 500_000, purpose="batch")
    assert told.value.status_code == 413 and "the files of this key would be larger than 3 MB" in told.value.body["message"]


def test_a_name_is_no_path(world: SimpleNamespace, client: OpenAI) -> None:
    for name in ("../../../evil.jsonl", "/etc/cron.d/evil", "..", "a\\..\\b"):
        upload(client, name=name)
    send(world, form(("purpose", b"batch"), ("file", b"x"), filename="../" * 50 + "evil"))
    assert {path.name for path in world.storage.rglob("*evil*")} == set()
    stored = {path.name for path in (world.storage / "tuning").rglob("*") if path.is_file()}
    assert stored == {"content.jsonl", "file.json"}


def test_pages_of_other_servers_send_no_files(world: SimpleNamespace, client: OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world.service, "keys", {})
    body, host = form(("purpose", b"batch"), ("file", b"x")), f"127.0.0.1:{world.port}"
    for origin, own in (
        ("https://evil.example", host),
        ("null", host),
        ("http://[", host),
        (f"http://evil.example:{world.port}", f"evil.example:{world.port}"),
    ):
        status, told = send(world, body, None, origin=origin, host=own)
        assert status == 403 and "web pages of other servers" in told["error"]["message"], origin
    status, made = send(world, body, None, origin=f"http://{host}")
    assert status == 200
    assert json.loads((world.storage / "tuning" / "files" / made["id"] / "file.json").read_text())["owner"] == "local"
    world_store = client_of(world)
    world_store.files.delete(made["id"])
    world_store.close()


def test_what_is_sent_back_is_not_run_by_a_browser(client: OpenAI) -> None:
    made = upload(client, b"<script>alert(1)</script>", purpose="batch", name="a.html")
    headers = client.files.with_raw_response.content(made.id).headers
    assert headers["content-type"] == "application/octet-stream" and headers["x-content-type-options"] == "nosniff"
    assert headers["content-disposition"] == "attachment" and headers["content-length"] == "25"


def test_a_full_disk_is_a_sentence(world: SimpleNamespace, client: OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Any, block: bytes) -> None:
        raise OSError(28, "No space left on device", str(world.storage))

    monkeypatch.setattr("ptuning.storage.FileWriter.write", full)
    with pytest.raises(openai.InternalServerError) as told:
        upload(client)
    assert told.value.status_code == 503 and str(world.storage) not in str(told.value.body)
