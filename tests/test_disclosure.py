"""What whoever asks a server, reads what was written, or gets an export can learn: law 11, and SECURITY.md's table row by row.

What is written of passwords by whole commands is seen in `test_secrets`.
"""

from __future__ import annotations

import http.client
import io
import json
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import REPOSITORY
from test_http_api import ADMIN, GOOD, HOSTILE, KEY, TUNER, Running, publish_soft_prompt, serving
from typer.testing import CliRunner

from ptuning import storage
from ptuning.cli.app import app
from ptuning.cluster.job_package import build_package
from ptuning.cluster.jobs import Job
from ptuning.config import Experiment
from ptuning.errors import UserError, suggest
from ptuning.inference.types import EngineStopped
from ptuning.model import soft_prompt
from ptuning.model.soft_prompt import Card
from ptuning.registry.merged_export import export_merged
from ptuning.registry.publish import describe, fetch, publish, retrieve
from ptuning.registry.registry import Registry, RegistryError, Version
from ptuning.registry.vllm_export import export_for_vllm
from ptuning.serving import answers, neutral, protocol
from ptuning.serving.app import build_app
from ptuning.serving.served_models import ServedModels
from ptuning.tracking.client import default_artifact_root, default_uri
from ptuning.tracking.tracker import Tracker
from ptuning.training.run_setup import check_run_name, write_run

pytestmark = [
    # MLflow 3.17 uses SQLAlchemy's noload, deprecated in 2.1 (store/tracking/sqlalchemy_store.py).
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

SECRET = "hunter2hunter2"
URI = f"http://me:{SECRET}@127.0.0.1:9"
"""Nothing listens there."""
POSTS = ("/v1/chat/completions", "/v1/completions", "/v1/classify")


def written_experiment(storage: Path, base: Path) -> dict[str, Any]:
    """An experiment as cards of earlier versions hold it: all of it."""
    tables = {
        "name": "secretive",
        "model": {"path": str(base)},
        "data": {"train": str(storage / "private" / "train.jsonl"), "input": "{text}", "target": " {label}"},
        "tracking": {"uri": URI},
        "compute": {"storage": str(storage)},
    }
    return Experiment.model_validate(tables).model_dump(mode="json")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path) -> Iterator[SimpleNamespace]:
    """A server with a soft prompt `spam` whose card holds a whole experiment, and where two versions are refused."""
    with serving(tmp_path_factory.mktemp("disclosure") / "runs", tiny_base_folder) as served:
        scratch = served.storage.parent / "scratch"
        experiment = written_experiment(served.storage, served.base)
        publish_soft_prompt(served.registry, served.base, scratch, "spam", 11, experiment=experiment)
        served.service.models.sync()
        other = {"config": "0" * 64, "tokenizer": "0" * 64, "weights": "0" * 64}
        publish_soft_prompt(served.registry, served.base, scratch, "spam", 12, experiment=experiment, base_fingerprint=other)
        lost = served.registry.find(publish_soft_prompt(served.registry, served.base, scratch, "spam", 13))
        run = served.registry.client.get_run(lost.run_id)
        (Path(run.info.artifact_uri.removeprefix("file://")) / "soft_prompt" / "card.json").write_text("{}")
        served.service.models.sync()
        assert set(served.service.models.refused) == {"spam:2", "spam:3"}
        yield served


Answer = tuple[int, dict[str, str], bytes]


def ask(url: str, method: str, path: str, body: bytes = b"", key: str | None = KEY, **headers: str) -> Answer:
    """One request: status, headers, body."""
    connection = http.client.HTTPConnection(url.removeprefix("http://").removesuffix("/v1"), timeout=30)
    sent = {"content-type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
    if key:
        sent["authorization"] = f"Bearer {key}"
    try:
        connection.request(method, path, body, sent)
        response = connection.getresponse()
        return response.status, dict(response.getheaders()), response.read()
    finally:
        connection.close()


def body_for(path: str, model: str = "fruits") -> bytes:
    bodies: dict[str, Any] = {
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}]},
        "/v1/completions": {"prompt": "a"},
        "/v1/classify": {"input": "a"},
    }
    return json.dumps({"model": model, **bodies[path]}).encode()


# A mistyped name.


@pytest.mark.fast
@pytest.mark.parametrize(
    ("word", "end"),
    [
        ("Spam", "did you mean spam?"),
        ("openai/spam", "did you mean spam?"),
        ("Provider/Org/SPAM", "did you mean spam?"),
        ("sentimant", "did you mean sentiment?"),
        ("sentiment:99", "did you mean sentiment:1?"),
        ("Other", "did you mean Other?"),
        ("zzz", "see the list"),
    ],
)
def test_a_suggestion_is_a_name_and_nothing_that_stands_behind_it(word: str, end: str) -> None:
    class Secretive:
        def __str__(self) -> str:
            raise AssertionError("shown")

        __repr__ = __format__ = __str__  # type: ignore[assignment]

    known = {name: Secretive() for name in ("spam", "sentiment", "sentiment:1", "Other", "other")}
    assert suggest(word, known, "see the list") == end


