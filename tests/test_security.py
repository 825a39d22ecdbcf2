"""What people who are trusted with little can do to a server: SECURITY.md, line by line. More is elsewhere: files in
`test_hostile` and `test_soft_prompt`, requests in `test_http_api`, the proxy in `test_proxy` and `test_faults_serving`, jobs in
`test_submit`."""

from __future__ import annotations

import hmac
import json
import logging
import os
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import REPOSITORY, tiny_base
from test_http_api import ADMIN, GOOD, KEY, publish_soft_prompt, raw, serving, settings

from ptuning.config import parse_experiment
from ptuning.errors import UserError
from ptuning.inference.types import EngineBusy, Request
from ptuning.model.base import find_base
from ptuning.registry.registry import FORMAT
from ptuning.serving import auth
from ptuning.serving.auth import AccessError, caller_of, read_keys
from ptuning.settings.model import ModelConfig
from ptuning.settings.running import ServeConfig

pytestmark = [
    # MLflow 3.17 uses SQLAlchemy's noload, deprecated in 2.1 (store/tracking/sqlalchemy_store.py).
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


class Canary:
    """Leaves a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self._path,))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path) -> Iterator[SimpleNamespace]:
    with serving(tmp_path_factory.mktemp("security") / "runs", tiny_base_folder) as served:
        yield served


def refused(world: SimpleNamespace, version: str) -> str:
    """Why a version is not served, after a look; whatever was served still is."""
    before = {name: served.content_hash for name, served in world.service.models.names.items()}
    world.service.models.sync()
    after = {name: served.content_hash for name, served in world.service.models.names.items()}
    assert after == before and version not in after
    return str(world.service.models.refused[version])


# Who writes to the registry: authors of soft prompts.


def test_pickles_among_the_artifacts_stay_closed(world, tmp_path):
    """Beside the safetensors file: not even fetched. Instead of it: refused, and the others go on."""
    good = publish_soft_prompt(world.registry, world.base, tmp_path / "a", "pickled", 41)
    bad = publish_soft_prompt(world.registry, world.base, tmp_path / "b", "pickled", 42)
    for version in (good, bad):
        run = world.registry.client.get_run(world.registry.find(version).run_id)
        folder = Path(run.info.artifact_uri.removeprefix("file://")) / "soft_prompt"
        for name in ("adapter_model.bin", "python_model.pkl", "conda.yaml"):
            torch.save(Canary(tmp_path / "opened"), folder / name)
    shutil.copy(folder / "adapter_model.bin", folder / "adapter_model.safetensors")
    assert world.service.models.sync()
    assert world.service.models.find(good).content_hash
    assert "adapter_model.safetensors differs from its hash" in world.service.models.refused[bad]
    assert not (tmp_path / "opened").exists()


def test_mlflow_opens_no_pickle_whatever_the_environment_says(tmp_path):
    """In every process that can reach MLflow at all, because only `tracking` imports it."""
    model = tmp_path / "model"
    model.mkdir()
    flavor = {"loader_module": "mlflow.pyfunc.model", "python_model": "python_model.pkl", "cloudpickle_version": "3.0.0"}
    (model / "MLmodel").write_text(json.dumps({"flavors": {"python_function": flavor}, "model_uuid": "0"}))
    torch.save(Canary(tmp_path / "opened"), model / "python_model.pkl", _use_new_zipfile_serialization=False)
    code = f"""
import ptuning.tracking.tracker, mlflow.pyfunc
try:
    mlflow.pyfunc.load_model({str(model)!r})
except Exception as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env=os.environ | {"MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "true"},
    )
    assert "'MLFLOW_ALLOW_PICKLE_DESERIALIZATION' to 'true'" in done.stdout, done
    assert not (tmp_path / "opened").exists()


@pytest.mark.parametrize("tag", ["content_hash", "card_hash"])
def test_a_tag_names_no_folder(world, tmp_path, tag):
    """Tags are anybody's to write who may publish. These two name the folder in which a replica keeps the files; a folder that
    is there already and holds nothing of use is deleted."""
    version = publish_soft_prompt(world.registry, world.base, tmp_path / "c", f"trick-{tag[:4]}", 51)
    victim = world.storage / "victim"
    victim.mkdir(exist_ok=True)
    (victim / "manifest.json").write_text("{}")
    place = Path(world.service.models._folder)
    way = os.path.relpath(victim, place)
    found = world.registry.find(version)
    digest = {"content_hash": f"{way}/x", "card_hash": "/../."}[tag] if tag == "content_hash" else "/../../victim/."
    world.registry.tag(found, {f"ptuning.{tag}": digest})
    if tag == "content_hash":
        (victim / f"x-{found.tag('card_hash')[:16]}").mkdir()
        (victim / f"x-{found.tag('card_hash')[:16]}" / "manifest.json").write_text("{}")
    else:
        (place / f"{found.tag('content_hash')}-").mkdir()
    assert "its tags contain no SHA-256" in refused(world, version)
    assert (
        len(list(victim.rglob("manifest.json"))) == (2 if tag == "content_hash" else 1) and (victim / "manifest.json").exists()
    )
    shutil.rmtree(victim)


def test_names_that_are_none_are_not_even_listed(world, caplog):
    """MLflow takes nearly any name, from anybody who may write to it."""
    forged = "fruits\n2026-01-01 ERROR forged \u202e"
    client, source = world.registry.client, world.registry.find("fruits:1")
    client.create_registered_model(forged)
    client.create_model_version(forged, "file:///etc", source.run_id, tags={FORMAT: "1", **source.tags})
    with caplog.at_level(logging.DEBUG, "ptuning"):
        world.service.models.sync()
    assert not any("forged" in name for name in world.service.models.names) and "forged" not in caplog.text
    assert not any("forged" in version.name for version in world.registry.versions())


def test_a_version_that_breaks_in_a_new_way_is_refused_alone(world, tmp_path, monkeypatch, caplog):
    """Whatever a check did not think of: the next name is served all the same."""
    broken = publish_soft_prompt(world.registry, world.base, tmp_path / "d", "a-broken", 61)
    whole = publish_soft_prompt(world.registry, world.base, tmp_path / "e", "b-whole", 62)
    add = world.service.engine.add
    vectors = world.service.models  # the first of the two that is loaded

    def fails(*arguments: Any) -> Any:
        monkeypatch.setattr(world.service.engine, "add", add)
        raise IndexError("nobody thought of this")

    monkeypatch.setattr(world.service.engine, "add", fails)
    assert vectors.sync()
    assert vectors.refused[broken] == f"{broken}: could not be loaded; see the server's log"
    assert "nobody thought of this" in caplog.text and vectors.find(whole).content_hash


def test_a_new_version_waits_for_a_place_and_leaves_nothing(world, tmp_path):
    """Tried while every place is taken: neither refused nor half resident, and served as soon as there is room."""
    engine, catalogue = world.service.engine, world.service.models
    version = publish_soft_prompt(world.registry, world.base, tmp_path / "g", "patient", 81)
    residents = engine.residents
    with engine.paused():
        taken = [engine.submit(Request([5], None, 50), lambda event: None) for _ in range(16)]
        catalogue.patience = 0.2
        with pytest.raises(EngineBusy):
            catalogue.sync()
        assert engine.residents == residents and version not in catalogue.refused
        for each in taken:
            engine.cancel(each)
    assert catalogue.sync() and catalogue.find(version).content_hash


# Who gives a base.


def test_a_base_brings_no_code(tmp_path, tiny_tokenizer):
    def base(name: str, file: str = "config.json", **changes: Any) -> ModelConfig:
        folder = tmp_path / name
        tiny_base("llama", vocab_size=len(tiny_tokenizer)).save_pretrained(folder)
        tiny_tokenizer.save_pretrained(folder)
        (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nfrom transformers import LlamaConfig as Config")
        known = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(known | changes))
        return ModelConfig(path=str(folder))

    auto = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    own = "contains its own code, which is not run; choose a base that transformers supports, or set model.trust_remote_code"
    for config in (
        base("unknown", auto_map=auto, model_type="evil"),
        base("elsewhere", auto_map={"AutoConfig": "org/repository--evil.Config"}, model_type="evil"),
        base("words", "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", "evil.T"]}, tokenizer_class="T"),
    ):
        with pytest.raises(UserError, match=own):
            find_base(config)
    # Where transformers has a class of its own, that is what is loaded.
    assert type(find_base(base("known", auto_map=auto)).load(torch.float32)).__name__ == "LlamaForCausalLM"
    for key in ("attn_implementation", "_attn_implementation", "_attn_implementation_internal", "_experts_implementation"):
        with pytest.raises(UserError, match=rf"has {key} = 'org/kernel' in its config.json, which is code from elsewhere"):
            find_base(base(f"kernel{key}", **{key: "org/kernel"}))
    with pytest.raises(UserError, match="which is code from elsewhere"):
        find_base(base("nested", text_config={"attn_implementation": {"": "org/kernel"}}))
    for name, content in (("list", b"[]"), ("none", b"\xff"), ("deep", b"[" * 100_000)):
        config = base(name)
        (tmp_path / name / "config.json").write_bytes(content)
        with pytest.raises(UserError, match="has a config.json that is not a JSON object; use another copy"):
            find_base(config)
    assert not (tmp_path / "ran").exists()


