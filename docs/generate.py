"""An mkdocs hook: it generates pages from existing sources, so that nothing is written twice.

* The reference of experiment files comes from the pydantic classes of `ptuning.config`, that of the command line from typer.
* The files of the repository's top level (README, SECURITY, ...) become pages unchanged.
* Links to files of the repository work in a checkout as written, and on the site as links between pages.
"""

from __future__ import annotations

import html
import json
import posixpath
import re
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

REPOSITORY = Path(__file__).resolve().parent.parent
DOCS = "docs"

INCLUDED = {
    "README.md": "index.md",
    "cluster/README.md": "guides/cluster-setup.md",
    "SECURITY.md": "security.md",
    "BENCHMARKS.md": "benchmarks.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
"""Files of the repository that are pages of the site: their path -> the path of the page."""

LINK = re.compile(r"(?P<before>\[(?P<text>[^\]\n]*)\]\()(?P<target>[^)\s]+)(?P<after>\))")
SOURCE = re.compile(r'(?P<before>\b(?:src|href)=")(?P<target>[^"]+)(?P<after>")')


# -- the experiment file ------------------------------------------------------------------------------------------------


def experiment_reference() -> str:
    """Every table and key of an experiment file, from the classes that check it."""
    from ptuning.config import Experiment

    lines = [
        "# The experiment file",
        "",
        "One TOML file determines a result. Every key can also be set on the command line, as in `train.steps=100`. "
        "This page is generated from the classes that validate the file. `ptuning config --schema` prints the same as a JSON "
        "schema; `ptuning config EXPERIMENT` prints an experiment with all defaults.",
        "",
        "Unknown keys, invalid values and missing keys are refused before anything starts, in one sentence with the fix.",
    ]
    tables = {name: field for name, field in Experiment.model_fields.items() if _is_table(field.annotation)}
    own = {name: field for name, field in Experiment.model_fields.items() if name not in tables}
    lines += ["", "## At the top of the file", "", *_key_table("", own)]
    for name, field in tables.items():
        table: Any = field.annotation
        lines += ["", f"## `[{name}]`", "", _one_line(table.__doc__), "", *_key_table(name, table.model_fields)]
    return "\n".join([*lines, ""])


def _is_table(annotation: Any) -> bool:
    from ptuning.settings.fields import Table

    return isinstance(annotation, type) and issubclass(annotation, Table)


def _key_table(table: str, fields: dict[str, Any]) -> Iterator[str]:
    yield "| key | value | default | meaning |"
    yield "|---|---|---|---|"
    for name, field in fields.items():
        key = f"{table}.{name}" if table else name
        meaning = _cell(_one_line(field.description or ""))
        inner = next((each for each in (field.annotation, *typing.get_args(field.annotation)) if _is_table(each)), None)
        kind = "table" if inner else _cell(value_kind(field.annotation, field.metadata))
        yield f"| `{key}` | {kind} | {_default(field)} | {meaning} |"
        if inner:
            yield from list(_key_table(key, inner.model_fields))[2:]  # without the head


def _default(field: Any) -> str:
    if field.is_required():
        return "required"
    value = field.default
    return "" if value is None else f"`{json.dumps(value, ensure_ascii=False)}`"


def value_kind(annotation: Any, metadata: Any = ()) -> str:
    """The values that a field accepts: the type in TOML terms, with its limits."""
    from pydantic import JsonValue

    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return value_kind(arguments[0], arguments[1:])
    if origin is typing.Literal:
        return ", ".join(f"`{json.dumps(value)}`" for value in arguments)
    if origin in (typing.Union, types.UnionType):
        kinds = [value_kind(each, metadata) for each in arguments if each is not type(None)]
        return " or ".join(kinds)
    if origin is tuple:
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return f"list of {value_kind(arguments[0])}"
        return "[" + ", ".join(value_kind(each) for each in arguments) + "]"
    if origin is dict:
        return "table" if arguments[1] is JsonValue else f"table of {value_kind(arguments[1])}"
    kind = {str: "text", int: "whole number", float: "number", bool: "`true` or `false`"}[annotation]
    limits = list(_limits(metadata))
    return f"{kind} {' and '.join(limits)}" if limits else kind


def _limits(metadata: Any) -> Iterator[str]:
    signs = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
    for each in metadata:
        for one in getattr(each, "metadata", [each]):  # pydantic keeps a Field's limits as a list
            for name, sign in signs.items():
                limit = getattr(one, name, None)
                if limit is not None:
                    yield f"{sign} {limit:g}"


# -- the command line ---------------------------------------------------------------------------------------------------


def command_reference() -> str:
    """Every command with its arguments and options, from the functions that implement it."""
    import typer

    from ptuning.cli.app import app

    lines = [
        "# The command line",
        "",
        "This page is generated from the commands; `--help` after a command prints the same. Every command accepts `--json`. "
        "The exit code is 0 for success, 2 for an invalid experiment, option or input, and 1 for a failed run.",
    ]
    for name, command in leaves(typer.main.get_command(app)):
        lines += ["", f"## {name}", "", *_command(name, command)]
    return "\n".join([*lines, ""])


def leaves(command: Any, *path: str) -> Iterator[tuple[str, Any]]:
    """All commands without subcommands, with their full names."""
    if not hasattr(command, "commands"):
        yield " ".join(path), command
    for name, inner in getattr(command, "commands", {}).items():
        yield from leaves(inner, *path, name)


def _command(name: str, command: Any) -> Iterator[str]:
    context = command.make_context(name, [], resilient_parsing=True)
    said, _, example = (command.help or "").partition("Example: ")
    usage = " ".join(command.collect_usage_pieces(context))
    yield from (" ".join(said.split()), "", "```text", f"usage: ptuning {name} {usage}", "```")
    if example:
        yield from ("", "```sh", " ".join(example.split()), "```")
    yield from ("", "| argument or option | meaning |", "|---|---|")
    for parameter in command.params:
        written, meaning = parameter.get_help_record(context)
        yield f"| {_code(written)} | {_cell(meaning)} |"


PYTHON: dict[str, tuple[str, ...]] = {
    "Functions": tuple(f"api.{name}" for name in ("train", "search", "load", "predict", "serve", "plan")),
    "Experiment": ("config.Experiment",),
    "Results": ("training.result.TrainResult", "searching.result.SearchResult", "searching.result.Finalist",
                "searching.result.Leaderboard", "prediction.result.PredictResult"),
    "Soft prompts": ("inference.predictor.Predictor", "model.soft_prompt.SoftPrompt", "model.soft_prompt.Card"),
    "Registry": ("registry_api.Registry", "registry.registry.Version", "registry.gate.Promotion",
                 "registry.inspection.Inspection", "serving.compare.Opinion"),
    "Server": ("serving.server.Server",),
    "Errors": ("errors.UserError", "errors.RunFailed"),
}  # fmt: skip
"""Sections of the Python reference, and their objects in the package."""


def python_reference() -> str:
    """The Python API: mkdocstrings reads the docstrings."""
    lines = [
        "# The Python API",
        "",
        "This page is generated from the docstrings. `ptuning` offers the functions and the main classes directly, as in "
        "`ptuning.train`; the other classes are those of their results. `import ptuning` loads neither torch nor Ray; the "
        "first call does. [The guide](../guides/python.md) has examples.",
    ]
    for title, names in PYTHON.items():
        lines += ["", f"## {title}", *(line for name in names for line in ("", f"::: ptuning.{name}"))]
    return "\n".join([*lines, ""])


def metrics_reference() -> str:
    """The metrics of a server, from their definitions."""
    from ptuning.serving.metrics import DEFINITIONS

    lines = [
        "# Metrics",
        "",
        "This page is generated from the code. `/metrics` of a server contains these metrics of all its replicas; "
        "[Serve](../guides/serving.md#metrics) explains how to scrape and show them. Every series but `ptuning_replicas` has "
        "the label `replica`. The label `model` is the version that answers, as `sentiment:3`; `none` if the request named no "
        "known one; `other` for versions beyond `serve.metrics_models`.",
        "",
        "| metric | type | labels | meaning |",
        "|---|---|---|---|",
    ]
    for each in DEFINITIONS:
        labels = ", ".join(f"`{label}`" for label in each.labels)
        lines.append(f"| `{each.name}` | {each.kind} | {labels} | {_cell(each.text)} |")
    return "\n".join([*lines, ""])


# -- text ---------------------------------------------------------------------------------------------------------------


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())


