"""Runs clients against a real server, each in an environment of its own, and writes the table of docs/reference/clients.md.

    python tests/clients/run.py [CLIENT ...] [--environments FOLDER] [--write]

The environments are made with uv if it is there, else with venv and pip; those of Node with npm. They are kept in the folder.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
PAGE = REPOSITORY / "docs" / "reference" / "clients.md"


@dataclass(frozen=True)
class Client:
    """`quick`: the nightly tests run it."""

    title: str
    script: str
    packages: tuple[str, ...]
    quick: bool = True


CLIENTS = {
    "openai": Client("openai (Python)", "openai_python.py", ("openai", "pydantic")),
    "openai_node": Client("openai (Node)", "openai_node.mjs", ("openai",), quick=False),
    "instructor": Client("instructor", "instructor_python.py", ("instructor",)),
    "langchain": Client("LangChain", "langchain_python.py", ("langchain-openai",)),
    "langchain_node": Client(
        "LangChain.js", "langchain_node.mjs", ("@langchain/openai", "@langchain/core", "zod"), quick=False
    ),
    "pydantic_ai": Client("pydantic-ai", "pydantic_ai_python.py", ("pydantic-ai-slim[openai]",)),
    "openai_agents": Client("OpenAI Agents", "openai_agents_python.py", ("openai-agents",)),
    "ai_sdk": Client("Vercel AI SDK", "ai_sdk_node.mjs", ("ai", "@ai-sdk/openai", "zod"), quick=False),
    "litellm": Client("LiteLLM", "litellm_python.py", ("litellm",)),
    "llama_index": Client("LlamaIndex", "llama_index_python.py", ("llama-index-llms-openai-like",)),
    "dspy": Client("DSPy", "dspy_python.py", ("dspy",)),
    "haystack": Client("Haystack", "haystack_python.py", ("haystack-ai",)),
    "inspect": Client("Inspect", "inspect_python.py", ("inspect-ai", "openai")),
    "lm_eval": Client("lm-evaluation-harness", "lm_eval_python.py", ("lm-eval[api]", "transformers"), quick=False),
    "gradio": Client("Gradio", "gradio_python.py", ("gradio", "openai"), quick=False),
    "guidellm": Client("GuideLLM", "guidellm_python.py", ("guidellm",), quick=False),
    "aiperf": Client("AIPerf", "aiperf_python.py", ("aiperf",), quick=False),
}


def interpreter(name: str, client: Client, environments: Path) -> list[str]:
    """The command that runs the client's script, in its environment, which is made if it is not there."""
    folder = environments / name
    made = folder / ".made"
    if client.script.endswith(".mjs"):
        if not made.exists():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "package.json").write_text('{"private": true, "type": "module"}\n', encoding="utf-8")
            subprocess.run(["npm", "install", "--silent", *client.packages], cwd=folder, check=True)
            made.touch()
        shutil.copy(HERE / client.script, folder)  # Node looks for packages beside the script
        return ["node", client.script]
    python = folder / "bin" / "python"
    if not made.exists():
        uv = shutil.which("uv")
        if uv:
            subprocess.run([uv, "venv", "--quiet", "--clear", "--python", sys.executable, str(folder)], check=True)
            subprocess.run([uv, "pip", "install", "--quiet", "--python", str(python), *client.packages], check=True)
        else:
            subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
            subprocess.run([str(python), "-m", "pip", "install", "--quiet", *client.packages], check=True)
        made.touch()
    return [str(python), str(HERE / client.script)]


def run(name: str, world: SimpleNamespace, environments: Path) -> dict[str, object]:
    """What a client reports: its version, and what has worked.

    Raises:
        AssertionError: the script failed.
    """
    client = CLIENTS[name]
    command = interpreter(name, client, environments)
    kept = {key: os.environ[key] for key in ("PATH", "HOME", "LANG", "TMPDIR") if key in os.environ}
    told = {"CLIENT_URL": world.url, "CLIENT_KEY": world.key, "CLIENT_BASE": str(world.base), "CLIENT_TORCH": sys.executable}
    quiet = {
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "OPENAI_AGENTS_DISABLE_TRACING": "1",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    }
    folder = environments / name if command[0] == "node" else HERE
    done = subprocess.run(command, cwd=folder, env=kept | told | quiet, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{name}: {done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    reported: dict[str, object] = json.loads(done.stdout.strip().splitlines()[-1])
    return reported


@contextlib.contextmanager
def served(folder: Path) -> Iterator[SimpleNamespace]:
    """A server with a base that has a chat template, and soft prompts with labels, for text and for conversations."""
    sys.path.insert(0, str(REPOSITORY / "tests"))
    from chat_bases import FORMS, tokenizer_of
    from conftest import tiny_base
    from serving_world import serving
    from test_http_api import TUNER, publish_soft_prompt

    from ptuning.settings.data import Template

    base, form = folder / "tiny-base", FORMS["llama"]
    tokenizer = tokenizer_of(form, None)
    tiny_base("llama", vocab_size=len(tokenizer), max_position_embeddings=8192).save_pretrained(base)
    tokenizer.save_pretrained(base)
    jobs = {"tuning": {"workers": 1, "trials": 1}, "train": {"steps": 20, "evaluate_every": 10, "batch_size": 8}}
    with serving(folder, base, replicas=1, tables=jobs) as world:
        for seed, (name, labels) in enumerate({"talk": None, "kinds": ("fruit", "tool")}.items(), 20):
            template = Template(chat_template=form.template, labels=labels)
            publish_soft_prompt(world.registry, base, folder / "scratch", name, seed, template=template, max_new_tokens=8)
        time.sleep(5)  # until the server has looked
        yield SimpleNamespace(url=world.url, key=TUNER, base=base)


def page(rows: list[tuple[str, str, str]]) -> str:
    """The table, as Markdown."""
    head = """# Clients

Clients that were run against `ptuning serve`, each in an environment of its own, by `python tests/clients/run.py --write`. The
quick ones run every night.

| client | version | what was run, without an error |
|---|---|---|
"""
    return head + "".join(f"| {title} | {version} | {ran} |\n" for title, version, ran in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("clients", nargs="*", metavar="CLIENT", help=", ".join(CLIENTS))
    parser.add_argument("--environments", type=Path, default=REPOSITORY / "build" / "clients")
    parser.add_argument("--write", action="store_true", help="write the page from this run")
    parser.add_argument("--url", help="a server that is already running, with --key and --base")
    parser.add_argument("--key", default="")
    parser.add_argument("--base", default="")
    options = parser.parse_args()
    rows, failed = [], []
    with contextlib.ExitStack() as stack:
        if options.url:
            world = SimpleNamespace(url=options.url, key=options.key, base=options.base)
        else:
            world = stack.enter_context(served(Path(stack.enter_context(tempfile.TemporaryDirectory()))))
        for name in options.clients or CLIENTS:
            try:
                reported = run(name, world, options.environments)
            except (AssertionError, subprocess.SubprocessError) as error:
                failed.append(name)
                print(f"{name}: FAILED\n{error}", flush=True)
                continue
            ran = ", ".join(map(str, reported["ran"]))  # type: ignore[call-overload]
            rows.append((CLIENTS[name].title, str(reported["version"]), ran))
            print(f"{name} {reported['version']}: {ran}", flush=True)
    if options.write:
        PAGE.write_text(page(rows), encoding="utf-8")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