@pytest.mark.parametrize(
    ("model", "meant"),
    [("frutis", "fruits"), ("openai/fruits", "fruits"), ("fruits:99", "fruits:2"), ("Spam", "spam"), ("zzzzzz", None)],
)
def test_an_unknown_model_is_one_sentence(world: SimpleNamespace, model: str, meant: str | None) -> None:
    answers = [ask(world.url, "POST", path, body_for(path, model)) for path in POSTS]
    answers.append(ask(world.url, "GET", f"/v1/models/{model}"))
    end = f"did you mean {meant}?" if meant else "/v1/models lists them all"
    for status, headers, content in answers:
        message = whole(status, headers, content, world)
        assert status == 404 and message.endswith(end) and json.loads(content)["error"]["code"] == "model_not_found"
    done = CliRunner().invoke(app, ["ask", model, "a", "--url", world.url], env={"PTUNING_API_KEY": KEY})
    assert done.exit_code == 2 and done.stderr == f"ptuning: {message}\n"


# Every refusal.


def whole(status: int, headers: dict[str, str], content: bytes, world: SimpleNamespace) -> str:
    """Check an error as a whole; returns its message."""
    error = json.loads(content)["error"]
    assert json.loads(content) == {"error": error} and list(error) == ["message", "type", "param", "code"]
    assert headers["content-type"] == "application/json"
    message = error["message"]
    assert isinstance(error["type"], str) and all(isinstance(error[key], str | None) for key in ("param", "code"))
    assert 10 < len(message) < 400 and message.isprintable() and ". " not in message, message
    check_public(f"{headers} {content.decode()}", world)
    return str(message)


OPENAI = {
    name
    for module in (protocol, answers)
    for shape in vars(module).values()
    if hasattr(shape, "model_fields")
    for name in shape.model_fields
} | {*neutral.CHAT, *neutral.RESPONSES}
SETTINGS = {
    f"{table}.{key}"
    for table, field in Experiment.model_fields.items()
    if hasattr(field.annotation, "model_fields")
    for key in field.annotation.model_fields
}
FIELDS = {key.partition(".")[2] for key in SETTINGS if "_" in key} - OPENAI
"""Fields that are no ordinary words, nor OpenAI's."""


def check_public(text: str, world: SimpleNamespace) -> None:
    """No secret, no path, no repr, no class, no setting."""
    assert not any(secret in text for secret in (SECRET, KEY, ADMIN))
    assert str(world.storage) not in text and str(world.base) not in text and "private" not in text
    assert not re.search(r"(?<![\w:.])~?/(?!v1/|openapi\.json)[\w.-]+/?[\w.-]*", text), "a path"
    assert not re.search(r"\w+://|sqlite|mlflow", text), "an address"
    assert not re.search(r"<[\w.]+ (object|at)|\b\w+\(\w+=|Traceback|File \"|\{'\w+': '/|\\n", text), "a repr"
    words = re.sub(r"\b(file|ftjob|batch)[-_]\w{24}\b", "", text)  # ids are random: some look like the name of a class
    assert not re.search(r"\b[A-Z][a-z]+[A-Z][a-z]\w*\b|\w+Error\b", words), "a class"
    words = set(re.findall(r"[a-z_]+(?:\.[a-z_]+)*", text))
    assert not words & (SETTINGS | FIELDS), "a setting"


def fails(text: str = f"/private/place {URI} Served(card=Card(...))") -> Callable[..., Any]:
    def fail(*arguments: Any, **more: Any) -> Any:
        raise RuntimeError(text)

    return fail


def stopped(*arguments: Any, **more: Any) -> Any:
    raise EngineStopped("the engine has stopped; restart it")


Case = Callable[[SimpleNamespace, pytest.MonkeyPatch], Answer]


def sent(method: str, path: str, body: bytes = b"", key: str | None = KEY, **headers: str) -> Case:
    return lambda world, patch: ask(world.url, method, path, body, key, **headers)


def while_(change: Callable[[SimpleNamespace, pytest.MonkeyPatch], None], case: Case) -> Case:
    def run(world: SimpleNamespace, patch: pytest.MonkeyPatch) -> Answer:
        change(world, patch)
        return case(world, patch)

    return run


