"""Distilling: a soft prompt learns what the base says behind a text, its teacher."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from chat_bases import FORMS, save_base
from conftest import tiny_base
from support.training import Run, experiment
from torch import Tensor
from typer.testing import CliRunner

from ptuning import api
from ptuning.cli.app import app
from ptuning.cli.compress import compression
from ptuning.cluster.job_package import build_package
from ptuning.config import Experiment, ExperimentError, parse_experiment, read_experiment
from ptuning.data.resolve import resolved
from ptuning.data.task import Task, describe_task, load_task
from ptuning.errors import DataError
from ptuning.model.base import Base, find_base
from ptuning.model.label_trie import LabelTrie
from ptuning.model.packing import Objective, pack_targets
from ptuning.model.prompted_model import PromptedModel
from ptuning.model.self_check import choose_pass
from ptuning.planning.workload import RunShape, Workload
from ptuning.settings.model import ModelConfig
from ptuning.training import metrics, run_record
from ptuning.training.distributed import Workers
from ptuning.training.evaluate import label_scores
from ptuning.training.generation import Greedy
from ptuning.training.teacher import CANDIDATES

pytestmark = pytest.mark.fast

ROWS = [([5, 6, 7, 8, 9], [8, 2]), ([4, 5, 6], [5, 6, 2]), ([9, 8, 7], [5, 7, 2])]
TRIE = LabelTrie(((5, 6, 2), (5, 7, 2), (8, 2)))
TEACHER = "Text: sort "
"""Behind it the toy base knows the label; the rows' own words are `{text}\\nKind:`."""


@pytest.fixture
def base(tiny_base_folder: Path) -> Base:
    return find_base(ModelConfig(path=str(tiny_base_folder)))


@pytest.fixture
def model(base: Base) -> PromptedModel:
    return PromptedModel(base.load(torch.float32))


@pytest.fixture
def unanswered(toy_task: SimpleNamespace) -> SimpleNamespace:
    """The toy task without labels in its training and validation rows."""
    toy_task.experiment["data"] |= {"input": "{text}\nKind:", "teacher": TEACHER}
    for file in (toy_task.train, toy_task.validation):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        file.write_text("".join(json.dumps({"text": row["text"]}) + "\n" for row in rows))
    return toy_task


def taught(task: Experiment, base: Base, model: PromptedModel) -> tuple[Task, Task]:
    """A task without and with what its teacher says."""
    loaded = load_task(task, base)
    run = Run(model, base, Path("unused"))
    return loaded, run.pack.teacher.teach(loaded, task)


def plain_logits(model: PromptedModel, soft_prompt: Tensor, ids: Sequence[int]) -> Tensor:
    """Logits after every token of one row, by transformers alone."""
    with model.plain() as base:
        embedded = base.get_input_embeddings()(torch.tensor(ids))
        return base(inputs_embeds=torch.cat([soft_prompt, embedded])[None]).logits[0, len(soft_prompt) :]


@pytest.mark.parametrize("architecture", ["llama_tied_gqa", "gemma2", "gpt_neo", "falcon"])
def test_the_gradient_towards_a_distribution_over_labels_is_that_of_plain_torch(architecture: str) -> None:
    """-sum of p(teacher) * log p(label), by brute force over whole labels; also where soft prompts are concatenated."""
    model = PromptedModel(tiny_base(architecture))
    choose_pass(model, architecture)
    soft_prompt = torch.randn(3, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    wanted = np.array([[0.5, 0.3, 0.2], [0.0, 0.0, 1.0], [0.1, 0.9, 0.0]])
    plan = pack_targets([3], [ROWS], [Objective(TRIE, text=False, all_labels=True)])
    shares = torch.from_numpy(TRIE.edge_shares(wanted)).float().flatten()
    ours = (model([soft_prompt], plan) * shares).sum()
    theirs = torch.zeros(())
    for (source, _), row in zip(ROWS, wanted, strict=True):
        for label, share in zip(TRIE.labels, row, strict=True):
            logits = plain_logits(model, soft_prompt, [*source, *label])
            for node, child in TRIE.paths[label]:
                at = len(source) - 1 + TRIE.nodes[node].depth
                among = torch.log_softmax(logits[at, list(TRIE.nodes[node].children)], -1)
                theirs = theirs - share * among[child]
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=1e-5)
    one, two = (torch.autograd.grad(loss, [soft_prompt])[0] for loss in (ours, theirs))
    assert float((one - two).norm() / two.norm()) < 1e-4


