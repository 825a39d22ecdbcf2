"""`import ptuning`: the names, what they load, and a soft prompt from training to answers in Python."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import REPOSITORY
from peft import PeftModel
from test_tracking import free_port
from transformers import AutoModelForCausalLM

import ptuning
from ptuning.data.encoder import Encoder
from ptuning.model.base import find_base
from ptuning.model.prompted_model import PromptedModel
from ptuning.training.distributed import Workers
from ptuning.training.evaluate import evaluate
from ptuning.training.messages import EVENTS, Finished, Loaded, event_fields, read_event


@pytest.mark.fast
def test_importing_loads_nothing() -> None:
    """No module of ours but the empty front, nor any framework; `dir` names what there is."""
    code = (
        "import sys, ptuning; assert not [name for name in sys.modules if name.startswith('ptuning.')]; "
        "assert 'pydantic' not in sys.modules; print(*dir(ptuning)); ptuning.UserError; "
        "print(not {'torch', 'ray', 'mlflow', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names, light = done.stdout.splitlines()
    assert names.split() == sorted(ptuning.__all__) and light == "True"


@pytest.mark.fast
def test_every_name_is_there() -> None:
    assert all(getattr(ptuning, name) is not None for name in ptuning.__all__)
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = ptuning.trian  # type: ignore[attr-defined]


@pytest.mark.fast
@pytest.mark.parametrize(
    ("tables", "said"),
    [
        ({"name": "a/b"}, "Experiment: name: 'a/b' is not a valid name"),
        ({"nmae": "a"}, "Experiment: name: is missing; set it"),
        (
            {"name": "a", "train": {"lerning_rate": 1.0}},
            "Experiment: train.lerning_rate: unknown key; did you mean train.",
        ),
    ],
)
def test_an_experiment_that_is_wrong_is_one_sentence(tables: dict[str, Any], said: str) -> None:
    with pytest.raises(ptuning.UserError) as wrong:
        ptuning.Experiment(**tables, data={"train": "rows.csv", "input": "{a}", "target": "{b}"})
    assert str(wrong.value).startswith(said) and "\n" not in str(wrong.value)


@pytest.mark.fast
def test_a_file_and_its_overrides(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text('name = "a"\n[data]\ntrain = "rows.csv"\ninput = "{a}"\ntarget = "{b}"\n')
    experiment = ptuning.Experiment.load(path, "train.steps=7")
    assert experiment.train.steps == 7
    assert experiment == ptuning.Experiment(
        name="a", data={"train": "rows.csv", "input": "{a}", "target": "{b}"}, train={"steps": 7}
    )
    with pytest.raises(ptuning.UserError, match=rf"^{path}: train.stesp: unknown key"):
        ptuning.Experiment.load(path, "train.stesp=7")


@pytest.mark.fast
def test_events_come_back_as_they_were() -> None:
    """Through plain data, as they travel and lie in checkpoints."""
    shares = [{"held": 1, "whole": 2}]
    details = {"dtype": "float32", "shared_prefix": True, "shares": shares, "places": ["pid 1"], "group": 0, "unknown": 1}
    loaded = read_event({"kind": "loaded", "run": "a", "step": 0, "time_ms": 5, "values": {}, "details": details})
    assert isinstance(loaded, Loaded) and loaded.workers == 1 and loaded.shares[0].whole == 2
    assert event_fields(loaded)["details"]["shares"] == shares and read_event(event_fields(loaded)) == loaded
    finished = Finished("a", 3, {"test_loss": 1.0}, best_step=2, early=False, soft_prompt="x", content_hash="y", peak_bytes=[1])
    assert read_event(event_fields(finished)) == finished
    assert set(EVENTS) == {"loading", "loaded", "stuck", "broken", "start", "step", "evaluation", "finished", "failed"}


@pytest.fixture
def two(finished_run: SimpleNamespace) -> dict[str, ptuning.SoftPrompt]:
    """A trained soft prompt and another one of the same base."""
    first = ptuning.load(finished_run.summary["soft_prompt"])
    generator = torch.Generator().manual_seed(0)
    vectors = first.vectors + torch.randn(first.vectors.shape, generator=generator)
    from ptuning.model.soft_prompt import content_hash

    card = first.card.model_copy(update={"content_hash": content_hash(vectors), "name": "other"})
    return {"toy": first, "other": ptuning.SoftPrompt(vectors, card)}


@pytest.mark.cluster
@pytest.mark.filterwarnings("ignore:Position ids are not supported")  # PEFT, of its own generate
def test_a_predictor_says_what_evaluation_says(two: dict[str, ptuning.SoftPrompt], finished_run: SimpleNamespace) -> None:
    """p of every label to 1e-5 (law 6), for two soft prompts side by side; free text as PEFT generates it."""
    experiment = ptuning.Experiment.model_validate(finished_run.tables)
    base = find_base(experiment.model)
    from ptuning.data.task import load_task

    task = load_task(experiment, base)
    model = PromptedModel(base.load(torch.float32))
    vectors = [each.vectors for each in two.values()]
    measured = evaluate(model, vectors, task.test, task.encoder, Workers())
    lines = Path(experiment.data.test).read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    with ptuning.Predictor(two, dtype="float32") as predictor:
        assert predictor.names == ["toy", "other"]
        for name, evaluation in zip(two, measured, strict=True):
            shares = predictor.probabilities(texts, name)
            expected = [row["probability"] for row in evaluation.predictions]
            assert predictor.predict(texts, name) == [row["prediction"] for row in evaluation.predictions]
            assert [max(each.values()) for each in shares] == pytest.approx(expected, abs=1e-5)
            assert all(sum(each.values()) == pytest.approx(1, abs=1e-6) for each in shares)
        free = predictor.generate(texts[:4], "toy", max_new_tokens=5)
        with pytest.raises(ptuning.UserError, match="there are several soft prompts; name one of toy, other"):
            predictor.predict(texts)
        with pytest.raises(ptuning.UserError, match="othr: no such soft prompt; did you mean other"):
            predictor.predict(texts, "othr")
        with pytest.raises(ptuning.UserError, match="texts: is a single text; pass a list"):
            predictor.predict(texts[0], "toy")
        with pytest.raises(ptuning.UserError, match="the text has .* tokens, .* fit"):
            predictor.predict(["word " * 5000], "toy")
        assert len(predictor.predict(["word " * 5000], "toy", truncate=True)) == 1
        assert predictor.predict([], "toy") == []
    encoder = Encoder(two["toy"].card.template, base.tokenizer, 100)
    plain = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(experiment.model.path, dtype=torch.float32), finished_run.summary["soft_prompt"]
    )
    for text, answer in zip(texts[:4], free, strict=True):
        ids = torch.tensor([encoder.input_ids({"text": text})])
        out = plain.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False,
            eos_token_id=base.tokenizer.eos_token_id, pad_token_id=0,
        )  # fmt: skip
        said = out[0, ids.shape[1] :] if out.shape[1] > 5 else out[0]
        assert base.tokenizer.decode(said, skip_special_tokens=True).strip() == answer


@pytest.mark.cluster
def test_a_registry_in_python(two: dict[str, ptuning.SoftPrompt], finished_run: SimpleNamespace, tmp_path: Path) -> None:
    registry = ptuning.Registry(str(tmp_path))
    assert list(registry.list()) == []
    folder = str(tmp_path / "other")
    two["other"].save(folder)
    assert str(registry.add(finished_run.summary["soft_prompt"], "toy")) == "toy:1"
    assert str(registry.add(folder, "toy")) == "toy:2"
    assert [str(version) for version in registry.list("toy")] == ["toy:2", "toy:1"]
    assert str(registry.get("toy")) == "toy:2", "the newest without a champion"
    assert registry.promote("toy", 1).moved and registry.promote("toy:2", force=True).previous == 1
    assert ptuning.load("toy@champion", storage=str(tmp_path)).card.content_hash == two["other"].card.content_hash
    assert registry.rollback("toy") == 1
    assert torch.equal(registry.load("toy").vectors, two["toy"].vectors)
    with pytest.raises(ptuning.UserError, match="toy: which version"):
        registry.promote("toy")
    with pytest.raises(ptuning.UserError, match="is the champion"):
        registry.delete("toy:1")
    assert str(registry.delete("toy:2")) == "toy:2"
    registry.export("toy", str(tmp_path / "out"))
    assert torch.equal(ptuning.load(str(tmp_path / "out")).vectors, two["toy"].vectors)


@pytest.mark.cluster
def test_results_show_themselves(finished_run: SimpleNamespace) -> None:
    experiment = ptuning.Experiment.model_validate(finished_run.tables)
    result = ptuning.train(experiment, resume=True, progress=False)
    assert result.as_json() == finished_run.summary, "a finished run is read again"
    assert str(result).startswith("toy: test accuracy ") and torch.is_tensor(result.soft_prompt.vectors)
    shown = result._repr_html_()
    assert "test_accuracy" in shown and "data:image/png;base64," in shown
    with pytest.raises(ptuning.UserError, match="register: 'a/b' is not a valid name"):
        ptuning.train(experiment, register="a/b")


@pytest.mark.nightly
@pytest.mark.timeout(600)
def test_the_worked_examples_run(
    local_ray: Path, toy_task: SimpleNamespace, write_toml: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """jobs/train.py, jobs/search.py and jobs/serve.py, in this order and in one storage folder."""
    toy_task.experiment["search"] = {"trials": 2, "slots": 2, "length": [4], "finalists": 1, "seeds": 1}
    path = str(write_toml(toy_task.experiment))
    said = []
    for name, *overrides in (("train",), ("search", "name=found"), ("serve", f"serve.port={free_port()}")):
        runpy.run_path(str(REPOSITORY / "jobs" / f"{name}.py"))["main"](path, *overrides)
        said.append(capsys.readouterr().out.splitlines())
    train, search, serve = said
    assert train[0].startswith("toy:1: {") and len(train) == 3 and train[1].split(" ", 1)[0] in ("fruit", "tool")
    assert search[0].startswith("1 t00") and search[-1].startswith("found:1 is champion, test metrics {")
    assert serve in (["toy:1: fruit"], ["toy:1: tool"])


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_a_winner_that_the_gate_refuses_is_not_promoted(
    local_ray: Path, toy_task: SimpleNamespace, write_toml: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """jobs/retune.py, twice: what a RayCronJob runs."""
    toy_task.experiment["search"] = {"trials": 1, "slots": 1, "length": [4], "finalists": 1, "seeds": 1}
    path = str(write_toml(toy_task.experiment))
    retune = runpy.run_path(str(REPOSITORY / "jobs" / "retune.py"))["main"]
    retune("toy", path, "name=first")
    assert capsys.readouterr().out.splitlines()[-1].startswith("toy:1 is champion, test metrics {")
    other = [f"data.test={toy_task.validation}", f"data.validation={toy_task.test}"]
    with pytest.raises(SystemExit, match="the champion of toy stays: toy:2: it has no metric on the same rows as the champion"):
        retune("toy", path, "name=second", *other)
    experiment = ptuning.Experiment.load(path)
    versions = ptuning.Registry(experiment.compute.storage, experiment.tracking.uri).list()
    assert {str(version): list(version.aliases) for version in versions} == {"toy:1": ["champion"], "toy:2": []}
