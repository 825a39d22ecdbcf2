"""The front door: help at once, bad input in one sentence with exit code 2 and nothing written, the whole command for real."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import pty
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import typer
from conftest import tiny_config, title
from typer.testing import CliRunner

from ptuning.cli.app import app
from ptuning.cli.options import non_blank

Write = Callable[..., Path]


def invoke(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(arguments))
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stderr.strip()


def change(tables: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    for part in path:
        tables = tables.setdefault(part, {})
    tables[last] = value


@pytest.mark.fast
def test_help_answers_at_once() -> None:
    seconds = []
    for _ in range(3):
        began = time.monotonic()
        done = subprocess.run([sys.executable, "-m", "ptuning", "--help"], capture_output=True, text=True, check=True)
        seconds.append(time.monotonic() - began)
    assert "train" in done.stdout and "config" in done.stdout
    assert min(seconds) < 3.0  # 0.4 s on a machine at rest; torch alone would take longer than this on a busy one


@pytest.mark.fast
@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("name", "a/b", "name: 'a/b' is not a valid name; use at most 64 letters, digits, '-', '_' and '.', no slashes"),
        ("prompt.length", 0, "prompt.length: input should be greater than 0 (got 0); change the value"),
        (
            "prompt.length",
            128,
            "prompt.length: 128 virtual tokens leave no space for text in the 128 positions of {model}; lower it",
        ),
        (
            "data.max_tokens",
            126,
            "data.max_tokens: 4 virtual tokens and 126 of text exceed the 128 positions of {model}; set it to at most 124",
        ),
        (
            "train.learning_rate",
            0.0,
            "train.learning_rate: input should be greater than 0 or 'auto' (got 0.0); change the value",
        ),
        ("train.learning_rate", -1, "train.learning_rate: input should be greater than 0 or 'auto' (got -1); change the value"),
        ("train.lr", 0.1, "train.lr: unknown key; "),
        (
            "model.path",
            "no/such/folder",
            "no/such/folder is neither an existing folder nor a Hugging Face id; correct the path",
        ),
        ("model.path", "nobody/nothing", "model.path: nobody/nothing was not found on the Hugging Face Hub or in its cache "),
        ("data.train", "missing.jsonl", "missing.jsonl: "),
        ("data.input", "{txt}:", "txt"),
        ("data.labels", ["fruit", "tols"], "tols"),
        ("prompt.init_from", "x", "prompt.init_from: is only used with init"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(
    toy_task: SimpleNamespace, write_toml: Write, tmp_path: Path, key: str, value: Any, message: str
) -> None:
    change(toy_task.experiment, key, value)
    code, error = invoke("train", str(write_toml(toy_task.experiment)))
    assert code == 2
    assert message.format(model=toy_task.experiment["model"]["path"]) in error
    assert error.startswith("ptuning: ") and "\n" not in error and "Traceback" not in error
    assert not (tmp_path / "runs").exists()


@pytest.mark.fast
def test_bad_files_are_one_sentence(toy_task: SimpleNamespace, write_toml: Write, tmp_path: Path) -> None:
    experiment = str(write_toml(toy_task.experiment))
    rows = toy_task.train.read_bytes()
    for content, words in [
        (b"", "empty"),
        (rows + b'{"text": "a\x00b", "label": "tool"}\n', "line 65"),
        (rows + b'{"text": "\xff", "label": "tool"}\n', "line 65"),
        (rows + b'{"text": "' + b"x" * 11_000_000 + b'", "label": "tool"}\n', "line 65"),
        (rows + b'{"text": "no label"}\n', "label"),
        (rows + b'{"text": "x", "label": "toool"}\n', "did you mean 'tool'?"),
        (rows + b"not json\n", "line 65"),
    ]:
        toy_task.train.write_bytes(content)
        code, error = invoke("train", experiment)
        assert code == 2 and words in error and str(toy_task.train) in error and "\n" not in error, error
    assert not (tmp_path / "runs").exists()


@pytest.mark.fast
def test_a_storage_that_cannot_be_written_is_named(toy_task: SimpleNamespace, write_toml: Write, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    experiment = str(write_toml(toy_task.experiment))
    code, error = invoke("train", experiment, f"compute.storage={tmp_path}/file/runs")
    assert code == 2 and error == (
        f"ptuning: compute.storage: {tmp_path}/file/runs cannot be written ({tmp_path}/file is a file); choose another folder"
    )


@pytest.mark.fast
def test_a_base_that_is_no_decoder_is_refused(toy_task: SimpleNamespace, write_toml: Write, tmp_path: Path) -> None:
    folder = tmp_path / "bert"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertForMaskedLM"]}))
    experiment = str(write_toml(toy_task.experiment))
    code, error = invoke("train", experiment, f"model.path={folder}")
    assert code == 2
    assert error == (
        f"ptuning: model.path: {folder} is a BertForMaskedLM, not a decoder-only language model; choose a causal LM"
    )
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    code, error = invoke("train", experiment, f"model.path={folder}")
    assert code == 2 and "has no .safetensors file, the only format that is opened; convert it" in error


@pytest.mark.fast
def test_a_model_without_its_tokenizer_or_end_token_is_refused(
    toy_task: SimpleNamespace, write_toml: Write, tmp_path: Path
) -> None:
    folder = tmp_path / "bare"
    tiny_config("llama", architectures=["LlamaForCausalLM"]).save_pretrained(folder)
    (folder / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    code, error = invoke("train", str(write_toml(toy_task.experiment)), f"model.path={folder}")
    assert code == 2 and error.startswith(f"ptuning: model.path: {folder} ") and "\n" not in error


@pytest.mark.fast
def test_resume_without_a_run_is_refused(toy_task: SimpleNamespace, write_toml: Write, tmp_path: Path) -> None:
    code, error = invoke("train", str(write_toml(toy_task.experiment)), "--resume")
    assert code == 2 and error == (f"ptuning: {tmp_path}/runs/toy: there is no run to resume; start it without --resume")


@pytest.mark.fast
def test_config_prints_the_resolved_experiment(toy_task: SimpleNamespace, write_toml: Write) -> None:
    done = CliRunner().invoke(app, ["config", str(write_toml(toy_task.experiment)), "train.steps=7"])
    resolved = json.loads(done.stdout)
    assert resolved["train"]["steps"] == 7 and resolved["train"]["optimizer"] == "adamw"
    schema = json.loads(CliRunner().invoke(app, ["config", "--schema"]).stdout)
    assert schema["properties"]["name"]["type"] == "string" and "ZeroConfig" in schema["$defs"]


@pytest.mark.fast
def test_a_terminal_gets_signs_of_life_and_stdout_the_result_only(tmp_path: Path) -> None:
    terminal, end = pty.openpty()
    listing = [sys.executable, "-m", "ptuning", "prompts", "list", "--storage", str(tmp_path), "--json"]
    done = subprocess.run(listing, stdout=subprocess.PIPE, stderr=end, check=True)
    os.close(end)
    assert done.stdout == b'{"soft_prompts": []}\n'
    shown = b""
    with contextlib.suppress(OSError):  # Linux ends a terminal that nobody writes to any more with EIO
        while part := os.read(terminal, 10_000):
            shown += part
    os.close(terminal)
    assert b"reading the registry" in shown and b"\x1b[" in shown
    assert b"\x1b[" not in subprocess.run(listing, capture_output=True, check=True).stderr


@pytest.mark.fast
@pytest.mark.parametrize(("typed", "completed"), [("ptuning tra", "train"), ("ptuning prompts pro", "promote")])
def test_shells_complete_commands(typed: str, completed: str) -> None:
    words = {"_PTUNING_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" "))}
    command = "import sys; sys.argv[0] = 'ptuning'; from ptuning.cli.app import app; app()"
    done = subprocess.run([sys.executable, "-c", command], env=os.environ | words, capture_output=True, text=True)
    assert done.stdout.split() == [completed], done


TEXT = {
    "compress --input",
    "compress --labels",
    "predict --prefix",
    "ask [TEXT]",
    "compare --text",
    "prompts import --input",
    "prompts import --target",
    "prompts import --labels",
}
"""What is text and may be blank."""


def strings(command: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every option and argument that takes a free string."""
    for name, below in getattr(command, "commands", {}).items():
        yield from strings(below, f"{path}{name} ")
    for parameter in command.params:
        if parameter.type_descriptor.annotation in (str, list[str]) and not parameter.name.endswith("_completion"):
            yield path + (parameter.metavar if parameter.param_type_name == "argument" else parameter.opts[0]), parameter


