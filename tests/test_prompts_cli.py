"""`ptuning prompts` as a person or a script types it."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_export import same_logits, train_with_peft
from test_registry import fill, http, prompt, put, registry, store  # noqa: F401 (fixtures)
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from ptuning.cli.app import app
from ptuning.model.base import find_base
from ptuning.model.nearest_tokens import nearest_words, norms
from ptuning.registry.promotions import PromotionLog
from ptuning.registry.publish import retrieve
from ptuning.registry.registry import Registry
from ptuning.settings.data import Template
from ptuning.settings.model import ModelConfig
from ptuning.tracking.client import default_uri

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def run(*arguments: str, code: int = 0, **options: Any) -> Any:
    done = CliRunner().invoke(app, ["prompts", *arguments], **options)
    assert done.exit_code == code, (done.stdout, done.stderr, done.exception)
    return done


def answer(*arguments: str) -> Any:
    return json.loads(run(*arguments, "--json").stdout.splitlines()[-1])


def refusal(*arguments: str, **options: Any) -> str:
    """What is said to a user who is wrong: one sentence on stderr, exit code 2."""
    done = run(*arguments, code=2, **options)
    assert done.stdout == "" and isinstance(done.exception, SystemExit)
    return str(done.stderr)


@pytest.fixture
def shelf(store: Path, registry: Registry, tmp_path: Path, tiny_base_folder: Path) -> SimpleNamespace:  # noqa: F811
    """A store with three versions of "toy" and one of "other", all for the tiny base; toy:1 is champion."""
    base = find_base(ModelConfig(path=str(tiny_base_folder)))
    mine = {
        "base": str(tiny_base_folder),
        "base_fingerprint": base.fingerprint.parts(),
        "template": Template(input="Text: {text}\nKind:", target=" {label}", labels=("fruit", "tool")),
    }
    first = put(registry, "toy", prompt(tmp_path, 1, **mine))
    put(registry, "toy", prompt(tmp_path, 2, **mine, parent=first.tag("content_hash")))
    put(registry, "toy", prompt(tmp_path, 3, **mine, metrics={"test_accuracy": 0.4}))
    put(registry, "other", prompt(tmp_path, 4, **mine))
    PromotionLog(registry, "toy").promote(1, PromotionLog(registry, "toy").state())
    return SimpleNamespace(where=("--storage", str(store)), registry=registry, base=base, folder=tmp_path)


@pytest.mark.fast
def test_list(shelf: SimpleNamespace) -> None:
    lines = run("list", *shelf.where).stdout.splitlines()
    assert lines[0].split() == ["NAME", "VERSION", "ALIAS", "BASE", "LENGTH", "METRIC", "AGE", "SIZE"]
    assert [line.split()[:3] for line in lines[1:]] == [
        ["other", "1", "-"],
        ["toy", "3", "-"],
        ["toy", "2", "-"],
        ["toy", "1", "champion"],
    ]
    assert lines[4].split()[3:8] == ["tiny-llama", "4", "test", "accuracy", "0.5000"]
    rows = answer("list", *shelf.where)["soft_prompts"]
    assert rows[3]["aliases"] == ["champion"] and rows[3]["value"] == 0.5 and rows[3]["base"] == shelf.base.name
    assert rows[2]["parent"] == rows[3]["content_hash"]


@pytest.mark.fast
def test_an_empty_list_says_what_to_do(tmp_path: Path) -> None:
    done = run("list", "--storage", str(tmp_path / "none"))
    assert done.stdout == "" and "publish one with: ptuning train EXPERIMENT --register NAME" in done.stderr
    assert answer("list", "--storage", str(tmp_path / "none")) == {"soft_prompts": []}


@pytest.mark.fast
def test_show(shelf: SimpleNamespace) -> None:
    shown = answer("show", "toy:2", *shelf.where)
    assert shown["lineage"]["parent_versions"] == ["toy:1"] and shown["lineage"]["data"] == {"test": "rows"}
    assert shown["card"]["template"]["labels"] == ["fruit", "tool"]
    assert len(shown["nearest_words"]) == 4 and len(shown["nearest_words"][0]) == 3
    assert shown["norms"]["vocabulary_mean"] > 0
    text = run("show", "toy", *shelf.where).stdout
    assert text.startswith("toy:1 (champion)\nbase         ") and "input        'Text: {text}\\nKind:'" in text
    assert "\nobjective" not in text, "it was made elsewhere"
    text = run("show", "toy:2", "--base", str(shelf.folder), *shelf.where).stdout
    assert "(toy:1)" in text and "words        unknown: toy:2: " in text


@pytest.mark.fast
def test_nearest_words_are_those_of_the_embedding(tiny_base_folder: Path) -> None:
    base = find_base(ModelConfig(path=str(tiny_base_folder)))
    embedding = AutoModelForCausalLM.from_pretrained(tiny_base_folder).get_input_embeddings().weight.detach()
    words = nearest_words(embedding[[50, 200]] * 3.5, base)
    assert [row[0] for row in words] == [(base.tokenizer.decode([50]), 1.0), (base.tokenizer.decode([200]), 1.0)]
    cosines = torch.nn.functional.cosine_similarity(embedding[50][None], embedding)
    assert [cosine for _, cosine in words[0]] == [round(float(value), 4) for value in cosines.topk(3).values]
    assert norms(embedding, base)["vocabulary_mean"] == pytest.approx(norms(embedding, None)["mean"])


@pytest.mark.fast
def test_promote_rollback_and_delete(shelf: SimpleNamespace) -> None:
    assert answer("promote", "toy", "2", *shelf.where)["previous"] == 1
    assert run("promote", "toy:2", *shelf.where).stdout == "toy:2 is champion already\n"
    assert refusal("promote", "toy", "3", *shelf.where) == (
        "ptuning: toy:3: its test accuracy 0.4000 is worse than the champion's 0.5000 (toy:2) by more than 0.01; nothing was "
        "changed, use --force to promote it anyway\n"
    )
    done = run("promote", "toy:3", "--force", *shelf.where)
    assert done.stdout == "toy:3 is champion, before it was 2\n"
    assert done.stderr.startswith("forced though its test accuracy 0.4000 is worse")
    assert "forced       its test accuracy" in run("show", "toy:3", *shelf.where).stdout
    assert "is the champion; promote another version first" in refusal("delete", "toy:3", "--yes", *shelf.where)
    assert run("rollback", "toy", *shelf.where).stdout == "toy:2 is champion again\n"
    assert "repeat it with --yes" in refusal("delete", "toy:3", *shelf.where)
    assert answer("delete", "toy:3", "--yes", *shelf.where) == {"deleted": "toy:3"}
    assert "toy:3: does not exist; toy has the versions 2, 1 and champion" in refusal("show", "toy:3", *shelf.where)
    assert "toy: which version? write toy:N" in refusal("promote", "toy", *shelf.where)


@pytest.mark.fast
def test_similar(shelf: SimpleNamespace) -> None:
    ranked = answer("similar", "toy", *shelf.where)["similar"]
    assert [row["name"] for row in ranked] == ["other:1"]
    toy, other = (retrieve(shelf.registry, shelf.registry.find(name))[0].vectors.mean(0) for name in ("toy:1", "other:1"))
    assert ranked[0]["cosine"] == round(float(toy @ other / (toy.norm() * other.norm())), 4)
    assert answer("similar", "other", *shelf.where)["similar"][0]["name"] == "toy:1", "the champion speaks for its name"


@pytest.mark.fast
def test_import_and_export(store: Path, tmp_path: Path, tiny_base_folder: Path) -> None:  # noqa: F811
    where = ("--storage", str(store))
    source = str(tmp_path / "theirs")
    train_with_peft(find_base(ModelConfig(path=str(tiny_base_folder))), tmp_path / "theirs")
    base = ("--base", str(tiny_base_folder))
    done = run("import", source, "--name", "plain", *base, *where)
    assert done.stdout.startswith("imported as plain:1; make it champion with: ptuning prompts promote plain:1")
    assert "its template stays unknown; --input and --target would tell it" in done.stderr
    template = ("--input", "Text: {text}\\nKind:", "--target", " {label}")
    row = answer("import", source, "--name", "kind", *base, *template, "--labels", "fruit, tool", *where)
    assert (row["name"], row["version"], row["metric"], row["length"]) == ("kind", 1, None, 6)
    shown = answer("show", "kind", *where)
    assert shown["card"]["template"]["input"] == "Text: {text}\nKind:"
    assert shown["card"]["template"]["labels"] == ["fruit", "tool"]
    assert shown["card"]["init"] is None and shown["card"]["metrics"] == {}
    assert run("export", "kind", str(tmp_path / "back"), *where).stdout == f"kind:1 written to {tmp_path}/back; PEFT loads it\n"
    back, theirs = (tmp_path / "back", tmp_path / "theirs")
    assert (back / "adapter_model.safetensors").read_bytes() == (theirs / "adapter_model.safetensors").read_bytes()
    config = json.loads((theirs / "adapter_config.json").read_text())
    named = {"base_model_name_or_path": Path(config["base_model_name_or_path"] or "").name or None}
    assert json.loads((back / "adapter_config.json").read_text()) == config | named
    same_logits(find_base(ModelConfig(path=str(tiny_base_folder))), tmp_path / "theirs", tmp_path / "back")
    assert "back: exists already" in refusal("export", "kind", str(tmp_path / "back"), *where)
    facts = answer("export", "kind", str(tmp_path / "merged"), "--format", "merged", *where)
    assert facts["tokens"] == 6 and facts["untied"] and facts["chat"]
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    # An exported artefact comes back under another name, with its card.
    assert answer("import", str(tmp_path / "back"), "--name", "again", *where)["content_hash"] == row["content_hash"]


@pytest.mark.fast
def test_what_is_wrong_is_a_sentence(shelf: SimpleNamespace) -> None:
    where = shelf.where
    assert refusal("show", "../x", *where) == "ptuning: '../x' is not a valid reference; write name, name:3 or name@champion\n"
    assert "nobody: no soft prompt of this name in sqlite" in refusal("show", "nobody", *where)
    for command in ("show", "export", "similar", "promote", "rollback", "delete"):
        arguments = {
            "show": ["tyo"],
            "similar": ["tyo"],
            "rollback": ["tyo"],
            "export": ["tyo", "x"],
            "delete": ["tyo:1", "--yes"],
        }
        assert refusal(command, *arguments.get(command, ["tyo", "1"]), *where).endswith("; did you mean toy?\n"), command
    assert "is not a valid name; use at most 64 letters" in refusal("import", str(shelf.folder), "--name", "a/b", *where)
    assert "adapter_config.json is missing" in refusal("import", str(shelf.folder), "--name", "a", *where)
    assert "a template needs both" in refusal("import", str(shelf.folder), "--name", "a", "--input", "{text}", *where)
    wrong = ("--input", "{text}", "--target", " {label}", "--labels", "one")
    assert "has fewer than two labels" in refusal("import", str(shelf.folder), "--name", "a", *wrong, *where)
    assert "does not respond" in refusal("list", "--tracking", "http://127.0.0.1:9")
    assert "has no earlier champion to go back to" in refusal("rollback", "toy", *where)
    assert "cannot hold the tracking store" in refusal("list", "--storage", "s3://bucket/runs")


@pytest.mark.fast
def test_a_bad_name_to_register_is_refused_before_anything_starts(toy_task: SimpleNamespace, write_toml: Any) -> None:
    path = str(write_toml(toy_task.experiment))
    done = CliRunner().invoke(app, ["train", path, "--register", "../x"])
    assert done.exit_code == 2 and done.stderr.startswith("ptuning: --register: '../x' is not a valid name; use at most 64")
    assert not Path(toy_task.experiment["compute"]["storage"]).exists()


def cost(*arguments: str) -> tuple[float, str]:
    """Seconds of processor time of a command: what it takes where nothing else runs. And its output."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout


@pytest.mark.nightly
@pytest.mark.slow
def test_a_thousand_versions_are_listed_in_three_seconds(store: Path, registry: Registry) -> None:  # noqa: F811
    for name in range(20):
        fill(registry, f"name-{name}", 50)
    # Importing MLflow takes 1.7 s of an idle processor, and much more of one that is shared; the rest is ours.
    mlflow = "from mlflow import MlflowClient; import mlflow.store.tracking.sqlalchemy_store"
    taken = []
    for _ in range(3):
        imports, _ = cost("-W", "ignore", "-c", mlflow)
        seconds, output = cost("-m", "ptuning", "prompts", "list", "--json", "--storage", str(store))
        assert len(json.loads(output.splitlines()[-1])["soft_prompts"]) == 1000
        taken.append(seconds - imports)
    assert min(taken) < 1.3, taken


@pytest.mark.nightly
@pytest.mark.slow
def test_nothing_but_our_own_lines(tmp_path: Path, tiny_base_folder: Path) -> None:
    train_with_peft(find_base(ModelConfig(path=str(tiny_base_folder))), tmp_path / "theirs")
    # As at a user's, without what conftest and our own rooms have told the libraries in this process.
    told = ("DS_", "MLFLOW_", "TRANSFORMERS_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(told)}
    template = ("--input", "Text: {text}\\nKind:", "--target", " {label}")
    for arguments, line in (
        (("import", str(tmp_path / "theirs"), "--name", "toy", *template), "imported as toy:1"),  # makes the database
        (("promote", "toy:1"), "toy:1 is champion"),
        (("show", "toy"), "toy:1 (champion)"),
        (("export", "toy", str(tmp_path / "merged"), "--format", "merged"), "toy:1 merged into"),
    ):
        command = [sys.executable, "-m", "ptuning", "prompts", *arguments, "--storage", str(tmp_path / "runs")]
        if arguments[0] != "show":
            command += ["--base", str(tiny_base_folder)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith(line)


@pytest.mark.fast
def test_a_storage_folder_that_has_moved(shelf: SimpleNamespace, store: Path) -> None:  # noqa: F811
    """Twice: all commands find what is in it, what is new lies in it, too, and nothing is made where it was before."""
    for place in ("elsewhere", "and farther"):
        moved = shelf.folder / place / "runs"
        moved.parent.mkdir()
        store.rename(moved)
        where = ("--storage", str(moved))
        fresh = put(Registry(default_uri(moved)), "toy", prompt(shelf.folder, 7 + len(place), base=shelf.base.name))
        assert answer("list", *where)["soft_prompts"][-1]["aliases"] == ["champion"]
        assert answer("show", "toy:2", *where)["version"] == 2
        for version in (1, fresh.version):
            run("export", f"toy:{version}", str(shelf.folder / f"{place}-{version}"), *where)
        assert answer("promote", "toy", "2", "--force", *where)["moved"] and answer("rollback", "toy", *where)["champion"] == 1
        assert (moved / "mlartifacts" / fresh.run_id / "artifacts" / "soft_prompt" / "card.json").exists()
        assert not store.exists()
        store = moved
    (store / "mlartifacts").rename(store / "away")
    said = refusal("export", "toy:1", str(shelf.folder / "out"), *where)
    assert f"not found in file://{store.as_uri().removeprefix('file://')}/mlartifacts/" in said and "--storage" in said
    assert "delete" not in said and "mount that folder again" in said


@pytest.mark.fast
def test_a_storage_folder_with_an_odd_name_holds_all_that_is_written(tmp_path: Path) -> None:
    """The database is made there, not copied as in the other tests. Any name: `test_tracking`."""
    store = tmp_path / "in" / " #100% a:b;c&d=[e]{f}'g'\"h\"\\i~$HOME*!ä日\n"  # noqa: F811
    source = prompt(tmp_path / "source")
    put(Registry(default_uri(store)), "toy", source)
    assert {path.name for path in tmp_path.iterdir()} == {"in", "source"} and list((tmp_path / "in").iterdir()) == [store]
    assert {"mlflow.db", "mlartifacts"} <= {path.name for path in store.iterdir()}
    moved = store.rename(tmp_path / "moved")
    assert len(answer("list", "--storage", str(moved))["soft_prompts"]) == 1
    run("export", "toy:1", str(tmp_path / "out"), "--storage", str(moved))
    assert (tmp_path / "out" / "card.json").exists() and not store.exists()


@pytest.mark.fast
@pytest.mark.parametrize("name", ["a?b=1", "a%41b"])
def test_a_storage_folder_that_mlflow_would_take_for_another_is_refused(
    toy_task: SimpleNamespace, write_toml: Any, name: str
) -> None:
    toy_task.experiment["compute"]["storage"] = str(toy_task.folder / "in" / name)
    for command in (["train"], ["search"], ["serve"], ["doctor"], ["submit", "train", "--address=http://x", "--shared=/"]):
        done = CliRunner().invoke(app, [*command, str(write_toml(toy_task.experiment))])
        assert done.exit_code == 2 and f"/{name} has " in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert f"/{name} has " in refusal("list", "--storage", toy_task.experiment["compute"]["storage"])
    assert not (toy_task.folder / "in").exists()


@pytest.mark.nightly
@pytest.mark.slow
def test_the_commands_on_a_server(http: str, tmp_path: Path, tiny_base_folder: Path) -> None:  # noqa: F811
    where = ("--tracking", http)
    base = find_base(ModelConfig(path=str(tiny_base_folder)))
    mine = {"base": str(tiny_base_folder), "base_fingerprint": base.fingerprint.parts()}
    for seed in (1, 2):
        source = prompt(tmp_path, seed, **mine)
        assert answer("import", source, "--name", "served", *where)["version"] == seed
    assert answer("promote", "served", "1", *where)["previous"] is None
    assert answer("promote", "served", "2", *where)["previous"] == 1
    assert answer("rollback", "served", *where)["champion"] == 1
    assert answer("show", "served", *where)["version"] == 1
    run("export", "served@champion", str(tmp_path / "out"), *where)
    assert (tmp_path / "out" / "card.json").exists()
    run("delete", "served:2", "--yes", *where)
    assert [row["version"] for row in answer("list", *where)["soft_prompts"]] == [1]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_from_training_to_champion_to_the_next_training(finished_run: SimpleNamespace, write_toml: Any) -> None:
    tables, first = finished_run.tables, finished_run.summary
    where = ("--storage", tables["compute"]["storage"])

    def train(*arguments: str) -> Any:
        done = CliRunner().invoke(app, ["train", str(write_toml(tables)), *arguments, "--json"])
        assert done.exit_code == 0, (done.stderr, done.exception)
        return json.loads(done.stdout.splitlines()[-1])

    assert train("--register", "kinds", "--resume") == first | {"registered": "kinds:1"}
    assert answer("show", "kinds", *where)["lineage"]["run_id"] == first["run_id"]
    assert train("--register", "kinds", "--resume")["registered"] == "kinds:1", "a finished run is not registered twice"
    run("promote", "kinds", "1", *where)
    tables["prompt"] |= {"init": "soft-prompt", "init_from": "kinds@champion", "length": 12}
    tables["train"] |= {"steps": 10, "evaluate_every": 10}
    tables["compute"]["workers"] = 1
    second = train("name=longer", "--register", "longer")
    shown = answer("show", "longer", *where)
    assert second["registered"] == "longer:1" and shown["lineage"]["parent_versions"] == ["kinds:1"]
    assert shown["card"]["length"] == 12
    assert answer("similar", "longer", *where)["similar"][0]["name"] == "kinds:1"
