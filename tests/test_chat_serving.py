"""Conversations through HTTP, the Predictor and a merged export: they reach the model whole, as they were trained."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import pytest
import torch
from chat_bases import CHATML, FORMS, save_base
from openai import OpenAI
from test_http_api import KEY, Running, fill_empty, publish_soft_prompt, settings
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from ptuning.cli.app import app
from ptuning.config import parse_experiment
from ptuning.data.chat_encoder import make_encoder
from ptuning.inference.predictor import Predictor
from ptuning.inference.types import Request, RequestError
from ptuning.model import soft_prompt
from ptuning.model.base import find_base
from ptuning.model.compatibility import next_logits
from ptuning.registry.gate import on_its_base
from ptuning.registry.inspection import _card_lines
from ptuning.registry.merged_export import write_merged
from ptuning.registry.publish import retrieve
from ptuning.serving.app import build_app
from ptuning.serving.auth import read_keys
from ptuning.serving.compare import compare
from ptuning.serving.service import Service
from ptuning.settings.data import Template
from ptuning.settings.model import ModelConfig

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

TALK = Template(chat_template=FORMS["llama"].template, system="be brief")
LABELLED = Template(chat_template=FORMS["llama"].template, labels=("fruit", "tool"))
STRICT = Template(
    chat_template="{% if messages[0].role == 'system' %}{{ raise_exception('no system here, please') }}{% endif %}"
    + FORMS["llama"].template
)
PLAIN = Template(input="Text: {text}\nKind:", target=" {answer}")
TURNS = [
    {"role": "system", "content": "one more word"},
    {"role": "user", "content": "the old apple"},
    {"role": "assistant", "content": "a fruit"},
    {"role": "user", "content": "and <|eot_id|> the hammer?"},
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """A base in Llama 3's form; soft prompts: talk, kinds and strict take conversations, plain takes a text, raw has no card's
    template. `asked` holds the requests that reach the engine."""
    folder = tmp_path_factory.mktemp("chat")
    base = save_base(folder / "llama-form", FORMS["llama"])
    storage = folder / "runs"
    registry = fill_empty(storage)
    for seed, (name, template) in enumerate(
        {"talk": TALK, "kinds": LABELLED, "strict": STRICT, "plain": PLAIN, "raw": None}.items()
    ):
        publish_soft_prompt(registry, base, folder / "scratch", name, seed, template=template, max_new_tokens=8)
    (storage / "keys").write_text(f"{KEY}\n", encoding="utf-8")
    service = Service(parse_experiment(settings(storage, base)), read_keys(str(storage / "keys")), "test")
    asked: list[Request] = []
    submit, choose = service.engine.submit, service.engine.choose

    def spy(request: Request, deliver: Any) -> str:
        asked.append(request)
        return submit(request, deliver)

    def spy_choice(handle: Any, rows: Any, trie: Any) -> Any:
        asked.extend(Request(row, handle) for row in rows)
        return choose(handle, rows, trie)

    service.engine.submit, service.engine.choose = spy, spy_choice  # type: ignore[method-assign,assignment]
    running = Running(build_app(service))
    tokenizer = find_base(ModelConfig(path=str(base))).tokenizer
    try:
        yield SimpleNamespace(
            base=base, registry=registry, service=service, url=running.url, asked=asked, tokenizer=tokenizer, folder=folder
        )
    finally:
        running.stop()
        service.close()


@pytest.fixture
def client(world: SimpleNamespace) -> Iterator[OpenAI]:
    world.asked.clear()
    with OpenAI(base_url=world.url, api_key=KEY, max_retries=0, timeout=60) as client:
        yield client


def ids_of(world: SimpleNamespace, messages: list[dict[str, str]], **how: Any) -> list[int]:
    """By transformers alone, with special tokens in messages as text."""
    options = {"add_generation_prompt": True, "return_dict": False, "sanitize_control_tokens": True} | how
    ids: list[int] = world.tokenizer.apply_chat_template(messages, **options)
    return ids


def chat(client: OpenAI, model: str, messages: Any = TURNS, **more: Any) -> Any:
    return client.chat.completions.create(model=model, messages=messages, **{"max_tokens": 3, **more})


@pytest.mark.parametrize("model", ["talk", "kinds", "raw", "llama-form"])
def test_a_conversation_reaches_the_model_whole(world: SimpleNamespace, client: OpenAI, model: str) -> None:
    answer = chat(client, model)
    [request] = world.asked
    expected = ids_of(world, TURNS)
    assert list(request.ids) == expected and answer.usage.prompt_tokens == len(expected)
    assert (request.handle is None) == (model == "llama-form")
    if model != "kinds":
        assert request.ends == (world.tokenizer.convert_tokens_to_ids("<|eot_id|>"),)
    else:
        assert answer.choices[0].message.content in ("fruit", "tool")
    encoder = make_encoder(TALK, world.tokenizer, 200)
    trained = next(iter(encoder.examples([{"messages": json.dumps([*TURNS, {"role": "assistant", "content": "a tool"}])}])))
    assert trained.input_ids == expected  # type: ignore[union-attr]


def test_two_turns_through_the_stock_client(world: SimpleNamespace, client: OpenAI) -> None:
    messages: list[dict[str, Any]] = [{"role": "user", "content": "the old apple"}]
    first = chat(client, "talk", messages).choices[0].message
    messages += [
        {"role": first.role, "content": first.content},
        {"role": "user", "content": [{"type": "text", "text": "more"}]},
    ]
    chat(client, "talk", messages, stream=True).close()
    whole = [{"role": "system", "content": "be brief"}, *messages[:2], {"role": "user", "content": "more"}]
    assert list(world.asked[1].ids) == ids_of(world, whole), "with the card's system message"


def test_a_plain_text_is_one_message_of_the_user(world: SimpleNamespace, client: OpenAI) -> None:
    client.completions.create(model="talk", prompt="the old apple", max_tokens=2)
    client.post("/classify", body={"model": "kinds", "input": ["the old apple", {"messages": TURNS}]}, cast_to=object)
    user = {"role": "user", "content": "the old apple"}
    assert list(world.asked[0].ids) == ids_of(world, [{"role": "system", "content": "be brief"}, user])
    assert [list(each.ids) for each in world.asked[1:]] == [ids_of(world, [user]), ids_of(world, TURNS)]
    client.completions.create(model="talk", prompt=[5, 6, 7], max_tokens=2)
    client.completions.create(model="raw", prompt="the old apple", max_tokens=2)
    assert [list(each.ids) for each in world.asked[3:]] == [[5, 6, 7], world.tokenizer("the old apple").input_ids]


def test_the_begin_of_an_answer_is_continued_on_request(world: SimpleNamespace, client: OpenAI) -> None:
    begun = [*TURNS, {"role": "assistant", "content": "a to"}]
    with pytest.raises(openai.BadRequestError, match="continue_final_message = true"):
        chat(client, "talk", begun)
    for model in ("talk", "llama-form"):
        chat(client, model, begun, extra_body={"continue_final_message": True, "add_generation_prompt": False})
    chat(client, "kinds", begun, extra_body={"continue_final_message": True, "constrain": False})
    expected = ids_of(world, begun, add_generation_prompt=False, continue_final_message=True)
    assert [list(each.ids) for each in world.asked] == [expected] * 3
    for model, more, words in (
        ("kinds", {"continue_final_message": True}, "a label or JSON has no begin"),
        ("talk", {"add_generation_prompt": False}, "is the opposite of continue_final_message"),
    ):
        with pytest.raises(openai.BadRequestError, match=words):
            chat(client, model, begun, extra_body=more)
    with pytest.raises(openai.BadRequestError, match="the last message is not of the assistant"):
        chat(client, "talk", TURNS, extra_body={"continue_final_message": True})


def test_what_a_chat_template_refuses_is_a_400_in_its_words(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=r"refuses the messages \(no system here, please\); change their order"):
        chat(client, "strict")
    assert chat(client, "strict", TURNS[1:]).choices


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        (TURNS, "no place for a system message"),
        ([{"role": "developer", "content": "x"}, TURNS[1]], "no place for a developer message"),
        (TURNS[1:], "no place for earlier messages"),
        (TURNS[1:3], "no place for the begin of an answer"),
        (TURNS[:1], "there is no user message"),
    ],
)
def test_a_plain_template_refuses_what_it_cannot_hold(
    world: SimpleNamespace, client: OpenAI, messages: Any, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(openai.BadRequestError, match=words) as refused:
        chat(client, "plain", messages)
    if "no place" in words:
        assert 'serve.chat = "last"' in str(refused.value) and not world.asked
        api = next(route.endpoint.__self__ for route in build_app(world.service).routes if route.path == "/v1/completions")  # type: ignore[attr-defined]
        assert api._limits.chat == "whole"
        changed = world.service.limits.model_copy(update={"chat": "last"})
        monkeypatch.setattr(world.service, "limits", changed)
        running = Running(build_app(world.service))
        try:
            with OpenAI(base_url=running.url, api_key=KEY, max_retries=0, timeout=60) as lenient:
                chat(lenient, "plain", messages)
        finally:
            running.stop()
        users = [message["content"] for message in messages if message["role"] == "user"]
        text = f"Text: {users[-1]}\nKind:"
        assert world.tokenizer.decode(world.asked[0].ids) == text
    assert chat(client, "plain", [TURNS[1]]).choices


def test_long_conversations_are_refused_or_lose_their_oldest_messages(world: SimpleNamespace, client: OpenAI) -> None:
    long = [
        TURNS[0],
        *[{"role": role, "content": "the old hammer and more " * 4} for role in ("user", "assistant")] * 4,
        TURNS[3],
    ]
    with pytest.raises(openai.BadRequestError, match=r"the text has \d+ tokens, \d+ fit"):
        chat(client, "talk", long)
    chat(client, "talk", long, extra_body={"truncate": True})
    [request] = world.asked
    kept = next(start for start in range(1, len(long), 2) if ids_of(world, [long[0], *long[start:]]) == list(request.ids))
    assert kept > 1


def test_models_say_that_they_take_conversations(client: OpenAI) -> None:
    templates = {name: client.models.retrieve(name).template for name in ("talk", "plain", "raw")}  # type: ignore[attr-defined]
    assert templates == {"talk": "chat", "plain": PLAIN.input, "raw": None}


def test_ask_keeps_a_conversation(world: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PTUNING_API_KEY", KEY)

    def typed(name: str, lines: list[str]) -> Any:
        world.asked.clear()
        monkeypatch.setattr("ptuning.cli.serve._is_typed", lambda: True)
        return CliRunner().invoke(app, ["ask", name, "--url", world.url], input="\n".join(lines) + "\n")

    done = typed("talk", ["the old apple", "and the hammer", "", "more"])
    assert done.exit_code == 0, done.output
    system = {"role": "system", "content": "be brief"}
    first = {"role": "user", "content": "the old apple"}
    assert list(world.asked[0].ids) == ids_of(world, [system, first])
    told = world.tokenizer.decode(world.asked[1].ids)
    assert told.count("<|eot_id|>") == 4 and "the old apple" in told and "and the hammer" in told
    assert list(world.asked[2].ids) == ids_of(world, [system, {"role": "user", "content": "more"}])
    assert "a conversation; an empty line begins a new one" in done.stderr
    done = typed("plain", ["the old apple", "and the hammer"])
    assert done.exit_code == 0 and "each line is a question of its own" in done.stderr
    assert world.tokenizer.decode(world.asked[1].ids) == "Text: and the hammer\nKind:"
    refused = typed("strict", ["x" * 4000, "the old apple"])
    assert "tokens" in refused.stderr and len(world.asked) == 1, "the conversation goes on after an error"
    unknown = typed("nothing", ["x"])
    assert unknown.exit_code == 2 and "no such model" in unknown.stderr
    monkeypatch.undo()
    monkeypatch.setenv("PTUNING_API_KEY", KEY)
    world.asked.clear()
    piped = CliRunner().invoke(app, ["ask", "talk", "--url", world.url], input="the old\napple")
    assert piped.exit_code == 0
    assert list(world.asked[0].ids) == ids_of(world, [system, {"role": "user", "content": "the old\napple"}])


# Without a server


def loaded(world: SimpleNamespace, name: str) -> soft_prompt.SoftPrompt:
    return retrieve(world.registry, world.registry.find(name))[0]


def test_the_predictor_takes_texts_and_conversations(world: SimpleNamespace) -> None:
    with Predictor({name: loaded(world, name) for name in ("talk", "kinds")}) as predictor:
        user = [{"role": "user", "content": "the old apple"}]
        alone, same, whole = predictor.probabilities(["the old apple", user, TURNS], "kinds")
        assert alone == pytest.approx(same) and alone != pytest.approx(whole)
        assert predictor.probabilities([{"messages": TURNS}], "kinds")[0] == pytest.approx(whole)
        assert len(predictor.generate(["the old apple", TURNS], "talk", max_new_tokens=3)) == 2
        for wrong, words in (
            (TURNS, "texts: is a single text"),
            ([[*TURNS, TURNS[2]]], "the last one is of the assistant"),
            ([{"text": "a"}], "neither a string nor a conversation"),
        ):
            with pytest.raises(RequestError, match=words):
                predictor.generate(wrong, "talk")  # type: ignore[arg-type]


def test_the_gate_compare_and_show_know_the_chat_template(world: SimpleNamespace) -> None:
    talk = loaded(world, "talk")
    assert on_its_base(talk, "talk", None) == []
    assert [opinion.who for opinion in compare(world.registry, "kinds", "the old apple")] == ["the base alone", "kinds:1"]
    lines = "\n".join(_card_lines(talk.card))
    assert "chat         template of" in lines and "system       'be brief'" in lines and "the last answer" in lines
    public = json.loads(talk.card.public().model_dump_json())["template"]
    assert public["chat_template"] == TALK.chat_template and public["system"] == "be brief"


@pytest.mark.parametrize("arguments", [None, {"greeting": 'say "hi"\n', "off": False, "nothing": None}])
def test_a_merged_export_has_the_chat_template_of_the_card(
    world: SimpleNamespace, tmp_path: Path, arguments: dict[str, Any] | None
) -> None:
    jinja = "{{ greeting if greeting is defined else '' }}{{ 'off' if off is defined and not off else '' }}" + str(
        TALK.chat_template
    )
    given = loaded(world, "talk")
    template = TALK.model_copy(update={"chat_template": jinja, "chat_template_kwargs": arguments})
    talk = soft_prompt.SoftPrompt(given.vectors, given.card.model_copy(update={"template": template}))
    base = find_base(ModelConfig(path=str(world.base)))
    merged = write_merged(talk, base, "talk", tmp_path / "merged")
    assert merged.chat
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    plain = [TURNS[1], TURNS[2], {"role": "user", "content": "more"}]
    ids = tokenizer.apply_chat_template(plain, add_generation_prompt=True, return_dict=False)
    expected = make_encoder(template, base.tokenizer, 2**31).input_ids({"messages": plain})
    assert ids[-len(expected) :] == expected and len(ids) == len(expected) + given.card.length
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    logits = next_logits(base.load(torch.float32), given.vectors, torch.tensor([expected]))
    with torch.no_grad():
        torch.testing.assert_close(model(torch.tensor([ids])).logits[0, -1, : len(logits)], logits, rtol=1e-3, atol=1e-4)
    assert tokenizer.convert_tokens_to_ids("<|eot_id|>") in model.generation_config.eos_token_id


def test_a_base_answers_with_a_template_that_cannot_be_trained(tmp_path: Path) -> None:
    """Nothing but its ids is needed."""
    base = find_base(ModelConfig(path=str(save_base(tmp_path / "odd", FORMS["chatml"], CHATML.partition("{% if")[0]))))
    from ptuning.serving.loading import Served

    served = Served("odd", 0, make_encoder(Template(input="{a}", target="{a}"), base.tokenizer, 100))
    assert served.conversation is not None and served.ends == ()
    assert served.conversation.ids(TURNS[:2]) == base.tokenizer.apply_chat_template(TURNS[:2], return_dict=False)