@pytest.mark.fast
def test_every_path_address_and_name_is_refused_if_blank() -> None:
    found = dict(strings(typer.main.get_command(app)))
    checked = {name for name, each in found.items() if inspect.unwrap(each.callback or print) is non_blank}
    assert {name for name in set(found) - checked if not name.endswith("KEY=VALUE")} == TEXT
    assert {"train --register", "prompts list --storage", "submit --shared", "doctor --address", "jobs stop JOB"} <= set(found)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("prompts", "list", "--storage="), "--storage"),
        (("prompts", "export", "a:1", "  "), "FOLDER"),
        (("submit", "train", "e.toml", "--address=http://x", "--shared=/one", "--shared="), "--shared"),
        (("submit", "train", "e.toml", "--address", ""), "--address"),
        (("compare", "a", "--text=", "--base= "), "--base"),
    ],
)
def test_blank_arguments_are_one_sentence(arguments: tuple[str, ...], named: str) -> None:
    said = f"ptuning: {named}: is empty (an unset shell variable?); give it a value, or leave it out"
    assert invoke(*arguments) == (2, said)


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_whole_command_with_two_workers(toy_task: SimpleNamespace, write_toml: Write, tmp_path: Path) -> None:
    """In a bare environment and a home that takes nothing: what is written goes where the variables say."""
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    bare = {
        "PATH": path,
        "HOME": "/proc/nowhere",
        "LC_ALL": "C",
        "PYTHONHASHSEED": "7",
        "HF_DATASETS_CACHE": f"{tmp_path}/rows",
        "RAY_AUTH_TOKEN": "s" * 64,  # without them: the next test
        "RAY_AUTH_MODE": "token",
    }
    toy_task.experiment["compute"] |= {"workers": 2, "storage": str(tmp_path / "runs #1 100% a:b äö")}
    toy_task.experiment["prompt"]["length"] = 10
    toy_task.experiment["train"] |= {"steps": 60, "learning_rate": 0.3}
    command = [sys.executable, "-m", "ptuning", "train", str(write_toml(toy_task.experiment)), "--json"]
    seen = set[str]()
    with subprocess.Popen(
        command, env=bare, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    ) as running:
        while running.poll() is None:
            seen |= {title(each) for each in psutil.Process(running.pid).children(recursive=True)}
            time.sleep(0.1)
        stdout, stderr = running.communicate()
    assert running.returncode == 0, stderr
    summary = json.loads(stdout.splitlines()[-1])
    assert summary["name"] == "toy" and summary["steps"] == 60 and summary["run_id"]
    assert summary["metrics"]["test_accuracy"] > 0.9
    assert (Path(summary["soft_prompt"]) / "adapter_model.safetensors").is_file()
    assert "base: whole on each of 2 workers, nothing is gathered" in stderr  # zero.stage = "auto"
    assert "base loaded by 2 workers (100%, 100% of it each), float32, shared prefix" in stderr
    assert json.loads((Path(summary["soft_prompt"]) / "card.json").read_text())["experiment"]["zero"]["stage"] == 0
    assert "Traceback" not in stderr and "Warning" not in stderr
    actors = {each.split("::")[1].split(".")[0] for each in seen if each.startswith("ray::") and "Agent" not in each}
    assert {"RayTrainWorker", "EventQueue"} <= actors and not actors & {"PlacementGroupCleaner", "_AutoscalingCoordinatorActor"}
    code, said = invoke(*command[3:-1])
    assert code == 2 and "continue it with --resume" in said


@pytest.mark.fast
def test_a_home_in_which_ray_cannot_keep_its_token_is_one_sentence() -> None:
    code = "from ptuning.cli.app import main; from ptuning.cluster import connection; connection.join_ray(None)"
    environment = {"PATH": os.environ["PATH"], "HOME": "/proc/nowhere", "LC_ALL": "C"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ptuning.errors.UserError: /proc/nowhere") and "Ray keeps its token there; set HOME to" in last


@pytest.mark.fast
@pytest.mark.parametrize(
    "stranger, words", [("serve.host=0.0.0.0", "can be reached from other machines"), (None, "Ray's token")]
)
def test_a_server_that_strangers_reach_is_not_begun(toy_task, write_toml: Write, monkeypatch, stranger, words) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token" if stranger else "disabled")
    monkeypatch.setitem(sys.modules, "ptuning.serving.server", None)  # what would start it
    code, said = invoke("serve", str(write_toml(toy_task.experiment)), *filter(None, [stranger]))
    assert code == 2 and words in said and "--insecure" in said