@pytest.mark.parametrize("kv", [False, True])
def test_the_gradient_towards_candidates_is_that_of_plain_torch(kv: bool) -> None:
    """Cross-entropy to a distribution over some tokens, beside a slot that has targets alone, whose numbers stay the same."""
    model = PromptedModel(tiny_base("llama_tied_gqa"))
    draw = torch.Generator().manual_seed(1)
    soft_prompts = [torch.randn(3, 32, generator=draw).requires_grad_(), torch.randn(2, 32, generator=draw)]
    shares = []
    for _, target in ROWS:
        ids = torch.stack([torch.randperm(20, generator=draw)[:4] for _ in target])
        shares.append((ids.numpy(), torch.rand(len(target), 4, generator=draw).softmax(-1).numpy()))
    plan = pack_targets([3, 2], [ROWS, ROWS], shares=[shares, None])
    found, other = model(soft_prompts, plan).split(plan.per_slot)
    assert torch.equal(other, model(soft_prompts, pack_targets([3, 2], [ROWS, ROWS])).split(plan.per_slot)[1])
    wanted = []
    for (source, target), (ids, probabilities) in zip(ROWS, shares, strict=True):
        logits = plain_logits(model, soft_prompts[0], [*source, *target])[len(source) - 1 : -1]
        among = torch.log_softmax(logits, -1).gather(1, torch.from_numpy(ids))
        wanted.append(-(among * torch.from_numpy(probabilities)).sum(-1))
    assert torch.allclose(found, torch.cat(wanted), atol=1e-5)
    one, two = (torch.autograd.grad(part.sum(), soft_prompts[:1])[0] for part in (found, torch.cat(wanted)))
    assert float((one - two).norm() / two.norm()) < 1e-5


def test_the_teacher_is_the_base_behind_the_text(unanswered: SimpleNamespace, base: Base, model: PromptedModel) -> None:
    task = experiment(unanswered)
    loaded, found = taught(task, base, model)
    behind = {"data__input": TEACHER + "{text}\nKind:", "data__teacher": None, "data__validation": None}
    read = load_task(experiment(unanswered, **behind, data__train=str(unanswered.test)), base)
    bare = label_scores(model, [torch.empty(0, base.width)], read.test, read.encoder, Workers())[0]  # type: ignore[arg-type]
    assert found.test and found.test.teaching and loaded.validation and found.validation
    assert np.allclose(found.test.teaching.labels, bare.numpy(), atol=1e-5)
    assert not loaded.train.answered and loaded.test and loaded.test.answered
    assert loaded.train.row(0)[1] == [] and set(loaded.validation.rows["label"][:]) == {-1}
    labels = found.validation.teaching.labels.argmax(1)  # type: ignore[union-attr]
    assert found.validation.rows["label"][:] == labels.tolist() and len({*labels.tolist()}) == 2
    assert found.validation.row(3)[1] == found.encoder.label_ids[labels[3]]
    assert found.test.rows["label"][:] == loaded.test.rows["label"][:], "rows with answers keep them"


def test_only_rows_that_are_read_are_asked_about(unanswered: SimpleNamespace, base: Base, model: PromptedModel) -> None:
    _, found = taught(experiment(unanswered, train__steps=2), base, model)
    labels = found.train.teaching.labels  # type: ignore[union-attr]
    assert np.isfinite(labels).all(1).sum() == 16 and np.isnan(labels).all(1).sum() == 48