def hurried(world: SimpleNamespace, patch: pytest.MonkeyPatch, path: str) -> Answer:
    """Asked where the time is over at once."""
    short = world.service.limits.model_copy(update={"deadline_s": 0.001})
    running = Running(build_app(SimpleNamespace(**vars(world.service) | {"limits": short, "alive": True})))
    try:
        with world.service.engine.paused():
            return ask(running.url, "POST", path, json.dumps({**json.loads(body_for(path, "raw")), "max_tokens": 90}).encode())
    finally:
        running.stop()


def forgetful(world: SimpleNamespace, patch: pytest.MonkeyPatch) -> None:
    """The registry is a server that does not answer, and whose address holds a password."""
    models = ServedModels(world.service.base, world.service.engine, Registry(URI), str(world.storage / "nowhere"))
    patch.setattr(world.service, "models", models)


def failing(place: str) -> Callable[[SimpleNamespace, pytest.MonkeyPatch], None]:
    def change(world: SimpleNamespace, patch: pytest.MonkeyPatch) -> None:
        owner, _, name = place.rpartition(".")
        patch.setattr(getattr(world.service, owner), name, fails())

    return change


def nameless(world: SimpleNamespace, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ServedModels, "listed", fails())


def garbled(world: SimpleNamespace, patch: pytest.MonkeyPatch) -> None:
    """Transformers ends a request with the text of an exception."""
    router = world.service.engine._generator._manager.output_router
    ended = router._ended

    def end(output: Any) -> None:
        output.error = f"RuntimeError: CUDA error in /private/place {URI}"
        ended(output)

    patch.setattr(router, "_ended", end)