# Who asks.


def test_keys_are_compared_whole_and_in_constant_time(monkeypatch):
    keys = {auth._digest(f"a-key-of-some-length-{number}"): "inference" for number in range(5)}
    compared = []
    real = hmac.compare_digest
    monkeypatch.setattr(auth.hmac, "compare_digest", lambda one, two: compared.append(1) or real(one, two))
    for header in ("Bearer a-key-of-some-length-0", "Bearer a-key-of-some-length-9", None, "Basic x"):
        compared.clear()
        assert (caller_of(header, keys) is not None) == (header == "Bearer a-key-of-some-length-0")
        assert len(compared) == len(keys), "every key, whichever fits"


def test_keys_are_nowhere(world, tmp_path, caplog):
    from ptuning.serving.deployment import application

    experiment = parse_experiment(settings(world.storage, world.base))
    keys = read_keys(str(world.storage / "keys"))
    shown = [repr(experiment), experiment.model_dump_json(), repr(application(experiment, keys)), repr(vars(world.service))]
    deployment = application(experiment, keys)._bound_deployment
    shown += [repr(deployment.init_args), repr(deployment)]
    with caplog.at_level(logging.DEBUG):
        for key in (KEY, ADMIN, f"{KEY}x"):
            for path in ("/v1/chat/completions", "/v1/nowhere", "/v1/completions", "/v1/admin/reload"):
                status, headers, content = raw(world.url, path, GOOD, key)
                shown.append(f"{status} {headers} {content!r}")
        for path in ("/v1/models", "/metrics", "/readyz", "/openapi.json"):
            asked = urllib.request.Request(world.url.removesuffix("/v1") + path, headers={"authorization": f"Bearer {ADMIN}"})
            with urllib.request.urlopen(asked) as response:
                shown.append(response.read().decode())
    for line, words in (("short", "is shorter than"), ("a secret key with blanks", "is followed by an unknown scope")):
        file = tmp_path / "keys"
        file.write_text(f"{line}\n")
        with pytest.raises(AccessError, match=words) as wrong:
            read_keys(str(file))
        assert not any(part in str(wrong.value) for part in ("short\n", "secret", "blanks"))
    text = "\n".join([*shown, caplog.text])
    assert KEY not in text and ADMIN not in text and len(text) > 5000