def test_without_any_label_a_soft_prompt_learns_what_the_text_tells(
    unanswered: SimpleNamespace, base: Base, model: PromptedModel, tmp_path: Path
) -> None:
    run = Run(model, base, tmp_path, places=2)(experiment(unanswered, train__steps=40, train__learning_rate=0.1))
    [finished] = run.of("finished")
    bare = label_scores(
        model,
        [torch.empty(0, base.width)],
        load_task(experiment(unanswered), base).test,  # type: ignore[arg-type]
        load_task(experiment(unanswered), base).encoder,
        Workers(),
    )[0]
    truth = np.array(load_task(experiment(unanswered), base).test.rows["label"][:])  # type: ignore[union-attr]
    assert (bare.numpy().argmax(1) == truth).mean() < 0.9, "the base alone does not know it"
    assert finished.values["test_teacher_accuracy"] >= 0.95
    assert finished.values["test_agreement"] >= 0.95 and finished.values["test_accuracy"] >= 0.95
    assert "validation_teacher_accuracy" not in finished.values, "these rows have no labels"
    row = load_task(experiment(unanswered), base).train.rows["text"][0]
    many = [len(base.tokenizer(text)["input_ids"]) for text in (TEACHER + row, row)]
    assert finished.values["teacher_tokens"] == many[0] - many[1] > 4
    card = run.result("toy").card
    assert card.experiment["train"]["objective"] == "distill"  # type: ignore[index]


def test_law_4_distilled_side_by_side_and_alone(
    unanswered: SimpleNamespace, base: Base, model: PromptedModel, tmp_path: Path
) -> None:
    tasks = [experiment(unanswered, name=f"t{seed}", train__seed=seed) for seed in range(2)]
    free = {"data__labels": None, "data__target": "", "data__teacher_tokens": 2, "data__test": None}
    tasks.append(experiment(unanswered, name="free", **free))
    packed = Run(model, base, tmp_path / "packed", places=3)(*tasks)
    for task in tasks:
        alone = Run(model, base, tmp_path / "alone")(task).result(task.name).vectors
        assert float((alone - packed.result(task.name).vectors).norm() / alone.norm()) < 1e-5


def test_free_text_learns_the_teachers_answers(
    unanswered: SimpleNamespace, base: Base, model: PromptedModel, tmp_path: Path
) -> None:
    """Rows have no answers: the teacher's, up to the end token, are learned, with the likeliest tokens at each of theirs."""
    task = experiment(
        unanswered,
        data__labels=None,
        data__target="",
        data__test=None,
        data__teacher_tokens=5,
        train__steps=60,
        train__learning_rate=0.1,
    )
    assert task.data.target == "{answer}"
    loaded, found = taught(task, base, model)
    prompt = torch.zeros(1, base.width)
    rows = [loaded.validation.row(at)[0] for at in range(8)]  # type: ignore[union-attr]
    answers = Greedy(model, loaded.encoder, 5).ids(prompt[:0], [loaded.validation.teacher_row(at) for at in range(8)])  # type: ignore[union-attr]
    assert [found.validation.row(at)[1] for at in range(8)] == answers and answers[0][-1] == loaded.encoder.end  # type: ignore[union-attr]
    assert found.max_new_tokens == max(map(len, answers)) == 2
    ids, shares = found.validation.teaching.tokens[0]  # type: ignore[union-attr,index,misc]
    read = loaded.validation.teacher_row(0)  # type: ignore[union-attr]
    logits = plain_logits(model, prompt[:0], read + answers[0])[len(read) - 1 : -1]
    likeliest = torch.log_softmax(logits, -1).topk(CANDIDATES)
    assert np.array_equal(ids[:, 0], answers[0]) and np.allclose(shares.sum(1), 1, atol=1e-5)
    assert np.allclose(shares, likeliest.values.softmax(-1).detach(), atol=1e-5)
    run = Run(model, base, tmp_path)(task)
    learned = Greedy(model, loaded.encoder, 5).ids(run.result("toy").vectors, rows)
    assert sum(one == two for one, two in zip(learned, answers, strict=True)) >= 7


