"""`ptuning prompts`: the registry on the command line. Parses first; MLflow and torch are imported inside the commands."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ptuning.cli.options import BaseOption, Json, Storage, Tracking, busy, fail, non_blank, table
from ptuning.errors import UserError
from ptuning.registry_api import Registry, single_version
from ptuning.settings.data import Template, check_input
from ptuning.settings.fields import MARGIN

if TYPE_CHECKING:
    from ptuning.registry.registry import Version

prompts = typer.Typer(
    name="prompts",
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Soft prompts that were kept: list, compare, promote, move.",
)

Name = Annotated[str, typer.Argument(metavar="NAME", callback=non_blank, help="A soft prompt: name, name:3 or name@champion.")]


@prompts.command("list")
def list_(storage: Storage = None, tracking: Tracking = None, as_json: Json = False) -> None:
    """List every version of every soft prompt.

    Example: ptuning prompts list --storage runs
    """
    with _sentences():
        with busy("reading the registry"):
            rows = [_row(version) for version in Registry(storage, tracking).list()]
        if not rows:
            typer.echo("no soft prompts yet; publish one with: ptuning train EXPERIMENT --register NAME", err=True)
        lines = [list(COLUMNS), *([cell(row) for cell in COLUMNS.values()] for row in rows)]
        _say({"soft_prompts": rows}, table(lines) if rows else "", as_json)


@prompts.command()
def show(
    name: Name, storage: Storage = None, tracking: Tracking = None, base: BaseOption = None, as_json: Json = False
) -> None:
    """Show a soft prompt: card, lineage, nearest words.

    Example: ptuning prompts show sentiment:1
    """
    with _sentences():
        with busy("reading the soft prompt and its base's words"):
            shown = Registry(storage, tracking).inspect(name, base=base)
        _say(shown.as_json(), str(shown), as_json)


@prompts.command("import")
def import_(
    source: Annotated[
        str, typer.Argument(metavar="FOLDER|ID", callback=non_blank, help="A PEFT adapter: a folder, or an id on the Hub.")
    ],
    name: Annotated[str, typer.Option("--name", metavar="NAME", callback=non_blank, help="The name to publish it under.")],
    base: Annotated[
        str | None, typer.Option("--base", metavar="PATH", callback=non_blank, help="The base it was made for: folder or id.")
    ] = None,
    input_: Annotated[str | None, typer.Option("--input", help='Template of the input, as "Message: {text}\\nLabel:".')] = None,
    target: Annotated[str | None, typer.Option("--target", help='Template of the target, as " {label}".')] = None,
    labels: Annotated[str | None, typer.Option("--labels", metavar="A,B", help="Labels of a classification task.")] = None,
    storage: Storage = None,
    tracking: Tracking = None,
    as_json: Json = False,
) -> None:
    """Publish a soft prompt made elsewhere, as with PEFT.

    Example: ptuning prompts import adapter --name mine --base builtin --input "{text} Mood:" --target " {label}"
    """
    with _sentences():
        from ptuning.registry.peft_import import locate
        from ptuning.registry.registry import check_name

        check_name(name)
        template = _template(input_, target, labels) or _ask_template(locate(source))
        with busy("importing"):
            version = Registry(storage, tracking).add(source, name, base=base, template=template)
        _say(_row(version), f"imported as {version}; make it champion with: ptuning prompts promote {version}", as_json)


@prompts.command()
def export(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME...", callback=non_blank, help="A soft prompt: name, name:3 or name@champion. For vllm also several."
        ),
    ],
    folder: Annotated[str, typer.Argument(metavar="FOLDER", callback=non_blank, help="A new folder.")],
    format_: Annotated[
        Literal["peft", "merged", "vllm"],
        typer.Option(
            "--format",
            help="peft: the artefact; merged: base and soft prompt as one plain checkpoint; vllm: the same for vllm serve, "
            "also with several soft prompts.",
        ),
    ] = "peft",
    base: BaseOption = None,
    storage: Storage = None,
    tracking: Tracking = None,
    as_json: Json = False,
) -> None:
    """Write a soft prompt to a folder, for PEFT or any server.

    Example: ptuning prompts export sentiment:1 plain --format merged
    """
    with _sentences():
        name, *more = names
        if more and format_ != "vllm":
            raise UserError(f"{more[0]}: --format {format_} writes one soft prompt; export it by itself, or use --format vllm")
        with busy("exporting"):
            registry = Registry(storage, tracking)
            if format_ == "vllm":
                written = registry.export_vllm(names, folder, base=base)
            elif format_ == "merged":
                version, merged = registry.export_merged(name, folder, base=base)
            else:
                version = registry.export(name, folder)
        if format_ == "vllm":
            _say(written.facts(), "\n".join(written.lines()), as_json)
        elif format_ == "merged":
            facts = {"name": str(version), "folder": folder, **merged.facts()}
            _say(facts, "\n".join(merged.lines(str(version), folder)), as_json)
        else:
            _say({"name": str(version), "folder": folder}, f"{version} written to {folder}; PEFT loads it", as_json)


@prompts.command()
def promote(
    name: Name,
    number: Annotated[int | None, typer.Argument(metavar="VERSION", help="The version, if NAME does not contain it.")] = None,
    margin: Annotated[float, typer.Option("--margin", min=0, help="How much worse than the champion it may be.")] = MARGIN,
    force: Annotated[bool, typer.Option("--force", help="Promote it even if it does not pass; a tag records this.")] = False,
    base: BaseOption = None,
    storage: Storage = None,
    tracking: Tracking = None,
    as_json: Json = False,
) -> None:
    """Make a version champion, if it passes the gate.

    The champion is what is served under the name.

    Example: ptuning prompts promote sentiment 2
    """
    with _sentences():
        with busy("checking"):
            done = Registry(storage, tracking).promote(name, number, margin=margin, force=force, base=base)
        facts = {"name": done.version.name, "champion": done.version.version}
        before = f", before it was {done.previous}" if done.previous else ""
        line = f"{done.version} is champion{before}" if done.moved else f"{done.version} is champion already"
        for finding in done.findings:
            typer.echo(f"forced though {finding}", err=True)
        _say(facts | {"previous": done.previous, "moved": done.moved, "forced": done.findings}, line, as_json)


@prompts.command()
def rollback(
    name: Annotated[str, typer.Argument(metavar="NAME", callback=non_blank)],
    storage: Storage = None,
    tracking: Tracking = None,
    as_json: Json = False,
) -> None:
    """Make the previous champion champion again.

    Example: ptuning prompts rollback sentiment
    """
    with _sentences():
        with busy("rolling back"):
            champion = Registry(storage, tracking).rollback(name)
        _say({"name": name, "champion": champion}, f"{name}:{champion} is champion again", as_json)


@prompts.command()
def delete(
    name: Annotated[str, typer.Argument(metavar="NAME:VERSION", callback=non_blank)],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    storage: Storage = None,
    tracking: Tracking = None,
    as_json: Json = False,
) -> None:
    """Delete a version that is not champion.

    Its run stays in MLflow.

    Example: ptuning prompts delete sentiment:1 --yes
    """
    with _sentences():
        reference = single_version(name)
        if not yes:
            if not sys.stdin.isatty():
                raise UserError(f"{reference}: deleting asks for confirmation, and there is no terminal; repeat it with --yes")
            typer.confirm(f"Delete {reference}?", abort=True)
        version = Registry(storage, tracking).delete(name)
        _say({"deleted": str(version)}, f"{version} is deleted; its run {version.run_id} stays", as_json)


@prompts.command()
def similar(name: Name, storage: Storage = None, tracking: Tracking = None, as_json: Json = False) -> None:
    """Rank the other soft prompts of the same base by similarity.

    They are candidates for prompt.init_from.

    Example: ptuning prompts similar sentiment
    """
    with _sentences():
        with busy("comparing"):
            found = Registry(storage, tracking).similar(name)
        rows = [{"name": str(version), "cosine": round(cosine, 4)} for version, cosine in found]
        if not rows:
            typer.echo("no other soft prompt of this base", err=True)
        _say({"similar": rows}, "\n".join(f"{row['cosine']:7.4f}  {row['name']}" for row in rows), as_json)


@contextmanager
def _sentences() -> Iterator[None]:
    """A user's error is one sentence and exit code 2."""
    try:
        yield
    except UserError as error:
        fail(str(error), 2)


