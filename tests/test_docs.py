"""Every command that a page shows works: understood by its program, and run as a newcomer would. And what a page says of
settings, commands, tests and other projects is what the code says."""

from __future__ import annotations

import ast
import csv
import io
import json
import re
import shlex
import time
import tomllib
import xml.etree.ElementTree
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import generate
import pictures
import pytest
import typer
import yaml
from conftest import REPOSITORY
from test_cluster import PINS, check_command, shell
from typer.testing import CliRunner, Result

from ptuning.cli.app import app
from ptuning.config import Experiment, parse_experiment

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning:mlflow.*", "ignore:.*type hint")

WALK = (
    "README.md",
    "docs/getting-started.md",
    *(
        f"docs/guides/{name}.md"
        for name in (
            "data",
            "search",
            "distill",
            "registry",
            "predict",
            "serving",
            "tuning-service",
            "batches",
            "page",
            "python",
            "cluster",
            "gpu",
        )
    ),
)
"""The pages for users, in the order of the site. What one machine can do of them is run, in this order."""
WRITTEN = sorted(str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "docs").rglob("*.md"))
PAGES = tuple(
    dict.fromkeys([*WALK, "CONTRIBUTING.md", "cluster/README.md", *WRITTEN, "SECURITY.md", "BENCHMARKS.md", "CHANGELOG.md"])
)
LANGUAGES = {"sh", "console", "csv", "python", "text", "toml", "yaml"}

ELSEWHERE = {
    "make demo": "test_demo.py::test_a_demo_that_is_interrupted_leaves_nothing",
    "make test": "test_docs.py::test_the_first_hour",
    "ptuning train jobs/sentiment.toml name=longer": "test_cli.py::test_the_whole_command_with_two_workers",
    "ptuning search jobs/sentiment.toml name=warm": "test_search.py::test_a_search_under_asha_",
    "ptuning search jobs/sentiment.toml name=bred": "test_search.py::test_pbt_",
    "ptuning train tickets.toml name=tickets-qwen": "test_cli.py::test_the_whole_command_with_two_workers",
    "ptuning search found": "test_interventions.py::test_the_other_trials_of_a_search_notice_nothing",
    "ptuning search tickets.toml": "test_docs.py::test_the_first_hour",
    "ptuning serve jobs/sentiment.toml tuning.workers=1": "test_tuning_story.py::test_the_page",
    "ptuning serve": "test_serve.py::test_the_stock_client_through_the_proxy",
    "ptuning ask": "test_serve.py::test_ask",
    "ptuning submit train": "test_submit.py::test_train_detach_kill_find_stop_resume",
    "ptuning submit serve": "test_submit.py::test_what_is_served_lives_on_until_it_is_stopped",
    "ptuning jobs": "test_submit.py::test_train_detach_kill_find_stop_resume",
    "ptuning doctor": "test_doctor.py::test_this_machine_is_fine",
    "pip install": "test_cluster.py::test_the_image_is_built_from_what_is_there",
    "python3 -m venv": "test_demo.py::test_a_demo_that_is_interrupted_leaves_nothing",
    ".": "test_demo.py::test_a_demo_that_is_interrupted_leaves_nothing",
    "sky launch": "test_skypilot.py::test_two_nodes_run_the_command_and_end",
    "kubectl apply": "test_manifests.py::test_what_is_built_is_what_the_operators_take",
    "docker build": "test_cluster.py::test_the_image_is_built_from_what_is_there",
    "cluster/up-local.sh": "test_submit.py::cluster",
    "eval": "test_submit.py::cluster",
}
"""Commands, by how they begin, that need what the first hour here has not: more time, a server, a cluster. And the test that
runs them, or their like. All others of the pages for users are run by `test_the_first_hour`."""

SMALL = {
    "train": ("train.steps=2", "train.evaluate_every=2", "compute.workers=1"),
    "search": ("train.steps=2", "train.evaluate_every=2", "compute.workers=1", "search.trials=2", "search.slots=2",
               "search.finalists=1", "search.seeds=1"),
    "compress": ("train.steps=2", "train.evaluate_every=2", "compute.workers=1"),
}  # fmt: skip
"""What is appended so that an hour takes half a minute; and to the built-in task, its first rows only."""
FEW = tuple(f"data.{split}=few-{split}.jsonl" for split in ("train", "validation", "test"))