def test_rows_may_have_answers_of_their_own(toy_task: SimpleNamespace, base: Base, model: PromptedModel) -> None:
    """Free text: the teacher's distribution at the tokens of the given answers."""
    task = experiment(toy_task, data__labels=None, data__input="{text}\nKind:", data__teacher=TEACHER)
    loaded, found = taught(task, base, model)
    assert found.train.row(5) == loaded.train.row(5) and loaded.train.answered
    assert len(found.train.teaching.tokens[5][0]) == len(loaded.train.row(5)[1])  # type: ignore[union-attr,index]


def test_the_teacher_reads_the_row_behind_its_text_as_one_text(unanswered: SimpleNamespace, base: Base) -> None:
    """White space separates the two; what is truncated for the one is truncated for the other."""
    loaded = load_task(experiment(unanswered, data__teacher="Sort {them}:", data__max_tokens=9), base)
    assert loaded.train.cut
    for at in range(20):
        row = base.tokenizer.decode(loaded.train.row(at)[0], skip_special_tokens=True)
        assert loaded.train.teacher_row(at) == base.tokenizer(f"Sort {{them}}:\n{row}")["input_ids"]


@pytest.mark.parametrize("system", [None, "Be short."])
def test_in_a_conversation_the_text_is_a_system_message(tmp_path: Path, system: str | None) -> None:
    base = save_base(tmp_path / "base", FORMS["chatml"])
    first = [{"role": "system", "content": system}] if system else []
    asked = [*first, {"role": "user", "content": "apple"}]
    rows = [{"messages": asked}, {"messages": [*asked, {"role": "assistant", "content": "fruit"}]}]
    for number, row in enumerate(rows):
        file = tmp_path / f"{number}.jsonl"
        file.write_text(json.dumps(row) + "\n")
        tables = {
            "name": "a",
            "model": {"path": str(base)},
            "data": {"train": str(file), "teacher": "Say what it is.\n"},
            "prompt": {"length": 4},
        }
        found = find_base(ModelConfig(path=str(base)))
        loaded = load_task(parse_experiment(tables), found)
        text = f"Say what it is.\n{system}" if system else "Say what it is."
        expected = found.tokenizer.apply_chat_template(
            [{"role": "system", "content": text}, asked[-1]], add_generation_prompt=True, return_dict=False
        )
        assert loaded.train.teacher_row(0) == expected and loaded.train.answered == bool(number)
        assert loaded.train.row(0)[0] == found.tokenizer.apply_chat_template(
            asked, add_generation_prompt=True, return_dict=False
        )


def test_rows_that_do_not_fit_behind_the_text(unanswered: SimpleNamespace, base: Base) -> None:
    """Training rows are dropped and counted, others refused."""
    lengths = sorted(map(len, load_task(experiment(unanswered, data__teacher="sort\n"), base).train.rows["teacher_ids"][:]))
    many = [len(base.tokenizer("sort " * times + "\n")["input_ids"]) for times in range(1, 60)]
    answer = max(map(len, load_task(experiment(unanswered), base).encoder.label_ids))
    fitting = base.context - answer - (lengths[0] + lengths[-1]) // 2 + many[0]
    long = "sort " * sum(length <= fitting for length in many) + "\n"
    task = experiment(unanswered, data__teacher=long, data__validation=None, data__test=None)
    loaded = load_task(task, base)
    assert 0 < loaded.train.dropped < 64 and any("dropped" in line for line in describe_task(loaded))
    with pytest.raises(DataError, match=r"validation.jsonl, row \d+: the text of data.teacher and the input have \d+ tokens"):
        load_task(experiment(unanswered, data__teacher=long, data__test=None), base)


