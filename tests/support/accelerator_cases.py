"""Law 12, device-blind: every room that touches tensors gives on an accelerator what it gives on a CPU.

The accelerator is pretended (`support.accelerator`): it computes on the CPU, so results are the same bits, and it refuses
tensors of two devices in one operation, as a GPU does. `tests/test_accelerator.py` runs this file in a process of its own:
torch must know the device before its first backward pass, and for good.
"""

from __future__ import annotations

import itertools
import queue
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import tiny_base
from torch import Tensor

from ptuning.data.task import load_task
from ptuning.inference.sampling import Sampling, Token
from ptuning.inference.transformers_engine import TransformersEngine
from ptuning.inference.types import End, EngineConfig, Request
from ptuning.inference.virtual_tokens import ROWS, VirtualTokens
from ptuning.model import varlen_attention
from ptuning.model.base import Base
from ptuning.model.label_trie import LabelTrie
from ptuning.model.packing import Objective, pack_labels, pack_targets
from ptuning.model.prompted_model import PromptedModel
from ptuning.model.self_check import choose_pass
from ptuning.training import generation
from ptuning.training.generation import Greedy
from support.accelerator import DEVICE, counting
from support.training import Killed, Run, experiment

TRIE = LabelTrie(((5, 6, 2), (5, 7, 2), (8, 2)))


@pytest.fixture(scope="module")
def models(base: Base, device: torch.device) -> dict[str, PromptedModel]:
    """The toy base on the CPU and on the accelerator."""
    return {"cpu": PromptedModel(base.load(torch.float32)), "there": PromptedModel(base.load(torch.float32, device))}


def test_a_base_is_loaded_to_the_device(models: dict[str, PromptedModel], device: torch.device) -> None:
    parameters = dict(models["there"].named_parameters())
    assert {each.device for each in parameters.values()} == {device}
    assert all(torch.equal(each, parameters[name].cpu()) for name, each in models["cpu"].named_parameters())


def test_new_rows_are_written_before_a_step_can_read_them(device: torch.device) -> None:
    """Steps run on another stream than that of the thread that adds."""
    bank = VirtualTokens(torch.nn.Embedding(10, 4, device=device), 10)
    before = DEVICE.synchronised
    bank.add(torch.ones(2, 4))
    assert DEVICE.synchronised > before


def test_tensors_of_two_devices_are_refused(device: torch.device) -> None:
    there, here = torch.ones(3, device=device), torch.ones(3)
    for mixed in (lambda: there + here, lambda: there.index_select(0, torch.tensor([1])), lambda: torch.cat([here, there])):
        with pytest.raises(RuntimeError, match="pretend:0 and cpu"):
            mixed()
    assert (there + torch.tensor(1.0))[torch.tensor([0, 2])].tolist() == [2.0, 2.0]  # as CUDA allows
    assert there.to("cpu").device.type == here.device.type and here.to(device).device == device


def test_kernels_copies_and_waits_are_counted(device: torch.device) -> None:
    values = torch.ones(4, 4, device=device)
    with counting() as counts:
        doubled = (values * 2).T[1:]
        doubled.cpu()
        torch.ones(3).to(device)
        float(doubled.sum())
        doubled[doubled > 1]
    assert counts == {"kernels": 4, "to host": 1, "to device": 1, "waits": 2}


def drawn(lengths: tuple[int, ...], width: int = 32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(length, width, generator=generator) * 0.3 for length in lengths]


def passed(model: PromptedModel, plan: Callable[[], Any], vectors: list[Tensor]) -> list[Tensor]:
    """The predictions of a pass and their gradients, on the CPU."""
    device = model.base.device
    leaves = [each.to(device, copy=True).requires_grad_() for each in vectors]
    nll = model(leaves, plan())
    nll.sum().backward()
    return [each.detach().cpu() for each in (nll, *(leaf.grad for leaf in leaves))]


def same(here: list[Tensor], there: list[Tensor]) -> None:
    """The same predictions to the bit; gradients but for the order of their sums (tensors of the device have other strides)."""
    assert torch.equal(here[0], there[0])
    for one, two in zip(here[1:], there[1:], strict=True):
        assert float((one - two).norm() / one.norm()) < 1e-6