def test_requests_write_no_lines_of_their_own_into_the_log(world, caplog):
    forged = "\\n2026-01-01 ERROR forged\\u001b[2J\\u0085"
    with caplog.at_level(logging.DEBUG):
        for body in (
            f'{{"model": "a{forged}", "messages": [{{"role": "user", "content": "a"}}]}}',
            f'{{"model": "fruits", "messages": [{{"role": "user", "content": "a"}}], "x{forged}": 1}}',
            f'{{"model": "fruits", "user": "{forged}", "messages": [{{"role": "user", "content": "{forged}"}}]}}',
        ):
            raw(world.url, "/v1/chat/completions", body.encode())
        raw(world.url, "/v1/%0a2026-01-01%20ERROR%20forged", GOOD)
    assert not any(
        line.startswith(("2026-01-01", "\x1b")) for record in caplog.records for line in record.getMessage().split("\n")
    )


def test_loopback_unless_told_otherwise():
    assert auth.is_loopback(ServeConfig().host)
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.org", ""):
        with pytest.raises(AccessError, match="can be reached from other machines, but there are no API keys"):
            auth.check_address(host, {}, insecure=False)


def test_without_rays_token_nothing_is_served(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(AccessError, match="anyone who reaches this machine can run code in a replica; set it to token"):
        auth.check_token(insecure=False)
    auth.check_token(insecure=True)
    monkeypatch.delenv("RAY_AUTH_MODE")  # Ray then switches it on by itself where it is started
    auth.check_token(insecure=False)


def test_a_parcel_takes_no_link_out_of_its_folder(tmp_path, tiny_base_folder):
    """A folder of somebody else's may hold links; only names of its own patterns travel, never a hidden file or a folder."""
    from ptuning.cluster.job_package import build_package

    base = tmp_path / "base"
    shutil.copytree(tiny_base_folder, base)
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "id.json").write_text("secret")
    (base / "linked").symlink_to(tmp_path / "private")
    (base / ".hidden.json").write_text("secret")
    (base / "..json").write_text("secret")
    file = tmp_path / "toy.toml"
    file.write_text(
        f'name = "toy"\n[model]\npath = "{base}"\n[data]\ntrain = "x.jsonl"\ninput = "{{text}}"\ntarget = " {{label}}"\n'
        '[compute]\nstorage = "/shared"\n'
    )
    shipped = build_package("serve", str(file), [], shared=[], env=[], here={})
    packed = tmp_path / "packed"
    packed.mkdir()
    shipped.pack(packed)
    assert not any("secret" in path.read_text(errors="replace") for path in packed.rglob("*.json"))
    assert all(path.resolve().is_relative_to(packed) for path in packed.rglob("*"))