def test_a_text_in_a_file_is_a_part_of_the_experiment(unanswered: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "rules.txt").write_text("Sort {them}.\n")
    file = tmp_path / "a.toml"
    data = {key: value for key, value in unanswered.experiment["data"].items() if key != "teacher"}
    lines = [f"{key} = {json.dumps(value)}" for key, value in data.items()]
    file.write_text("\n".join(['name = "a"', "[data]", *lines, 'teacher = "rules.txt"']))
    assert read_experiment(file).data.teacher == "Sort {them}.\n"
    for given, said in {"none.txt": "cannot be read (No such file", "empty.md": "is empty"}.items():
        (tmp_path / "empty.md").write_text(" \n")
        with pytest.raises(ExperimentError) as refused:
            read_experiment(file, [f"data.teacher={given}"])
        assert re.search(rf"data.teacher: \S*{re.escape(given)} {re.escape(said)}", str(refused.value))


def test_an_experiment_made_in_python_may_name_the_file(unanswered: SimpleNamespace, tmp_path: Path) -> None:
    """Its name would otherwise be the teacher's text."""
    (tmp_path / "rules.txt").write_text("Sort them.\n")
    task = experiment(unanswered, data__teacher=str(tmp_path / "rules.txt"))
    assert resolved(task)[0].data.teacher == "Sort them.\n"
    with pytest.raises(ExperimentError, match="data.teacher: .*none.txt cannot be read"):
        resolved(experiment(unanswered, data__teacher=str(tmp_path / "none.txt")))