def _cell(text: str) -> str:
    """Text for a cell of a table: names with underscores stay as they are, and no bar ends the cell."""
    return text.replace("|", r"\|").replace("<", "&lt;")


def _code(text: str) -> str:
    return f"<code>{html.escape(text)}</code>".replace("|", "&#124;")


GENERATED: dict[str, Callable[[], str]] = {
    "reference/experiment.md": experiment_reference,
    "reference/cli.md": command_reference,
    "reference/python.md": python_reference,
    "reference/metrics.md": metrics_reference,
}


def included(name: str) -> str:
    """A file of the repository as a page."""
    return (REPOSITORY / name).read_text(encoding="utf-8")


def page_of(target: str) -> str | None:
    """The page of the site, or the picture, that a path in the repository is shown as."""
    if target in INCLUDED:
        return INCLUDED[target]
    if target.startswith(f"{DOCS}/"):
        return target.removeprefix(f"{DOCS}/")
    return None


def relink(text: str, source: str, page: str) -> str:
    """Adapt the links of a page that is at `source` in the repository and at `page` on the site.

    A link to a file of the repository that has no page becomes plain text.
    """

    def other(found: re.Match[str]) -> str:
        target, hash_, anchor = found["target"].partition("#")
        if not target or re.match(r"[a-z]+:", target):
            return found[0]
        there = page_of(posixpath.normpath(posixpath.join(posixpath.dirname(source), target)))
        if there is None:
            return found["text"] if "text" in found.groupdict() else found[0]
        return f"{found['before']}{posixpath.relpath(there, posixpath.dirname(page) or '.')}{hash_}{anchor}{found['after']}"

    parts = re.split(r"(^```.*?^```$)", text, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if part.startswith("```") else SOURCE.sub(other, LINK.sub(other, part)) for part in parts)


# -- what mkdocs calls --------------------------------------------------------------------------------------------------


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    from mkdocs.structure.files import File

    for name, make in GENERATED.items():
        files.append(File.generated(config, name, content=make()))
    for source, name in INCLUDED.items():
        files.append(File.generated(config, name, content=included(source)))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    name = page.file.src_uri
    source = {shown: path for path, shown in INCLUDED.items()}.get(name, f"{DOCS}/{name}")
    return relink(markdown, source, name)