@dataclass(frozen=True)
class Fence:
    page: str
    language: str
    text: str


def fences(page: str) -> list[Fence]:
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Fence(page, language, body) for language, body in found]


def commands(page: str) -> list[list[str]]:
    """The commands of a page in order, as words."""
    lines = [line for fence in fences(page) if fence.language == "sh" for line in fence.text.splitlines()]
    return [words for line in lines for words in shell(re.sub(r"(^|\s)#.*", "", line)) if words]


def only(language: str, containing: str, page: str = "README.md") -> str:
    (found,) = [fence.text for fence in fences(page) if fence.language == language and containing in fence.text]
    return found


def elsewhere(words: list[str]) -> str | None:
    line = " ".join(words)
    return next((test for start, test in ELSEWHERE.items() if f"{line} ".startswith(f"{start} ")), None)


ALL = [pytest.param(page, words, id=" ".join(words)[:80]) for page in PAGES for words in commands(page)]
FIRST_HOUR = [
    list(words)
    for words in dict.fromkeys(tuple(words) for page in WALK for words in commands(page))
    if not elsewhere(list(words))
]
"""Each once: a page may show again what one before it has shown."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a newcomer stands: the repository's files, and the own data of the README."""
    for name in ("jobs", "tests"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    head, *rows = csv.reader(io.StringIO(only("csv", "subject")))
    for split in ("train", "validation", "test"):
        with (tmp_path / f"tickets-{split}.csv").open("w", encoding="utf-8", newline="") as file:
            more = [[f"{subject} {split} {number}", body, team] for number in range(8) for subject, body, team in rows]
            csv.writer(file).writerows([head, *more])
        few = (REPOSITORY / "ptuning" / "builtin" / "tasks" / "sentiment" / f"{split}.jsonl").read_text(encoding="utf-8")
        (tmp_path / f"few-{split}.jsonl").write_text("".join(few.splitlines(keepends=True)[:40]), encoding="utf-8")
    (tmp_path / "tickets.toml").write_text(only("toml", "tickets"), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.fast
@pytest.mark.parametrize("page", PAGES)
def test_every_fence_says_what_it_holds(page: str) -> None:
    typed = r"(?:\$ .*|(?:ptuning|make|python|docker|kubectl|ray|sbatch|sky|mlflow|serve|cluster/\S+) .*)"
    for fence in fences(page):
        assert fence.language in LANGUAGES, fence
        if fence.language == "text":
            assert not [line for line in fence.text.splitlines() if re.fullmatch(typed, line)], fence


@pytest.mark.fast
@pytest.mark.parametrize(("page", "words"), ALL)
def test_every_command_is_understood(page: str, words: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, *arguments = words
    if "--shared" in words:  # behind the line that takes the address from the local cluster
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:8265")
    if program in ("ptuning", "ray", "mlflow"):
        check_command([word for word in words if word != "&"], folder)
    elif program == "make":
        makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
        assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in arguments)
    elif program.startswith("cluster/"):
        assert " ".join(words) in (REPOSITORY / program).read_text(encoding="utf-8"), "its own usage does not know it"
    elif program == "sbatch":
        assert (REPOSITORY / arguments[0]).is_file()
        check_command(["ptuning", *arguments[1:]], folder)
    elif program == "pip":
        assert arguments[:2] == ["install", "-c"] and (REPOSITORY / arguments[2]).is_file()
        assert arguments[3] in (".", ".[vllm]", *PINS) and len(arguments) == 4
    elif program == "python3":
        assert arguments[:2] == ["-m", "venv"]
    elif program == ".":
        assert arguments[0].endswith("/bin/activate")
    elif program in ("docker", "kubectl", "sky"):
        named = [word for word in arguments if word.startswith("cluster/")]
        assert all((REPOSITORY / name).exists() for name in named)
    else:
        assert program == "eval", f"{page}: nobody checks {words}"


@pytest.mark.fast
def test_every_promise_names_its_tests_and_when_they_run() -> None:
    page = (REPOSITORY / "docs" / "reliability.md").read_text(encoding="utf-8")
    table = page.partition("| What happens | What is promised | Test |")[2].partition("\n## ")[0]
    found = 0
    for file, names in re.findall(r"`(test_\w+)`:([^;|]+)", table):
        source = (REPOSITORY / "tests" / f"{file}.py").read_text(encoding="utf-8")
        for name, said in re.findall(r"(\w+)( \(nightly\)| \(`-m soak`\))?", names):
            decorated = re.search(rf"((?:^@.*\n(?:    .*\n|\).*\n)*)*)^def \w*{name}\w*\(", source, re.MULTILINE)
            assert decorated, f"{file}: no test or fixture is called {name}"
            marked = [mark for mark in ("nightly", "soak") if f"@pytest.mark.{mark}" in decorated[1]]
            assert [mark for mark in ("nightly", "soak") if mark in said] == marked, f"{file}: {name}"
            found += 1
    assert found > 30


@pytest.mark.fast
@pytest.mark.parametrize("page", ["docs/reliability.md", "SECURITY.md"])
def test_every_test_that_a_page_names_is_there(page: str) -> None:
    files = {path.stem: path.read_text(encoding="utf-8") for path in (REPOSITORY / "tests").glob("test_*.py")}
    known = {
        *files,
        *(name for source in files.values() for name in re.findall(r"^(?:async )?def (test_\w+)", source, re.MULTILINE)),
    }
    assert set(re.findall(r"`(test_\w+)`", (REPOSITORY / page).read_text(encoding="utf-8"))) <= known


@pytest.mark.fast
def test_the_tests_that_run_the_others_are_there() -> None:
    for start, test in ELSEWHERE.items():
        file, _, name = test.partition("::")
        assert f"def {name}" in (REPOSITORY / "tests" / file).read_text(encoding="utf-8"), test
        shown = [words for page in WALK for words in commands(page) if f"{' '.join(words)} ".startswith(f"{start} ")]
        assert shown, f"no page shows {start} any more"


@pytest.mark.fast
@pytest.mark.parametrize("page", PAGES)
def test_commands_in_running_text_exist(page: str) -> None:
    text = re.sub(r"^```.*?^```$", "", (REPOSITORY / page).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    spans = [span for span in re.findall(r"`([^`\n]+)`", text) if span.startswith(("ptuning ", "make "))]
    for span in spans:
        program, *words = shlex.split(span)
        if program == "make":
            assert re.search(rf"^{words[0]}:", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.MULTILINE), span
            continue
        command: Any = typer.main.get_command(app)
        while hasattr(command, "commands") and words and not words[0].startswith("-"):
            command = command.commands[words.pop(0)]
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known, span


def leaves(command: Any, *path: str) -> Iterator[tuple[str, Any]]:
    """All commands, with what is typed for them."""
    if not hasattr(command, "commands"):
        yield " ".join(path), command
    for name, inner in getattr(command, "commands", {}).items():
        yield from leaves(inner, *path, name)


LEAVES = dict(leaves(typer.main.get_command(app)))


@pytest.mark.fast
@pytest.mark.parametrize("name", LEAVES)
def test_every_command_has_an_example_and_speaks_json(name: str, folder: Path) -> None:
    assert "--json" in {option for parameter in LEAVES[name].params for option in parameter.opts}
    (example,) = re.findall(r"^Example: (ptuning .*)$", LEAVES[name].help, re.MULTILINE)
    assert example.startswith(f"ptuning {name} ")
    check_command(shlex.split(example), folder)
    first = LEAVES[name].help.split(".")[0]
    assert len(first) <= 64, "it is cut in the list of commands"


@pytest.mark.fast
def test_the_search_table_is_one(folder: Path) -> None:
    tables = tomllib.loads((folder / "jobs" / "sentiment.toml").read_text(encoding="utf-8"))
    parse_experiment(tables | tomllib.loads(only("toml", "[search]", "docs/guides/search.md")))


@pytest.mark.fast
@pytest.mark.parametrize("fence", [fence for page in PAGES for fence in fences(page) if fence.language == "python"])
def test_python_compiles(fence: Fence) -> None:
    compile(fence.text, fence.page, "exec")


@pytest.mark.fast
def test_python_names_what_the_package_has() -> None:
    import ptuning

    shown = [fence.text for page in PAGES for fence in fences(page) if fence.language == "python"]
    assert set(re.findall(r"\bptuning\.(\w+)", "\n".join(shown))) <= set(dir(ptuning))


@pytest.mark.fast
def test_toml_is_toml() -> None:
    for fence in (fence for page in PAGES for fence in fences(page) if fence.language == "toml"):
        tomllib.loads(fence.text)


@pytest.mark.fast
def test_yaml_is_yaml() -> None:
    assert all(yaml.safe_load(fence.text) for page in PAGES for fence in fences(page) if fence.language == "yaml")


@pytest.mark.fast
@pytest.mark.parametrize("page", ["README.md", "docs/guides/data.md"])
def test_the_refusal_reads_as_shown(page: str, folder: Path) -> None:
    typed, *shown = only("console", "$ ", page).splitlines()
    done = CliRunner().invoke(app, shlex.split(typed)[2:])
    assert (done.exit_code, done.output.splitlines()) == (2, shown)


@pytest.mark.fast
def test_your_own_data_takes_twelve_lines() -> None:
    assert len(only("toml", "tickets").splitlines()) == 12


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.timeout(800)
def test_the_first_hour(local_ray: None, folder: Path) -> None:
    """All that the pages for users show and one machine can do, in their order and in one folder."""

    def type_in(words: list[str]) -> Result:
        few = FEW if words[1] in SMALL and words[2].startswith("jobs/") else ()
        return CliRunner().invoke(app, [*words[1:], *SMALL.get(words[1], ()), *few])

    assert {words[1] for words in FIRST_HOUR} >= {"train", "search", "config", "prompts", "compare", "plan"}
    for words in FIRST_HOUR:
        began = time.monotonic()
        done = type_in(words)
        print(f"{time.monotonic() - began:.1f} s  {shlex.join(words)}\n{done.stderr}{done.stdout[:300]}")
        assert done.exit_code == 0, (words, done.stderr, done.exception)
        assert "arning" not in done.stderr, (words, done.stderr)
    for name in ("sentiment", "found", "tickets"):
        record = json.loads((folder / "runs" / name / "run.json").read_text(encoding="utf-8"))
        assert record["status"] == "finished"
        for file in ("adapter_config.json", "adapter_model.safetensors", "card.json", "manifest.json"):
            assert (folder / "runs" / name / record["summary"]["soft_prompt"] / file).is_file()


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.timeout(800)
def test_the_python_of_the_readme(local_ray: None, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As it stands there, but for fewer steps and rows."""
    less = ", ".join(f'"{each}"' for each in (*SMALL["train"], *FEW))
    script = only("python", "import ptuning").replace('"train.steps=100"', less)
    assert less in script
    exec(compile(script, "README.md", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out.splitlines()[-1] in ("['Negative']", "['Positive']")


LINK = re.compile(r"\[[^\]\n]*\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"")


def slug(title: str) -> str:
    """The anchor of a heading, on the site as in a checkout."""
    return re.sub(r"[^\w\- ]", "", title.replace("`", "").lower()).strip().replace(" ", "-")


@pytest.mark.fast
@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = re.sub(r"^```.*?^```$", "", (REPOSITORY / page).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    generated = {f"docs/{name}" for name in generate.GENERATED}
    for link in ("".join(found) for found in LINK.findall(text)):
        if re.match(r"https?:", link):
            continue
        target, _, anchor = link.partition("#")
        file = ((REPOSITORY / page).parent / target).resolve() if target else REPOSITORY / page
        if str(file.relative_to(REPOSITORY)) in generated:
            continue
        assert file.is_file(), link
        if anchor:
            titles = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in map(slug, titles), link


@pytest.mark.fast
def test_the_site_has_every_page() -> None:
    nav = yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]

    def named(entries: Any) -> Iterator[str]:
        for entry in entries:
            for inner in entry.values():
                yield from [inner] if isinstance(inner, str) else named(inner)

    written = {name.removeprefix("docs/") for name in WRITTEN}
    assert sorted(named(nav)) == sorted({*written, *generate.GENERATED, *generate.INCLUDED.values()})


@pytest.mark.fast
def test_the_reference_has_every_key_and_every_command() -> None:
    keys, typed = generate.experiment_reference(), generate.command_reference()
    for name, field in Experiment.model_fields.items():
        inner = getattr(field.annotation, "model_fields", None)
        for key in [f"{name}.{each}" for each in inner] if inner else [name]:
            assert f"| `{key}` |" in keys
    for name, command in LEAVES.items():
        said = typed.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
        assert all(f"{option}" in said for each in command.params for option in each.opts if option.startswith("--")), name


@pytest.mark.fast
def test_links_of_a_page_are_those_of_the_site() -> None:
    text = '[a](BENCHMARKS.md#serving) [b](docs/guides/gpu.md) [c](jobs/demo.py) <img src="docs/one-base.svg">\n'
    assert generate.relink(text, "README.md", "index.md") == (
        '[a](benchmarks.md#serving) [b](guides/gpu.md) c <img src="one-base.svg">\n'
    )
    assert generate.relink("[a](../../README.md)", "docs/guides/gpu.md", "guides/gpu.md") == "[a](../index.md)"


PRINTED = """
$ ptuning train a.toml
train: 2 rows, 9 tokens

$ ptuning serve a.toml
  serving at http://127.0.0.1:1/v1

Done in 3 s
"""


@pytest.mark.fast
def test_terminal_pictures_show_what_was_printed() -> None:
    said = pictures.commands(PRINTED)
    assert said == {
        "ptuning train a.toml": "train: 2 rows, 9 tokens",
        "ptuning serve a.toml": "  serving at http://127.0.0.1:1/v1",
    }
    shown = "".join(xml.etree.ElementTree.fromstring(pictures.terminal(said, "a")).itertext()).replace("\xa0", " ")
    assert all(words in shown for words in ("ptuning serve a.toml", "train: 2 rows, 9 tokens"))


@pytest.mark.fast
@pytest.mark.parametrize("picture", sorted(pictures.PICTURES.glob("*.svg")), ids=lambda picture: picture.stem)
def test_terminal_pictures_are_those_of_the_script(picture: Path) -> None:
    text = picture.read_text(encoding="utf-8")
    shown = "".join(xml.etree.ElementTree.fromstring(text).itertext()).replace("\xa0", " ")
    assert any(f"$ {command}" in shown for command in pictures.PARTS[picture.stem]) and picture.stat().st_size < 50_000
    assert not re.search(r"(?:href|src|url)\s*[=(]\s*[\"']?(?:https?:)?//", text), "nothing is fetched"


@pytest.mark.fast
def test_the_picture_is_drawn_for_light_and_dark() -> None:
    picture = (REPOSITORY / "docs" / "one-base.svg").read_text(encoding="utf-8")
    xml.etree.ElementTree.fromstring(picture)
    assert "prefers-color-scheme: dark" in picture and "http://www.w3.org/2000/svg" in picture
    assert not re.search(r"(?:href|src|url)\s*[=(]\s*[\"']?(?:https?:)?//", picture), "nothing is fetched"


UPSTREAM = (REPOSITORY / "docs" / "upstream.md").read_text(encoding="utf-8")
ROWS = [
    pytest.param(*(cell.strip() for cell in row.strip("| \n").split(" | ")), id=row[:60])
    for row in UPSTREAM.splitlines()
    if row.startswith("| `")
]


@pytest.mark.fast
@pytest.mark.parametrize(("symbols", "file", "why", "test"), ROWS)
def test_upstream_internals_are_where_the_page_says(symbols: str, file: str, why: str, test: str) -> None:
    source = (REPOSITORY / "ptuning" / file.strip("`")).read_text(encoding="utf-8")
    for symbol in re.findall(r"`([^`]+)`", symbols):
        assert symbol.rpartition(".")[2] in source, symbol
    assert why and (test.startswith("none: ") or "`" in test)
    for module, names in re.findall(r"`(test_\w+)`:([^;|]+)", test):
        tests = (REPOSITORY / "tests" / f"{module}.py").read_text(encoding="utf-8")
        for name in re.findall(r"\w+", names):
            assert re.search(rf"^def \w*{name}\w*\(", tests, re.MULTILINE), f"{module}: {name}"


@pytest.mark.fast
def test_upstream_internals_are_those_of_the_pinned_versions() -> None:
    further = (REPOSITORY / "constraints-vllm.txt").read_text(encoding="utf-8").splitlines()
    for name, version in re.findall(r"^## (\w+) ([\d.]+)$", UPSTREAM, re.MULTILINE):
        assert PINS.get(name) == version or f"{name}=={version}" in further


FOREIGN = ("ray", "torch", "transformers", "deepspeed", "uvicorn", "mlflow", "datasets", "vllm")


@pytest.mark.fast
def test_every_private_import_is_on_the_page_of_upstream_internals() -> None:
    for path in (REPOSITORY / "ptuning").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in FOREIGN:
                for alias in node.names:
                    if re.search(r"(^|\.)_", f"{node.module}.{alias.name}"):
                        assert alias.name in UPSTREAM, f"{path.name}: {node.module}.{alias.name}"
