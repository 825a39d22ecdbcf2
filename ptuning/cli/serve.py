"""`ptuning serve`, `ask` and `compare`: parse first, import ray and torch inside."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any, NoReturn
from urllib.parse import quote

import typer

from ptuning import api
from ptuning.cli.conversation import converse
from ptuning.cli.options import BaseOption, ExperimentArgument, Json, Overrides, Storage, Tracking, busy, fail, non_blank, table
from ptuning.cli.server_client import LOCAL_URL, Url, request
from ptuning.config import read_experiment
from ptuning.errors import UserError
from ptuning.redaction import redact
from ptuning.registry_api import Registry


def serve(
    experiment: ExperimentArgument,
    overrides: Overrides = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Listen where others can reach it, without API keys.")] = False,
    detach: Annotated[bool, typer.Option("--detach", help="Have the cluster go on serving, and return.")] = False,
    as_json: Json = False,
) -> None:
    """Serve the registered soft prompts of a base, as OpenAI's API.

    Example: ptuning serve jobs/sentiment.toml serve.port=9000
    """
    try:
        settings = read_experiment(experiment, overrides or [])
        api.check_serving(settings, insecure)
        with busy("starting"):
            api.prepare("serve", settings)
        if detach:
            from ptuning.serving.server import deploy

            served = deploy(settings, insecure=insecure, say=_say)
            typer.echo(json.dumps(served) if as_json else f"serving at {served['url']}")
        else:
            api.serve(settings, insecure=insecure, say=_say)
    except UserError as error:
        fail(str(error), 2)


def ask(
    name: Annotated[
        str, typer.Argument(metavar="NAME", callback=non_blank, help="Who is asked: a soft prompt, name:3, or the base.")
    ],
    text: Annotated[
        str | None,
        typer.Argument(
            metavar="[TEXT]",
            help="The text, or a JSON object with the template's fields. Without it: what is typed, as a conversation.",
        ),
    ] = None,
    url: Url = LOCAL_URL,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole answer as one JSON object.")] = False,
) -> None:
    """Ask the running server one question, or hold a conversation. An API key comes from PTUNING_API_KEY.

    Example: ptuning ask sentiment "This movie was terrible."
    """

    def show(answer: dict[str, Any]) -> str:
        return json.dumps(answer) if as_json else str(answer["choices"][0]["message"]["content"])

    if text is None and not _is_typed():
        text = sys.stdin.read()
    if text is not None:
        typer.echo(show(request(url, "chat/completions", _body(name, [{"role": "user", "content": text}]))))
        return
    known = request(url, f"models/{quote(name, safe=':')}")

    def again(messages: list[dict[str, str]]) -> tuple[dict[str, Any] | None, str]:
        try:
            return request(url, "chat/completions", _body(name, messages), say=_raise), ""
        except UserError as error:
            return None, str(error)

    # Of a soft prompt with a plain template, a question is all that it takes.
    converse(name, again, known.get("template") in (None, "chat"), show)


def _is_typed() -> bool:
    return sys.stdin.isatty()


def _body(name: str, messages: list[dict[str, str]]) -> dict[str, Any]:
    return {"model": name, "messages": messages}


def _raise(message: str, code: int) -> NoReturn:
    raise UserError(message)


def compare(
    name: Annotated[str, typer.Argument(metavar="NAME", callback=non_blank, help="A registered name.")],
    text: Annotated[str, typer.Option("--text", help="The text, or a JSON object with the template's fields.")],
    storage: Storage = None,
    tracking: Tracking = None,
    base: BaseOption = None,
    as_json: Json = False,
) -> None:
    """Ask the base, the hand-written text and every version.

    All are asked the same thing, side by side. No server is needed.

    Example: ptuning compare sentiment --text "This movie was terrible."
    """
    try:
        with busy("asking"):
            opinions = Registry(storage, tracking).compare(name, text, base=base)
    except UserError as error:
        fail(str(error), 2)
    if as_json:
        typer.echo(json.dumps({"opinions": [vars(opinion) for opinion in opinions]}))
        return
    answers = [each.answer if each.probability is None else f"{each.answer}  {each.probability:.3f}" for each in opinions]
    costs = [f"{each.tokens} tokens, {1000 * each.seconds:.0f} ms" if each.tokens else "" for each in opinions]
    typer.echo(table([(each.who, *rest) for each, *rest in zip(opinions, answers, costs, strict=True)]))


def _say(line: str) -> None:
    typer.echo(redact(line), err=True)