@pytest.mark.parametrize("begun", [False, True])
def test_a_stopped_compression_says_how_it_goes_on(begun: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all that was typed, and what is typed then is understood."""

    def stop(*_: Any, **how: Any) -> None:
        asked.append(how["resume"])
        raise KeyboardInterrupt

    asked: list[bool] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(api, "prepare", lambda *_: None)
    monkeypatch.setattr(api, "train", stop)
    monkeypatch.setattr(run_record, "has_begun", lambda _: begun)
    typed = ["compress", "Be kind.", "name=a", "--rows", "a.jsonl", "--input", "{text}\nKind:", "--labels", "x,y",
             "--base", "builtin", "--length", "7"]  # fmt: skip
    done = CliRunner().invoke(app, typed)
    again = shlex.split(done.stderr.partition("continue with: ptuning ")[2])
    assert done.exit_code == 130 and again == [*typed, *(["--resume"] if begun else [])]
    assert CliRunner().invoke(app, again).exit_code == 130 and asked == [False, begun]


def test_a_job_takes_the_file_along(unanswered: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rules.txt").write_text("Sort them.\n")
    tables = {**unanswered.experiment, "compute": {"storage": "s3://bucket/runs"}, "tracking": {"uri": "http://mlflow:5000"}}
    tables["data"]["teacher"] = str(tmp_path / "rules.txt")
    file = tmp_path / "a.toml"
    file.write_text(
        "".join(
            f"{key} = {json.dumps(value)}\n"
            if isinstance(value, str)
            else f"[{key}]\n" + "".join(f"{name} = {json.dumps(each)}\n" for name, each in value.items())
            for key, value in tables.items()
        )
    )
    job = build_package("train", str(file), [], shared=[], env=[], here={})
    [named] = [each for each in job.overrides if each.startswith("data.teacher=")]
    assert re.fullmatch(r"data.teacher=shipped:rules-[0-9a-f]{12}\.txt", named)
    (there := tmp_path / "job").mkdir()
    job.pack(there)
    (tmp_path / "rules.txt").unlink()
    monkeypatch.chdir(there)
    assert read_experiment(job.experiment_name, job.overrides).data.teacher == "Sort them.\n"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train__objective": "distill"}, 'train.objective: "distill" needs data.teacher'),
        ({"data__teacher": "a", "train__objective": "choice"}, 'data.teacher: has no effect with the objective "choice"'),
        ({"data__teacher": "a", "train__class_weights": "balanced"}, "train.class_weights: has no effect on what a teacher"),
        ({"data__teacher": "a", "train__text_weight": 0.3}, 'train.text_weight: has no effect with the objective "distill"'),
        ({"data__teacher": "  "}, "data.teacher"),
    ],
)
def test_what_does_not_go_together_is_refused(toy_task: SimpleNamespace, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ExperimentError, match=said.replace(".", r"\.")):
        experiment(toy_task, **changes)


def test_measures_of_agreement() -> None:
    teacher = np.log(np.array([[0.5, 0.5, 0.0], [0.1, 0.2, 0.7]]) + 1e-300)
    scores = np.log(np.array([[0.25, 0.25, 0.5], [0.1, 0.2, 0.7]]))
    found = metrics.agreement(scores, teacher, np.array([1, 2]))
    assert found == pytest.approx({"agreement": 0.5, "divergence": np.log(2) / 2, "teacher_accuracy": 0.5})
    assert "teacher_accuracy" not in metrics.agreement(scores, teacher, None)


def test_the_command_makes_the_experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rules.md").write_text("Be kind.\n")
    monkeypatch.chdir(tmp_path)
    made = compression("rules.md", "a.jsonl", "{text}\nKind:", "fruit, tool", "builtin", 7, ["name=b", "train.steps=5"])
    assert (made.name, made.train.steps, made.prompt.length, made.objective) == ("b", 5, 7, "distill")
    assert made.data.teacher == "Be kind.\n" and made.data.validation == 0.1 and made.metric == "loss"
    assert (made.data.target, made.data.labels) == (" {label}", ("fruit", "tool"))
    assert compression("a", "a.jsonl", "{text}\n", "x,y", "builtin", 7, []).data.target == "{label}"
    assert compression("a", "a.jsonl", "{text}\n", "", "builtin", 7, []).data.target == "{answer}"
    talk = compression("a", "a.jsonl", "", "x,y", "builtin", 7, [])
    assert talk.data.is_chat and talk.data.labels == ("x", "y")
    with pytest.raises(ExperimentError, match="compress: data.input: contains no field of the row"):
        compression("a", "a.jsonl", "text", "", "builtin", 7, [])


@pytest.mark.parametrize("labels", [TRIE.labels, ((1, 4, 5, 2), (3, 2), (3, 4, 6, 2), (3, 4, 7, 8, 2))])
def test_a_plan_counts_no_less_than_a_step_computes(toy_task: SimpleNamespace, labels: Any) -> None:
    trie = LabelTrie(labels)
    names = [f"label {number}" for number in range(len(labels))]
    task = experiment(toy_task, data__labels=names, data__teacher="Sort them.")
    longest, source = max(map(len, labels)), [5, 6, 7, 8, 9]
    planned = RunShape.read(task, len(source) + longest, longest)
    plan = pack_targets([3], [[(source, list(labels[0]))]], [Objective(trie, text=False, all_labels=True)])
    work = Workload(1, 3, 1, planned.tokens, planned.targets, planned.compared)
    assert plan.positions <= work.positions <= plan.positions + len(labels) * longest
    assert planned.compared >= len(trie.ids)


def test_a_plan_knows_that_a_teacher_will_answer(unanswered: SimpleNamespace, base: Base) -> None:
    free = {"data__labels": None, "data__target": "", "data__teacher_tokens": 9}
    for task, many in ((experiment(unanswered), 4), (experiment(unanswered, **free), 9)):
        rows = load_task(task, base).train
        planned = RunShape.of_rows(task, rows.lengths.tolist(), rows.target_lengths.tolist())
        assert planned.targets == many and planned.tokens >= int(rows.lengths.mean()) + many
