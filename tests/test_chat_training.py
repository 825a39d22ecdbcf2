"""Training on conversations: the loss of all answers, labels, text that ends with the answer's turn, a whole run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_bases import CHATML, FORMS, save_base
from conftest import toy_rows
from test_train import Run
from torch.nn.functional import cross_entropy

from ptuning.cluster.job_package import build_package
from ptuning.cluster.local_paths import absolute
from ptuning.config import parse_experiment, read_experiment
from ptuning.data.task import describe_task, load_task
from ptuning.errors import UserError
from ptuning.model.base import Base, find_base
from ptuning.model.packing import Objective, pack_targets
from ptuning.model.prompted_model import PromptedModel
from ptuning.settings.model import ModelConfig
from ptuning.settings.training import ZeroConfig
from ptuning.training import base_loader
from ptuning.training.distributed import Workers
from ptuning.training.evaluate import label_scores
from ptuning.training.generation import Greedy

pytestmark = pytest.mark.fast


@pytest.fixture(autouse=True)
def folder(row_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return find_base(ModelConfig(path=str(save_base(tmp_path_factory.mktemp("chat") / "gemma-form", FORMS["gemma"]))))


@pytest.fixture(scope="module")
def model(base: Base) -> PromptedModel:
    return base_loader.load(base, ZeroConfig(stage=0), torch.float32)


def conversations(count: int, seed: int = 0, turns: int = 1) -> list[dict[str, Any]]:
    """Rows whose answers are labels."""
    toys = iter(toy_rows(count * turns, seed))
    return [
        {
            "messages": [
                message
                for row in (next(toys) for _ in range(turns))
                for message in ({"role": "user", "content": row["text"]}, {"role": "assistant", "content": row["label"]})
            ]
        }
        for _ in range(count)
    ]


def tables(base: Base | None, train: Sequence[object], **data: Any) -> dict[str, Any]:
    for name, rows in (("train", train), ("test", list(train)[:4])):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {
        "name": "chat",
        "model": {"path": str(base.folder) if base else "builtin", "dtype": "float32"},
        "prompt": {"length": 4},
        "data": {"train": "train.jsonl", "test": "test.jsonl", **data},
        "train": {"steps": 8, "batch_size": 8, "learning_rate": 0.3},
    }


def written_out(model: PromptedModel, vectors: torch.Tensor, row: Any) -> torch.Tensor:
    """Losses of all trained tokens of a row, in their order, by a plain pass of the base."""
    source, target, *earlier = row
    ids = [*source, *target]
    places = [*(earlier[0] if earlier else []), *range(len(source), len(ids))]
    with model.plain() as base:
        text = base.get_input_embeddings()(torch.tensor(ids))
        logits = base(inputs_embeds=torch.cat([vectors, text])[None], use_cache=False).logits[0]
    at = torch.tensor(places) + len(vectors) - 1
    return cross_entropy(logits[at].float(), torch.tensor([ids[place] for place in places]), reduction="none")


def test_all_answers_have_the_loss_and_the_gradient_of_a_plain_pass(model: PromptedModel, base: Base) -> None:
    task = load_task(parse_experiment(tables(base, conversations(3, turns=3), loss="all")), base)
    rows = [task.train.row(index) for index in range(3)]
    assert all(len(row) == 3 for row in rows)
    vectors = torch.randn(4, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    expected = torch.cat([written_out(model, vectors, row) for row in rows])
    [gradient] = torch.autograd.grad(expected.sum(), vectors)
    for shared in (True, False):
        model.shared_prefix = shared
        found = model([vectors], pack_targets([4], [rows]))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        [again] = torch.autograd.grad(found.sum(), vectors)
        torch.testing.assert_close(again, gradient, rtol=1e-4, atol=1e-5)
    model.shared_prefix = True
    assert len(expected) == task.train.target_lengths.sum()
    pair = [rows[0][:2], rows[1]]  # rows with and without earlier answers, side by side
    both = model([vectors], pack_targets([4], [pair]))
    torch.testing.assert_close(both, torch.cat([written_out(model, vectors, row) for row in pair]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("loss", ["last", "all"])
def test_a_run_on_conversations_keeps_the_chat_template_in_its_card(
    loss: str, model: PromptedModel, base: Base, folder: Path
) -> None:
    about = {"loss": loss, "chat_template_kwargs": {"enable_thinking": False}}
    experiment = parse_experiment(tables(base, conversations(16, turns=2), **about))
    run = Run(model, base, folder / "runs")(experiment)
    [finished] = run.of("finished")
    losses = [event.values["loss"] for event in run.of("step")]
    assert losses[-1] < losses[0] and set(finished.values) >= {"test_loss", "test_exact_match"}
    card = run.result("chat").card
    assert card.template is not None and card.template.is_chat
    assert card.template.chat_template == FORMS["gemma"].template
    assert (card.template.loss, card.template.chat_template_kwargs) == (loss, {"enable_thinking": False})
    task = load_task(experiment, base)
    assert card.max_new_tokens == max(len(task.train.row(row)[1]) for row in range(16))
    assert card.public().template == card.template
    assert describe_task(task)[0].startswith("rows: conversations in messages, written by the base's chat template; trained: ")


def test_labels_are_chosen_up_to_the_end_of_the_turn(model: PromptedModel, base: Base) -> None:
    task = load_task(parse_experiment(tables(base, conversations(4), labels=["fruit", "tool"])), base)
    vectors = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    scores = label_scores(model, [vectors], task.train, task.encoder, Workers())[0]
    trie = task.encoder.label_trie
    for row in range(4):
        plan = pack_targets([4], [[task.train.row(row)]], [Objective(trie, text=False)])
        label = int(task.train.rows["label"][row])
        assert float(model([vectors], plan).sum()) == pytest.approx(-float(scores[row, label]), abs=1e-5)


def test_generated_text_ends_with_the_turn(base: Base, folder: Path) -> None:
    """The end of a turn is no end token of this base: only the chat template tells it."""
    plain = find_base(ModelConfig(path=str(save_base(folder / "other", FORMS["gemma"], seed=3))))
    end, word = plain.tokenizer.convert_tokens_to_ids(["<end_of_turn>", "x"])
    assert end not in plain.ends
    model = base_loader.load(plain, ZeroConfig(stage=0), torch.float32)
    with torch.no_grad():  # after the end of a turn follows x, after everything else the end of the turn
        for name, weight in model.base.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.zero_()
        head = model.base.get_output_embeddings()
        head.weight.zero_()
        row = model.base.get_input_embeddings()(torch.tensor(end))
        head.weight[word] = row / row.square().mean().sqrt()
        head.bias = torch.nn.Parameter(torch.zeros(len(head.weight)))
        head.bias[end] = 24.0
    task = load_task(parse_experiment(tables(plain, conversations(2))), plain)
    assert Greedy(model, task.encoder, 6).texts(torch.zeros(4, 32), [task.train.row(0)[0]]) == [""]


def test_a_base_without_a_chat_template_needs_one(folder: Path) -> None:
    rows = conversations(8)
    builtin = find_base(ModelConfig(path="builtin"))
    with pytest.raises(UserError, match=r"has no chat template, which rows with messages need; set data.chat_template"):
        load_task(parse_experiment(tables(None, rows)), builtin)
    template = "{% for message in messages %}{{ message.role + ': ' + message.content + '\n' }}{% endfor %}" + (
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    (folder / "chat.jinja").write_text(template, encoding="utf-8")
    experiment = parse_experiment(tables(None, rows, chat_template="chat.jinja"))
    run = Run(base_loader.load(builtin, ZeroConfig(stage=0), torch.float32), builtin, folder / "runs")(experiment)
    losses = [event.values["loss"] for event in run.of("step")]
    assert losses[-1] < losses[0]
    card = run.result("chat").card
    assert card.template is not None and card.template.chat_template == template, "the text, not the path"
    with pytest.raises(UserError, match=r"missing.jinja cannot be read \(No such file or directory\)"):
        load_task(parse_experiment(tables(None, rows, chat_template="missing.jinja")), builtin)


def test_pairs_of_texts_follow_the_base(base: Base) -> None:
    rows = [{"prompt": row["text"], "completion": row["label"]} for row in toy_rows(4, 0)]
    chat = load_task(parse_experiment(tables(base, rows)), base)
    assert chat.encoder.template.is_chat and "prompt and completion" in chat.note
    assert chat.train.rows["target_text"][:] == [row["completion"] for row in rows]
    builtin = find_base(ModelConfig(path="builtin"))
    plain = load_task(parse_experiment(tables(None, rows)), builtin)
    assert (plain.encoder.template.input, plain.encoder.template.target) == ("{prompt}", "{completion}")
    assert "as plain text, because the base has no chat template" in describe_task(plain)[0]
    given = load_task(parse_experiment(tables(None, rows, chat_template=CHATML)), builtin)
    assert given.encoder.template.is_chat
    spaced = [{**row, "completion": f" {row['completion']}"} for row in rows]  # as for OpenAI's older models
    labels = [load_task(parse_experiment(tables(None, some, labels=["fruit", "tool"])), builtin) for some in (rows, spaced)]
    assert labels[0].train.rows["label"][:] == labels[1].train.rows["label"][:]


def test_the_file_of_a_chat_template_is_found_beside_the_experiment_and_travels(
    folder: Path, write_toml: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "chat.jinja").write_text(CHATML, encoding="utf-8")
    plain = tables(None, conversations(4), chat_template="chat.jinja") | {"compute": {"storage": str(folder / "runs")}}
    file = write_toml(plain)
    here = folder / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    experiment = read_experiment(file)
    builtin = find_base(ModelConfig(path="builtin"))
    assert load_task(experiment, builtin).encoder.template.chat_template == CHATML
    assert absolute(experiment).data.chat_template == str(folder / "chat.jinja")
    job = build_package("train", str(file), [], shared=[], env=[], here={})
    [sent] = [each.removeprefix("data.chat_template=") for each in job.overrides if "chat_template" in each]
    assert sent.startswith("shipped:chat-") and sent.endswith(".jinja")
    assert absolute(
        experiment.model_copy(update={"data": experiment.data.model_copy(update={"chat_template": sent})})
    ).data == (absolute(experiment).data.model_copy(update={"chat_template": sent}))