def draining(world: SimpleNamespace, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(world.service, "draining", True)


def full(world: SimpleNamespace, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(type(world.service.engine), "full", True)


def halted(world: SimpleNamespace, patch: pytest.MonkeyPatch) -> None:
    for name in ("submit", "choose"):
        patch.setattr(world.service.engine, name, stopped)


def changed(**more: Any) -> bytes:
    return json.dumps({**json.loads(GOOD), **more}).encode()


CHAT = "/v1/chat/completions"
FORM = "multipart/form-data; boundary=xx"
FILE = {"id", "object", "bytes", "created_at", "expires_at", "filename", "purpose", "status", "status_details"}


def form(content: bytes, purpose: bytes = b"fine-tune") -> bytes:
    """An upload."""
    begin = b'--xx\r\ncontent-disposition: form-data; name="purpose"\r\n\r\n' + purpose + b"\r\n"
    file = b'--xx\r\ncontent-disposition: form-data; name="file"; filename="/private/a.jsonl"\r\n\r\n'
    return begin + file + content + b"\r\n--xx--\r\n"


def full_disk(world: SimpleNamespace, patch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        raise OSError(28, "No space left on device", str(world.storage))

    patch.setattr("ptuning.storage.FileWriter.write", fail)


def sent_form(body: bytes, key: str | None = TUNER, **headers: str) -> Case:
    return sent("POST", "/v1/files", body, key, **({"content_type": FORM} | headers))


OF_FILES: dict[str, tuple[int, Case]] = {
    "a file without a key": (401, sent_form(form(b"{}"), None)),
    "a file with a client's key": (403, sent_form(form(b"{}"), KEY)),
    "a file as JSON": (415, sent_form(b"{}", content_type="application/json")),
    "a file that is compressed": (415, sent_form(form(b"{}"), content_encoding="gzip")),
    "a file that is none": (400, sent_form(b"garbage")),
    "a file with a wrong line": (400, sent_form(form(b"{\n"))),
    "a file with a wrong field": (400, sent_form(form(b'{"colour": {}}'))),
    "a file of another purpose": (400, sent_form(form(b"x", b"vision"))),
    "a file on a full disk": (503, while_(full_disk, sent_form(form(b'{"a": "b"}')))),
    "a file while stopping": (503, while_(draining, sent_form(form(b"{}")))),
    "files in a wrong order": (400, sent("GET", "/v1/files?order=up", key=TUNER)),
    **{
        f"no such {path} {method}": (404, sent(method, f"/v1/{path}", key=TUNER))
        for path, method in (
            ("files/file-x", "GET"), ("files/file-x/content", "GET"), ("files/file-x", "DELETE"), ("files/%2e%2e%2fa", "GET"),
            ("batches/batch_x", "GET"), ("batches/batch_x/cancel", "POST"),
        )
    },
    "a batch with a client's key": (403, sent("POST", "/v1/batches", b"{}")),
    "a batch of nothing": (400, sent("POST", "/v1/batches", b"{}", TUNER)),
    "batches without a key": (401, sent("GET", "/v1/batches", key=None)),
}  # fmt: skip
"""Refusals of files and batches."""

REFUSALS: dict[str, tuple[int, Case]] = {
    **OF_FILES,
    **{f"{path} without a key": (401, sent("POST", path, body_for(path), key=None)) for path in POSTS},
    **{f"{path} with a wrong key": (401, sent("POST", path, body_for(path), key=f"{ADMIN}x")) for path in POSTS},
    **{f"{path} GET": (405, sent("GET", path)) for path in POSTS},
    **{f"{path} as text": (415, sent("POST", path, body_for(path), content_type="text/plain")) for path in POSTS},
    **{f"{path} too large": (413, sent("POST", path, body_for(path) + b" " * 70_000)) for path in POSTS},
    **{f"{path} stopping": (503, while_(draining, sent("POST", path, body_for(path)))) for path in POSTS},
    **{f"{path} stopped": (503, while_(halted, sent("POST", path, body_for(path)))) for path in POSTS},
    **{f"{path} full": (429, while_(full, sent("POST", path, body_for(path)))) for path in POSTS[:2]},
    **{f"{path} late": (408, lambda world, patch, path=path: hurried(world, patch, path)) for path in POSTS[1:2]},
    **{f"{path} broken": (500, while_(failing("models.find"), sent("POST", path, body_for(path)))) for path in POSTS},
    "engine broken": (
        500,
        while_(failing("engine.submit"), sent("POST", "/v1/completions", body_for("/v1/completions", "raw"))),
    ),
    "generation broken": (
        500,
        while_(garbled, sent("POST", "/v1/completions", body_for("/v1/completions", "raw"))),
    ),
    "labels broken": (500, while_(failing("engine.choose"), sent("POST", CHAT, GOOD))),
    "/v1/models without a key": (401, sent("GET", "/v1/models", key=None)),
    "/v1/models POST": (405, sent("POST", "/v1/models")),
    "/v1/models broken": (500, while_(nameless, sent("GET", "/v1/models"))),
    "/v1/models/NAME without a key": (401, sent("GET", "/v1/models/fruits", key=None)),
    "/v1/models/NAME unknown": (404, sent("GET", "/v1/models/nobody")),
    "/v1/models/NAME broken": (500, while_(failing("models.find"), sent("GET", "/v1/models/fruits"))),
    "/metrics without a key": (401, sent("GET", "/metrics", key=None)),
    "/metrics with a client's key": (403, sent("GET", "/metrics")),
    "/metrics broken": (500, while_(failing("metrics.collect"), sent("GET", "/metrics", key=ADMIN))),
    "reload without a key": (401, sent("POST", "/v1/admin/reload", key=None)),
    "reload with a client's key": (403, sent("POST", "/v1/admin/reload")),
    "reload GET": (405, sent("GET", "/v1/admin/reload", key=ADMIN)),
    "reload without a registry": (503, while_(forgetful, sent("POST", "/v1/admin/reload", key=ADMIN))),
    "reload broken": (500, while_(failing("models.sync"), sent("POST", "/v1/admin/reload", key=ADMIN))),
    "no such route": (404, sent("GET", "/nowhere/at/all")),
    "no such route under /v1": (404, sent("POST", "/v1/embeddings", GOOD)),
    "/livez POST": (405, sent("POST", "/livez")),
    "/readyz POST": (405, sent("POST", "/readyz")),
    "/openapi.json POST": (405, sent("POST", "/openapi.json")),
    **{f"body: {name}": (status, sent("POST", CHAT, body)) for name, (body, status) in HOSTILE.items() if status != 200},
    **{
        f"value: {name}": (400, sent("POST", CHAT, body))
        for name, body in {
            "text for a message": changed(messages=["a"]),
            "unknown parts": changed(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]),
            "a number for parts": changed(messages=[{"role": "user", "content": 5}]),
            "unknown role": changed(messages=[{"role": "tool", "content": "a"}]),
            "no user": changed(messages=[{"role": "assistant", "content": "a"}]),
            "stream options": changed(stream=True, stream_options=1),
            "stream options alone": changed(stream_options={"include_usage": True}),
            "format": changed(response_format={"type": "json_object"}),
            "too many tokens": changed(max_tokens=10**6),
            "too many answers": changed(n=17),
            "too long": changed(messages=[{"role": "user", "content": "the " * 300}]),
            "no labels": changed(model="writer", constrain=True),
            "other fields": changed(model="pair"),
            "no template": changed(model="tiny-llama"),
        }.items()
    },
    "labels where there are none": (400, sent("POST", "/v1/classify", body_for("/v1/classify", "writer"))),
    "many texts": (400, sent("POST", "/v1/classify", json.dumps({"model": "fruits", "input": ["a"] * 13}).encode())),
    "a number to classify": (400, sent("POST", "/v1/classify", json.dumps({"model": "fruits", "input": [5]}).encode())),
    "strange tokens": (400, sent("POST", "/v1/completions", json.dumps({"model": "raw", "prompt": [5, 10**6]}).encode())),
    "an object as a prompt": (400, sent("POST", "/v1/completions", json.dumps({"model": "raw", "prompt": {"a": 1}}).encode())),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_every_refusal_is_one_sentence_and_tells_nothing(
    world: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    expected, provoke = REFUSALS[case]
    status, headers, content = provoke(world, monkeypatch)
    assert status == expected, content
    whole(status, headers, content, world)


def test_every_status_is_among_the_refusals(world: SimpleNamespace) -> None:
    """What the description of the routes says, and what Starlette says by itself."""
    paths = world.app.openapi()["paths"].values()
    described = {int(code) for path in paths for route in path.values() for code in route["responses"]}
    assert {status for status, _ in REFUSALS.values()} == {code for code in described if code >= 400 and code != 422} | {405}


def test_an_error_in_a_stream_tells_nothing_either(world: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ptuning.serving.detokenizer.TextStream.push", fails())
    body = json.dumps({**json.loads(body_for("/v1/completions", "raw")), "stream": True}).encode()
    status, headers, content = ask(world.url, "POST", "/v1/completions", body)
    assert status == 200
    event = content.strip().split(b"\n\n")[-1].removeprefix(b"data: ")
    whole(500, headers | {"content-type": "application/json"}, event, world)


def test_who_looks_after_a_server_learns_numbers_only(world: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Health routes answer machines: fixed keys, no text."""
    assert ask(world.url, "GET", "/livez", key=None)[2] == b'{"alive":true}'
    ready = json.loads(ask(world.url, "GET", "/readyz", key=None)[2])
    assert ready == {
        "ready": True,
        "soft_prompts": world.service.models.versions,
        "refused": 2,
        "resident": world.service.engine.residents,
    }
    draining(world, monkeypatch)
    status, headers, content = ask(world.url, "GET", "/readyz", key=None)
    assert status == 503 and json.loads(content) == ready | {"ready": False}
    dead = SimpleNamespace(**vars(world.service) | {"alive": False})
    running = Running(build_app(dead))
    try:
        assert ask(running.url, "GET", "/livez", key=None)[::2] == (503, b'{"alive":false}')
    finally:
        running.stop()


def test_a_refused_version_says_why_and_not_where(world: SimpleNamespace, caplog: pytest.LogCaptureFixture) -> None:
    _, headers, content = ask(world.url, "POST", "/v1/admin/reload", key=ADMIN)
    refused = json.loads(content)["refused"]
    assert set(refused) == {"spam:2", "spam:3"}
    assert "made for tiny-llama" in refused["spam:2"] and "card.json" in refused["spam:3"]
    check_public(f"{headers} {refused}", world)
    assert all(len(reason) < 400 for reason in refused.values())


# What is given away.

CARD = {
    *("format", "name", "base", "revision", "base_fingerprint", "length", "width", "template", "max_new_tokens", "init"),
    *("metrics", "data", "experiment", "parent", "versions", "content_hash", "base_notes", "dtype", "training_pass", "kind"),
    "kv_shape",
}
"""The card. A field that is new is public only if it stands here, and in SECURITY.md."""
MADE = {
    "prompt": {"kind", "length", "init", "init_text", "frozen"},
    "train": {
        *("learning_rate", "optimizer", "weight_decay", "schedule", "warmup", "clip", "seed"),
        *("batch_size", "steps", "evaluate_every", "patience", "metric"),
        *("objective", "text_weight", "class_weights", "average_decay", "starts"),
    },
}
"""Of the experiment in it."""
MODEL = {
    "id",
    "object",
    "created",
    "owned_by",
    "max_model_len",
    "soft_prompt",
    "content_hash",
    "length",
    "labels",
    "template",
    "metrics",
}
"""What `/v1/models` says of each."""


def old_folder(world: SimpleNamespace, folder: Path, seed: int = 21) -> Path:
    """A soft prompt as earlier versions wrote it: a card that holds a password, under hashes that are right."""
    reference = publish_soft_prompt(world.registry, world.base, folder, f"source-{seed}", seed)
    path = folder / f"old-{seed}"
    fetch(world.registry, world.registry.find(reference), str(path))
    files = storage.read_folder(str(path))
    card = json.loads(files["card.json"]) | {"base": str(world.base)}
    card["experiment"] = written_experiment(world.storage, world.base)
    storage.write_folder(str(path), {**files, "card.json": json.dumps(card).encode()})
    return path


def publish_as_before(registry: Registry, name: str, folder: Path) -> Version:
    """As earlier versions published: the card as it is."""
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    run = registry.create_run(name, folder.parent.as_uri(), {})
    registry.upload(run, folder)
    return registry.create(name, run, describe(soft_prompt.load(str(folder)).card, files))


def written(*folders: Path) -> str:
    """Everything in the files below."""
    return "".join(path.read_text(errors="replace") for folder in folders for path in sorted(folder.rglob("*.json")))


def test_an_old_card_gives_no_password_on(world: SimpleNamespace, tmp_path: Path) -> None:
    old = old_folder(world, tmp_path)
    assert SECRET in written(old)
    version = publish_as_before(world.registry, "old", old)
    loaded, files = retrieve(world.registry, version)
    assert loaded.card.experiment and loaded.card.experiment["tracking"]["uri"] == "http://***@127.0.0.1:9"
    assert SECRET.encode() not in b"".join(files.values())
    assert world.service.models.sync()
    kept = [path for path in world.storage.rglob("served/**/card.json") if loaded.card.content_hash in str(path)]
    assert kept and SECRET not in "".join(path.read_text() for path in kept)
    again = publish(world.registry, "again", str(old), None, (tmp_path / "artifacts").as_uri())
    fetch(world.registry, version, str(tmp_path / "export"))
    assert again.version == 1 and SECRET not in written(tmp_path / "artifacts", tmp_path / "export")
    store = ["--storage", str(world.storage), "--json"]
    for command in (["show", "old"], ["list"], ["export", "old", str(tmp_path / "merged"), "--format", "merged"]):
        done = CliRunner().invoke(app, ["prompts", *command, *store])
        assert done.exit_code == 0 and SECRET not in done.output, done.output
    assert SECRET not in ask(world.url, "GET", "/v1/models/old")[2].decode()


def test_another_card_than_was_published_is_refused(world: SimpleNamespace, tmp_path: Path) -> None:
    """Cleaned only once it is known to be the one that was published; the folder's own hashes may be made to fit."""
    old = old_folder(world, tmp_path, 22)
    version = publish_as_before(world.registry, "changed", old)
    run = world.registry.client.get_run(version.run_id)
    there = str(Path(run.info.artifact_uri.removeprefix("file://")) / "soft_prompt")
    files = storage.read_folder(there)
    card = json.loads(files["card.json"]) | {"metrics": {"test_accuracy": 1.0}}
    storage.write_folder(there, {**files, "card.json": json.dumps(card).encode()})
    with pytest.raises(
        RegistryError, match="changed:1: the card in its run .* is not the one that was published; choose another version"
    ):
        retrieve(world.registry, version)


def test_a_run_goes_on_under_another_password(world: SimpleNamespace, tmp_path: Path) -> None:
    """Whether the record was written by an earlier version, with the password, or by this one."""
    tables = written_experiment(world.storage, world.base)
    record = {"kind": "train", "status": "failed", "experiment": tables, "summary": None}
    (tmp_path / "run.json").write_text(json.dumps(record))
    other = Experiment.model_validate(tables | {"tracking": {"uri": URI.replace(SECRET, "another")}})
    assert check_run_name(other, str(tmp_path), resume=True) is None
    write_run(str(tmp_path), other, "running")
    assert "another" not in (tmp_path / "run.json").read_text() and check_run_name(other, str(tmp_path), resume=True) is None
    changed = Experiment.model_validate(tables | {"train": tables["train"] | {"steps": 7}})
    with pytest.raises(UserError, match=r"cannot be resumed with another train\.steps"):
        check_run_name(changed, str(tmp_path), resume=True)


def exported(world: SimpleNamespace, folder: Path) -> dict[str, Any]:
    """The card and the config of an export, and the cards of a merged one and of one for vLLM."""
    version = world.registry.find("spam:1")
    fetch(world.registry, version, str(folder / "peft"))
    export_merged(world.registry, version, str(folder / "merged"))
    export_for_vllm(world.registry, [version], str(folder / "vllm"))
    return {path: json.loads((folder / path).read_text()) for path in ("peft/card.json", "peft/adapter_config.json")} | {
        "merged": json.loads((folder / "merged" / "soft_prompt_card.json").read_text()),
        "vllm": json.loads((folder / "vllm" / "soft_prompts.json").read_text())["spam"]["card"],
    }


def test_an_export_comes_back(world: SimpleNamespace, tmp_path: Path) -> None:
    """It names its base without the path: given, or known to the registry by its fingerprint; another base is refused."""
    exported(world, tmp_path)
    store = ["--storage", str(world.storage), "--name", "back"]
    source = str(tmp_path / "peft")
    for base in ([], ["--base", str(world.base)]):
        done = CliRunner().invoke(app, ["prompts", "import", source, *store, *base])
        assert done.exit_code == 0, done.output
    found = world.registry.find("back")
    assert found.version == 1 and found.tag("content_hash") == world.registry.find("spam:1").tag("content_hash")
    elsewhere = ["--storage", str(tmp_path / "empty"), "--name", "back"]
    done = CliRunner().invoke(app, ["prompts", "import", source, *elsewhere])
    assert done.exit_code == 2 and "name it with --base" in done.output
    done = CliRunner().invoke(app, ["prompts", "import", source, *elsewhere, "--base", "builtin"])
    assert done.exit_code == 2 and "made for width" in done.output


# SECURITY.md's table of readers.


def without_a_key(world: SimpleNamespace, folder: Path) -> None:
    for path, method in routes(world):
        status = ask(world.url, method, path, key=None)[0]
        assert status == (200 if path in ("/livez", "/readyz", "/health") else 401), path
    document = ask(world.url, "GET", "/openapi.json", key=None)
    assert document[0] == 200
    assert not any(each in document[2].decode() for each in (str(world.storage), str(world.base), "fruits", "spam"))


def with_a_key(world: SimpleNamespace, folder: Path) -> None:
    status, headers, content = ask(world.url, "GET", "/v1/models")
    models = json.loads(content)["data"]
    assert status == 200 and {model["id"] for model in models} == set(world.service.models.names)
    assert all(set(model) == MODEL for model in models)
    check_public(f"{headers} {[{**model, 'template': None} for model in models]}", world)
    for path in POSTS:
        status, headers, content = ask(world.url, "POST", path, body_for(path, "spam:1"))
        answer = json.loads(content)
        assert status == 200 and set(answer["answered_by"]) == {"soft_prompt", "content_hash", "base"}
        assert answer["answered_by"]["base"] == "tiny-llama"
        check_public(f"{headers} {answer}", world)
    for method, path in (("GET", "/metrics"), ("POST", "/v1/admin/reload")):
        assert ask(world.url, method, path)[0] == 403


def with_a_tuning_key(world: SimpleNamespace, folder: Path) -> None:
    row = b'{"text": "a secret of this client", "label": "b"}\n'
    status, headers, content = ask(world.url, "POST", "/v1/files", form(row), TUNER, content_type=FORM)
    made = json.loads(content)
    assert status == 200 and set(made) == FILE
    batch = {"input_file_id": made["id"], "endpoint": CHAT, "completion_window": "24h"}
    refused = ask(world.url, "POST", "/v1/batches", json.dumps(batch).encode(), TUNER)
    assert refused[0] == 400  # a file of another purpose
    for path in ("/v1/files", f"/v1/files/{made['id']}", "/v1/batches"):
        status, headers, content = ask(world.url, "GET", path, key=TUNER)
        assert status == 200
        check_public(f"{headers} {content.decode()}", world)
        assert ask(world.url, "GET", path, key=KEY)[0] == 403
    for method, path in (("GET", "/metrics"), ("POST", "/v1/admin/reload")):
        assert ask(world.url, method, path, key=TUNER)[0] == 403
    assert ask(world.url, "GET", f"/v1/files/{made['id']}/content", key=TUNER)[2] == row
    assert ask(world.url, "GET", f"/v1/files/{made['id']}/content", key=ADMIN)[2] == row
    assert ask(world.url, "DELETE", f"/v1/files/{made['id']}", key=TUNER)[0] == 200


def with_an_admin_key(world: SimpleNamespace, folder: Path) -> None:
    status, headers, content = ask(world.url, "GET", "/metrics", key=ADMIN)
    series = set(re.findall(rb"^(\w+)\{", content, re.MULTILINE))
    assert status == 200 and all(name.startswith(b"ptuning_") for name in series)
    labels = set(re.findall(rb'(\w+)="', content))
    assert labels == {b"replica", b"model", b"route", b"status", b"finish_reason", b"le"}
    check_public(
        f"{headers} {re.sub(r'^# .*$|^ptuning_', '', content.decode(), flags=re.MULTILINE)}".replace("soft_prompt", ""), world
    )
    answer = json.loads(ask(world.url, "POST", "/v1/admin/reload", key=ADMIN)[2])
    assert set(answer) == {"changed", "served", "refused", "replicas"}
    check_public(str(answer), world)


def with_an_export(world: SimpleNamespace, folder: Path) -> None:
    assert set(Card.model_fields) == CARD
    for name, shown in exported(world, folder).items():
        check_public(json.dumps([value for key, value in shown.items() if key not in ("template", "experiment")]), world)
        if name != "peft/adapter_config.json":
            assert set(shown) == CARD and shown["base"] == "tiny-llama"
            assert {table: set(values) for table, values in shown["experiment"].items()} == MADE
        else:
            assert shown["base_model_name_or_path"] == "tiny-llama"
    everything = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    for secret in (SECRET, str(world.storage), str(world.base), str(world.storage.parent), "127.0.0.1"):
        assert secret.encode() not in everything


def who_reads_files(world: SimpleNamespace, folder: Path) -> None:
    """A run's record and what lies beside it. All that commands write is searched in `test_secrets`."""
    experiment = Experiment.model_validate(written_experiment(world.storage, world.base))
    write_run(str(folder), experiment, "running")
    record = json.loads((folder / "run.json").read_text())
    assert record["experiment"]["compute"]["storage"] == str(world.storage)
    assert record["experiment"]["tracking"]["uri"] == "http://***@127.0.0.1:9"


def who_reads_mlflow(world: SimpleNamespace, folder: Path) -> None:
    tracker = Tracker(default_uri(world.storage), "x", default_artifact_root(world.storage), folder / "spool", "run")
    tracker.params({"tracking": {"uri": URI}, "data": {"train": "/data/x.jsonl"}})
    tracker.json("experiment.json", {"uri": URI})
    tracker.dataset("train", f"{URI}/rows.jsonl", "sha256:0", "training", 1)
    assert tracker.close(60) == 0
    known = world.registry.client.get_run(tracker.run_id)
    assert known.data.params == {"tracking.uri": "http://***@127.0.0.1:9", "data.train": "/data/x.jsonl"}
    assert SECRET not in str(known) + "".join(path.read_text() for path in (folder / "spool").rglob("*") if path.is_file())


def who_reads_logs(world: SimpleNamespace, folder: Path) -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logging.getLogger("ptuning").addHandler(handler)
    try:
        with pytest.MonkeyPatch.context() as patch:
            forgetful(world, patch)
            assert ask(world.url, "POST", "/v1/admin/reload", key=ADMIN)[0] == 503
        with pytest.MonkeyPatch.context() as patch:
            failing("models.find")(world, patch)
            assert ask(world.url, "POST", CHAT, GOOD)[0] == 500
    finally:
        logging.getLogger("ptuning").removeHandler(handler)
    said = stream.getvalue()
    assert (
        "http://***@127.0.0.1:9" in said and "RuntimeError: /private/place" in said and SECRET not in said and KEY not in said
    )


def who_lists_jobs(world: SimpleNamespace, folder: Path) -> None:
    file = folder / "toy.toml"
    file.write_text(
        f'name = "toy"\n[model]\npath = "builtin"\n[data]\ntrain = "/data/x.jsonl"\ninput = "{{text}}"\ntarget = " {{label}}"\n'
        f'[compute]\nstorage = "/shared"\n[tracking]\nuri = "{URI}"\n'
    )
    variables = {"MLFLOW_TRACKING_PASSWORD": SECRET, "PTUNING_API_KEYS": KEY, "HF_TOKEN": SECRET}
    with pytest.raises(UserError, match="which everyone who sees the job could read"):
        build_package("train", str(file), [], shared=[], env=[], here=variables)
    file.write_text(file.read_text().replace(f"me:{SECRET}@", ""))
    job = Job("train", "toy", (), build_package("train", str(file), [], shared=[], env=[], here=variables), installed=True)
    assert set(job.describe()) == {"entrypoint", "metadata", "env", "resources", "files", "overrides", "notes"}
    assert "/data/x.jsonl" in str(job.describe()) and SECRET not in str(job.describe()) and KEY not in str(job.describe())


READERS: dict[str, Callable[[SimpleNamespace, Path], None]] = {
    "no key": without_a_key,
    "client key": with_a_key,
    "tuning key": with_a_tuning_key,
    "admin key": with_an_admin_key,
    "receiver of an export": with_an_export,
    "reader of the storage folder": who_reads_files,
    "reader of MLflow": who_reads_mlflow,
    "reader of logs": who_reads_logs,
    "user who may list jobs on the Ray cluster": who_lists_jobs,
}


def routes(world: SimpleNamespace) -> list[tuple[str, str]]:
    """Every route with its method, as the application knows them."""
    paths = world.app.openapi()["paths"].items()
    return [(path.replace("{name}", "fruits"), method.upper()) for path, methods in paths for method in methods]


@pytest.mark.parametrize("reader", READERS)
def test_who_can_learn_what(world: SimpleNamespace, tmp_path: Path, reader: str) -> None:
    READERS[reader](world, tmp_path)


@pytest.mark.fast
def test_the_table_names_these_readers_and_fields() -> None:
    text = (REPOSITORY / "SECURITY.md").read_text(encoding="utf-8")
    table = text.partition("## Who can learn what")[2].partition("\n## ")[0]
    rows = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")][1:]
    assert rows == list(READERS)
    for field in (*MODEL, *FILE, *CARD, *(key for keys in MADE.values() for key in keys)):
        assert f"`{field}`" in table, field