@pytest.mark.parametrize("architecture", ["llama_tied_gqa", "gpt2", "gemma2", "qwen2_window", "gpt_neo", "falcon"])
def test_a_pass_and_its_gradients(architecture: str, device: torch.device) -> None:
    here, there = (PromptedModel(tiny_base(architecture, attention=None)).to(each) for each in ("cpu", device))
    choose_pass(there, architecture)
    choose_pass(here, architecture)
    assert there.shared_prefix == here.shared_prefix
    rows = [[([5, 6, 7, 9], [5, 6, 2]), ([8] * 11, [8, 2])], [([11, 12], [5, 7, 2])]]
    objectives = [Objective(TRIE), Objective(TRIE, text=False)]
    vectors = drawn((3, 6))
    plans: list[Callable[[], Any]] = [
        lambda: pack_targets([3, 6], rows),
        lambda: pack_targets([3, 6], rows, objectives),
        lambda: pack_labels([3, 6], [[[5, 6, 9], [7]], [[10] * 9]], TRIE),
    ]
    for plan in plans:
        same(passed(here, plan, vectors), passed(there, plan, vectors))


@pytest.mark.parametrize("recompute", [False, True])
def test_the_attention_of_gpus(recompute: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, which GPUs compute otherwise, as its rounding hides nothing."""
    monkeypatch.setattr(varlen_attention, "suits", lambda *tensors: tensors[0].device == device)
    monkeypatch.setattr(PromptedModel, "cascades", property(lambda model: model.base.device == device))
    here, there = (PromptedModel(tiny_base("llama_tied_gqa", attention=None)).to(each) for each in ("cpu", device))
    if recompute:
        there.checkpoint_gradients()
    rows = [[([5, 6, 7, 9], [5, 6, 2]), ([8] * 11, [8, 2])], [([11, 12], [5, 7, 2])]]
    vectors = drawn((3, 6))
    plans: list[Callable[[], Any]] = [
        lambda: pack_targets([3, 6], rows, [Objective(TRIE), Objective(TRIE, text=False)]),
        lambda: pack_labels([3, 6], [[[5, 6, 9], [7]], [[10] * 9]], TRIE),
    ]
    prefix = torch.randn(4, 2, 2, 2, 8, generator=torch.Generator().manual_seed(1))
    objectives = [Objective(TRIE, text=False), Objective(TRIE), Objective(TRIE)]
    prefixed: list[Callable[[], Any]] = [
        lambda: pack_targets([4, 3, 4], [*rows, rows[1]], objectives, [0, 2]),
        lambda: pack_labels([4, 3, 4], [[[5, 6, 9], [7]], [[10] * 9], [[5]]], TRIE, [0, 2]),
    ]
    for plan, given in [*((plan, vectors) for plan in plans), *((plan, [prefix, vectors[0], -prefix]) for plan in prefixed)]:
        with counting():
            found = passed(there, plan, given)
            assert {"_flash_attention_forward"} < {name.partition(" ")[0] for _, name in DEVICE.places}
        for one, two in zip(passed(here, plan, given), found, strict=True):
            assert float((one - two).norm() / one.norm()) < 1e-5


def test_recomputed_activations(base: Base, device: torch.device) -> None:
    rows = [[([5, 6, 7, 9], [5, 6, 2]), ([8] * 11, [8, 2])]]
    found = []
    for where in ("cpu", device):
        model = PromptedModel(base.load(torch.float32)).to(where)
        model.checkpoint_gradients()
        found.append(passed(model, lambda: pack_targets([3], rows), drawn((3,))))
    same(*found)


VARIANTS: dict[str, dict[str, Any]] = {
    "adamw": {"train__starts": 2, "train__class_weights": "balanced"},
    "adafactor": {"train__optimizer": "adafactor"},
    "text": {"train__objective": "text", "data__labels": None, "train__micro_batch_size": 4},
    "kv": {"prompt__kind": "kv"},
    "distill": {"data__teacher": "sort "},
    "distill-text": {"data__teacher": "sort ", "data__labels": None},
    "frozen": {"prompt__frozen": 1, "train__weight_decay": 0.1},
}


def test_training_and_what_was_killed(
    models: dict[str, PromptedModel], base: Base, toy_task: SimpleNamespace, tmp_path: Path
) -> None:
    """Runs side by side, from the first step to the soft prompts that are saved. On the accelerator they are killed and
    continue from their checkpoints (law 5)."""
    for file in (toy_task.validation, toy_task.test):
        file.write_text("".join(file.read_text().splitlines(keepends=True)[:4]))
    short = {"train__steps": 4, "train__evaluate_every": 3, "train__checkpoint_every": 2, "train__metric": "loss"}
    tasks = [experiment(toy_task, name=name, **short, **changes) for name, changes in VARIANTS.items()]
    done = Run(models["cpu"], base, tmp_path / "cpu", places=len(tasks))(*tasks)
    killed = Run(models["there"], base, tmp_path / "there", places=len(tasks))
    with pytest.raises(Killed):
        killed(*tasks, stop_after=3)
    resumed = Run(models["there"], base, tmp_path / "there", places=len(tasks))(*tasks)
    assert [event.step for event in resumed.of("start")] == [2] * len(tasks)
    for task in tasks:
        here, there = done.result(task.name), resumed.result(task.name)
        assert float((here.vectors - there.vectors).norm() / here.vectors.norm()) < 1e-5
        assert there.card.metrics == pytest.approx(here.card.metrics, rel=1e-4)


@pytest.mark.parametrize("way", ["padded", "alone", "recomputed"])
def test_greedy_text(
    models: dict[str, PromptedModel], base: Base, toy_task: SimpleNamespace, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "how_it_generates", lambda model: way)
    encoder = load_task(experiment(toy_task), base).encoder
    vectors = drawn((4,), base.width)[0]
    inputs = [[5, 6, 7], [9] * 8, [40, 41]]
    here, there = (
        Greedy(model, encoder, 5).texts(vectors.to(model.base.device), inputs) for model in (models["cpu"], models["there"])
    )
    assert here == there and len(here) == 3


ENGINES = {"paged": ("llama_tied_gqa", 3), "window": ("gemma3", 1), "plain": ("falcon", 1)}
"""Architecture, and how often soft prompts come and leave."""
SMALL = EngineConfig(running=6, waiting=40, batch_tokens=48, cache_bytes=1 << 20, context=128)


@pytest.mark.parametrize("kind", ["paged", "plain", pytest.param("window", marks=pytest.mark.nightly)])
def test_an_engine_answers(kind: str, device: torch.device) -> None:
    """Greedy and sampled text, log-probabilities and labels, while soft prompts come and leave."""
    answers = []
    for where in ("cpu", device):
        architecture, rounds = ENGINES[kind]
        base: Any = tiny_base(architecture, attention=None)
        engine = TransformersEngine(base.to(where), 2, SMALL)
        try:
            assert engine.kind == ("plain" if kind == "plain" else "paged")
            answers.append(asked(engine, rounds))
        finally:
            engine.close()
    here, there = answers
    assert here.tokens == there.tokens and here.numbers == pytest.approx(there.numbers, rel=1e-4)


class Answers:
    """Tokens, and log-probabilities of tokens and labels."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.numbers: list[float] = []

    def read(self, sink: queue.SimpleQueue[Token | End]) -> None:
        while isinstance(event := sink.get(timeout=60), Token):
            self.tokens += [event.id, *(token for token, _ in event.top)]
            self.numbers += [] if event.logprob is None else [event.logprob, *(logprob for _, logprob in event.top)]
        assert event.reason in ("stop", "length"), event


def asked(engine: TransformersEngine, rounds: int) -> Answers:
    """What an engine answers while the bank of soft prompts grows, is compacted, and grows again."""
    answers = Answers()
    kept = [engine.add(vectors, str(number)) for number, vectors in enumerate(drawn((3, 20)))]
    for number in range(rounds):
        passing = engine.add(torch.full((ROWS, 32), 0.01 * number), f"passing {number}")
        sinks: list[queue.SimpleQueue[Token | End]] = []
        for handle, sampling in itertools.product([*kept, None], (Sampling(top=2), Sampling(0.8, 0.9, seed=number))):
            sinks.append(queue.SimpleQueue())
            engine.submit(Request([5 + number, 6, 7], handle, 3, sampling), sinks[-1].put)
        for sink in sinks:
            answers.read(sink)
        scores = engine.choose(kept[number % 2], [[5, 6, 7], [9] * 20], TRIE).result(60)
        answers.numbers += [score for row in scores for score in row]
        engine.remove(passing)
    for handle in kept:
        engine.remove(handle)
    return answers