def _template(text: str | None, target: str | None, labels: str | None) -> Template | None:
    if text is None and target is None and labels is None:
        return None
    if text is None or target is None:
        raise UserError("--input and --target: a template needs both; give the one that is missing")
    listed = tuple(label.strip() for label in labels.split(",")) if labels else None
    try:
        check_input(text)
        return Template(input=text.replace("\\n", "\n"), target=target.replace("\\n", "\n"), labels=listed)
    except ValueError as error:
        reason = str(error).split("Value error, ")[-1].split(" [type=")[0]
        raise UserError(f"template: {reason}") from None


def _ask_template(folder: str) -> Template | None:
    """On a terminal, ask for what an adapter without a card does not know; elsewhere it stays unknown."""
    from ptuning import storage
    from ptuning.model import soft_prompt

    if storage.exists(folder, soft_prompt.CARD):
        return None
    if not sys.stdin.isatty():
        typer.echo("its template stays unknown; --input and --target would tell it", err=True)
        return None
    typer.echo('It has no card. How does a row become text? Fields in braces, as in "Message: {text}\\nLabel:".', err=True)
    text = typer.prompt("Input template (empty: unknown)", default="", show_default=False)
    if not text:
        return None
    target = typer.prompt('Target template, as " {label}"')
    labels = typer.prompt("Labels, with commas between (empty: free text)", default="", show_default=False)
    return _template(text, target, labels or None)


def _row(version: Version) -> dict[str, Any]:
    return {
        "name": version.name,
        "version": version.version,
        "aliases": list(version.aliases),
        "base": version.tag("base"),
        "length": _whole(version.tag("length")),
        "metric": version.tag("metric"),
        "value": version.number("value"),
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(version.created_ms / 1000)),
        "age_s": round(version.age_s),
        "bytes": _whole(version.tag("bytes")),
        "state": version.tag("state"),
        "parent": version.tag("parent"),
        "run_id": version.run_id,
        "content_hash": version.tag("content_hash"),
    }


def _whole(text: str | None) -> int | None:
    return int(text) if text else None


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "NAME": lambda row: row["name"],
    "VERSION": lambda row: str(row["version"]),
    "ALIAS": lambda row: ",".join(row["aliases"]) or "-",
    "BASE": lambda row: Path(row["base"]).name if row["base"] else "-",
    "LENGTH": lambda row: str(row["length"] or "-"),
    "METRIC": lambda row: f"{row['metric'].replace('_', ' ')} {row['value']:.4f}" if row["metric"] else "-",
    "AGE": lambda row: _age(row["age_s"]),
    "SIZE": lambda row: f"{row['bytes'] / 1024:.0f} KiB" if row["bytes"] else "-",
}


def _age(seconds: int) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"


def _say(facts: dict[str, Any], text: str, as_json: bool) -> None:
    if as_json or text:
        typer.echo(json.dumps(facts) if as_json else text)
    sys.stdout.flush()
