"""Key-value prefixes: in the pass, in training beside embeddings, as artefact, and in serving."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from conftest import tiny_base, tiny_config
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from support.training import Killed, Run, experiment
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from ptuning.config import ExperimentError
from ptuning.data.task import load_task
from ptuning.errors import BaseError
from ptuning.inference.engine import Engine
from ptuning.inference.sampling import Token
from ptuning.inference.transformers_engine import TransformersEngine
from ptuning.inference.types import EngineConfig, Request, RequestError
from ptuning.model import soft_prompt
from ptuning.model.base import Base
from ptuning.model.kv_prefix import KVShape, cache_of, computed, kv_shape
from ptuning.model.label_trie import LabelTrie
from ptuning.model.limits import PAGE
from ptuning.model.packing import Objective, pack_labels, pack_targets
from ptuning.model.prompted_model import PromptedModel
from ptuning.model.self_check import choose_pass
from ptuning.model.soft_prompt import Card, SoftPrompt, SoftPromptError
from ptuning.planning.capacity import step_flops
from ptuning.planning.meta_model import MetaModel
from ptuning.planning.workload import Workload
from ptuning.training.distributed import Workers
from ptuning.training.evaluate import generate_rows
from ptuning.training.messages import StartRun
from ptuning.training.slot import initial_vectors

pytestmark = pytest.mark.fast

ROWS = [([5, 6, 7, 8, 9], [3, 4]), ([4, 5, 6], [9]), ([9, 8, 7], [11, 12, 13])]
TRIE = LabelTrie(((5, 6, 2), (5, 7, 2), (8, 2)))


def prefixed(architecture: str, **changes: Any) -> PromptedModel:
    model = PromptedModel(tiny_base(architecture, **changes))
    choose_pass(model, architecture)
    return model


def drawn(length: int, shape: KVShape, seed: int = 0) -> Tensor:
    """A prefix that no embeddings have."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(length, shape.layers, 2, shape.heads, shape.width, generator=draw)


def by_cache(model: PromptedModel, prefix: Tensor, rows: list[tuple[list[int], list[int]]]) -> Tensor:
    """The predictions of transformers itself, which continues the prefix as its cache."""
    found = []
    with model.plain() as base:
        for source, target in rows:
            ids = torch.tensor([source + target])
            logits = base(input_ids=ids, past_key_values=cache_of([prefix], torch.float32), use_cache=True).logits[0]
            found.append(cross_entropy(logits[len(source) - 1 : -1], ids[0, len(source) :], reduction="none"))
    return torch.cat(found)


@pytest.mark.parametrize(
    "architecture", ["llama_tied_gqa", "gpt2", "gpt_neox", "opt", "qwen2_window", "gemma2", "gemma3", "cohere"]
)
def test_the_pass_is_that_of_transformers_with_the_prefix_as_cache(architecture: str) -> None:
    """Predictions and gradients, beside a soft prompt of embeddings; P is longer than the windows."""
    model = prefixed(architecture)
    shape = kv_shape(model)
    prefixes = [drawn(7, shape, 1).requires_grad_(), drawn(2, shape, 2).requires_grad_()]
    other = torch.randn(3, 32, generator=torch.Generator().manual_seed(3))
    plan = pack_targets([7, 3, 2], [ROWS, ROWS, ROWS[:1]], kv=[0, 2])
    parts = model([prefixes[0], other, prefixes[1]], plan).split(plan.per_slot)
    expected = [by_cache(model, prefixes[0], ROWS), None, by_cache(model, prefixes[1], ROWS[:1])]
    for found, wanted in zip(parts, expected, strict=True):
        assert wanted is None or torch.allclose(found, wanted, atol=2e-5)
    theirs = torch.autograd.grad(expected[0].sum() + expected[2].sum(), prefixes)  # type: ignore[union-attr]
    ours = torch.autograd.grad(parts[0].sum() + parts[2].sum(), prefixes)
    for one, two in zip(ours, theirs, strict=True):
        assert float((one - two).norm() / two.norm()) < 1e-5
    alone = model([other], pack_targets([3], [ROWS]))
    assert torch.allclose(parts[1], alone, atol=1e-6), "what is beside a prefix does not change"


def test_golden_law_a_prefix_made_of_a_text_is_the_text() -> None:
    model = prefixed("llama_tied_gqa")
    text = [11, 12, 13, 14]
    with torch.no_grad():
        prefix = computed(model, model.base.get_input_embeddings()(torch.tensor(text)))
        found = model([prefix], pack_targets([4], [ROWS], kv=[0]))
        expected = model([torch.empty(0, 32)], pack_targets([0], [[(text + source, target) for source, target in ROWS]]))
        labels = model([prefix], pack_labels([4], [[row[0] for row in ROWS]], TRIE, [0]))
        longer = model([torch.empty(0, 32)], pack_labels([0], [[text + row[0] for row in ROWS]], TRIE))
    assert torch.allclose(found, expected, atol=1e-5) and torch.allclose(labels, longer, atol=1e-5)


def test_recomputed_activations_change_memory_only() -> None:
    gradients = []
    for recompute in (False, True):
        model = prefixed("llama_tied_gqa")
        prefix = drawn(4, kv_shape(model)).requires_grad_()
        if recompute:
            model.checkpoint_gradients()
        model([prefix], pack_targets([4], [ROWS], [Objective(None)], [0])).sum().backward()
        gradients.append(prefix.grad)
    assert gradients[0] is not None and torch.equal(*gradients)  # type: ignore[arg-type]


def test_its_tokens_cost_no_compute() -> None:
    """By torch's counter, and as the plan counts."""
    rows = [([5] * 9, [8, 9, 2])] * 4
    model = prefixed("llama_tied_gqa", num_hidden_layers=4)
    vectors = {False: torch.randn(24, 32).requires_grad_(), True: drawn(24, kv_shape(model)).requires_grad_()}
    counted, planned = [], []
    for kv in (False, True):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model([vectors[kv]], pack_targets([24], [rows], kv=[0] * kv)).sum().backward()
        counted.append(counter.get_total_flops())
        shape = MetaModel(tiny_config("llama_tied_gqa", num_hidden_layers=4), torch.float32).shape
        planned.append(step_flops(shape, Workload(1, 24, 4, 12, 3, kv=kv)))
    assert counted[1] < 0.75 * counted[0]
    assert planned[1] / planned[0] == pytest.approx(counted[1] / counted[0], rel=0.05)


@pytest.mark.parametrize("architecture", ["gpt_neo", "falcon"])
def test_a_base_that_takes_no_prefix_is_refused(architecture: str) -> None:
    with pytest.raises(BaseError, match='which a key-value prefix needs; set prompt.kind = "embedding"'):
        kv_shape(prefixed(architecture))


# -- training ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(model: PromptedModel, base: Base, tmp_path: Path) -> Any:
    return lambda folder, places=1: Run(model, base, tmp_path / folder, places)


def kv(toy_task: SimpleNamespace, **changes: Any) -> Any:
    return experiment(toy_task, **{"prompt__kind": "kv", "prompt__length": 5, "train__learning_rate": 0.1, **changes})


def test_a_prefix_learns_the_toy_task_and_comes_back(run: Any, toy_task: SimpleNamespace, model: PromptedModel) -> None:
    done = run("kv")(kv(toy_task, train__steps=60, train__evaluate_every=20))
    [finished] = done.of("finished")
    assert finished.values["test_accuracy"] > 0.9
    result = done.result("toy")
    assert result.card.kind == "kv" and result.card.kv_shape == kv_shape(model) and result.vectors.shape[:3] == (5, 2, 2)
    assert result.card.public().experiment["prompt"]["kind"] == "kv"  # type: ignore[index]


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_law_4_beside_embeddings_as_alone(run: Any, toy_task: SimpleNamespace, optimizer: str) -> None:
    changes: list[dict[str, Any]] = [
        {"prompt__kind": "kv", "train__starts": 2},
        {"prompt__kind": "embedding", "prompt__length": 3},
        {"prompt__kind": "kv", "prompt__length": 2, "prompt__init": "random", "train__text_weight": 0, "train__steps": 8},
        {"prompt__kind": "embedding", "train__optimizer": "adamw"},
        {"prompt__kind": "kv", "prompt__frozen": 1, "train__weight_decay": 0.1},
    ]
    trials = [
        kv(toy_task, name=f"t{at}", **{"train__seed": at, "train__steps": 12, "train__optimizer": optimizer} | more)
        for at, more in enumerate(changes)
    ]
    packed = run("packed", 3)(*trials)
    for trial in trials:
        alone, together = run("alone")(trial).result(trial.name).vectors, packed.result(trial.name).vectors
        assert float((alone - together).norm() / alone.norm()) < 1e-5, trial.name


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
@pytest.mark.parametrize("kind", ["kv", "embedding"])
def test_frozen_tokens_stay(
    run: Any, toy_task: SimpleNamespace, base: Base, model: PromptedModel, optimizer: str, kind: Literal["kv", "embedding"]
) -> None:
    """To the bit, with weight decay, while the others move; the gradient's norm is that of the others."""
    frozen = {"prompt__frozen": 2, "train__optimizer": optimizer, "train__weight_decay": 0.1, "train__steps": 6}
    trial = kv(toy_task, **{**frozen, "prompt__kind": kind})
    trained = run("frozen")(trial)
    first, _ = initial_vectors(trial, load_task(trial, base), base, trained.pack.embed, trained.pack.prefix)
    vectors = trained.result("toy").vectors
    assert torch.equal(vectors[:2], first[:2]) and not (vectors[2:] == first[2:]).flatten(1).all(1).any()
    free = run("free")(kv(toy_task, **{**frozen, "prompt__kind": kind, "prompt__frozen": 0, "name": "free"}))
    norms = [events[0].values["gradient_norm"] for events in (trained.of("step"), free.of("step"))]
    assert norms[0] < norms[1]


def test_law_5_killed_and_resumed_is_bit_identical(run: Any, toy_task: SimpleNamespace) -> None:
    trial = kv(toy_task, train__steps=12, train__checkpoint_every=4)
    whole = run("whole")(trial)
    with pytest.raises(Killed):
        run("resumed")(trial, stop_after=7)
    resumed = run("resumed")(trial)
    assert [event.step for event in resumed.of("start")] == [4]
    assert torch.equal(whole.result("toy").vectors, resumed.result("toy").vectors)


def test_it_begins_as_the_soft_prompt_it_is_made_of(run: Any, toy_task: SimpleNamespace, model: PromptedModel) -> None:
    run("first")(experiment(toy_task, prompt__length=4))
    folder = str(run("first").folder / "toy" / "soft_prompt")
    kept = soft_prompt.load(folder)
    trial = kv(toy_task, prompt__length=4, prompt__init="soft-prompt", prompt__init_from=folder)
    pack = run("second").pack
    begun = pack.attach(StartRun(trial, str(run("second").folder / "toy")))
    with torch.no_grad():
        found = model([begun.vectors], pack_targets([4], [ROWS], kv=[0]))
        expected = model([kept.vectors], pack_targets([4], [ROWS]))
    assert torch.allclose(found, expected, atol=1e-5)
    assert begun.parent == kept.card.content_hash
    saved = begun.starts[0].vectors
    # A prefix begins as another prefix: truncated, or filled up from the vocabulary.
    run("third")(kv(toy_task, prompt__length=3, train__steps=1))
    source = str(run("third").folder / "toy" / "soft_prompt")
    for length in (2, 5):
        again = kv(toy_task, prompt__length=length, prompt__init="soft-prompt", prompt__init_from=source)
        vectors = pack.attach(StartRun(again, str(run(f"fourth{length}").folder / "toy"))).vectors
        shared = min(length, 3)
        assert torch.equal(vectors[:shared], soft_prompt.load(source).vectors[:shared]) and len(vectors) == length
    with pytest.raises(SoftPromptError, match='is a key-value prefix; set prompt.kind = "kv"'):
        other = experiment(toy_task, prompt__init="soft-prompt", prompt__init_from=source)
        pack.attach(StartRun(other, str(run("fifth").folder / "toy")))
    assert saved.shape[0] == 4


def test_text_is_generated_after_a_prefix_as_after_its_soft_prompt(
    base: Base, model: PromptedModel, toy_task: SimpleNamespace
) -> None:
    """Prefixes of two lengths and embeddings in one call."""
    tables = experiment(toy_task, data__labels=None, data__target=" {label}")
    task = load_task(tables, base)
    draw = torch.Generator().manual_seed(0)
    vectors = [torch.randn(length, base.width, generator=draw) * 0.3 for length in (3, 6)]
    prefixes = [computed(model, each) for each in vectors]
    assert task.validation is not None
    found = generate_rows(model, [prefixes[0], vectors[0], prefixes[1]], task.validation, task.encoder, Workers(), 4)
    expected = generate_rows(model, vectors, task.validation, task.encoder, Workers(), 4)
    assert found == [expected[0], expected[0], expected[1]] and len({*map(tuple, expected[0])}) > 1


def test_what_makes_no_sense_is_refused(toy_task: SimpleNamespace) -> None:
    with pytest.raises(ExperimentError, match="prompt.kind"):
        kv(toy_task, prompt__kind="prefix")
    with pytest.raises(ExperimentError, match=r"search.kind: is empty"):
        kv(toy_task, search__kind=[])


# -- the artefact --------------------------------------------------------------------------------------------------------


def saved(folder: Path, vectors: Tensor) -> SoftPrompt:
    shape = (vectors.shape[1], vectors.shape[3], vectors.shape[4])
    card = Card(
        name="toy",
        base="tiny",
        kind="kv",
        kv_shape=shape,
        length=len(vectors),
        width=32,
        content_hash=soft_prompt.content_hash(vectors),
    )
    made = SoftPrompt(vectors, card)
    made.save(str(folder))
    return made


@pytest.mark.parametrize("architecture", ["llama_tied_gqa", "gpt2", "qwen3"])
def test_peft_loads_ours_with_the_same_logits(tmp_path: Path, architecture: str) -> None:
    model = prefixed(architecture)
    vectors = drawn(5, kv_shape(model))
    made = saved(tmp_path / "ours", vectors)
    loaded = soft_prompt.load(str(tmp_path / "ours"))
    assert torch.equal(loaded.vectors, vectors) and loaded.card == made.card
    theirs = PeftModel.from_pretrained(tiny_base(architecture), str(tmp_path / "ours")).eval()
    with torch.no_grad():
        ours = model([vectors], pack_targets([5], [ROWS], kv=[0])).split([2, 1, 3])
        for (source, target), found in zip(ROWS, ours, strict=True):
            ids = torch.tensor([source + target])
            logits = theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
            expected = cross_entropy(logits[len(source) - 1 : -1], torch.tensor(target), reduction="none")
            assert torch.allclose(found, expected, atol=1e-5)


def test_a_prefix_of_peft_loads_here(tmp_path: Path) -> None:
    theirs = get_peft_model(tiny_base("llama_tied_gqa"), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=6))
    theirs.save_pretrained(str(tmp_path / "elsewhere"))
    loaded = soft_prompt.load(str(tmp_path / "elsewhere"))
    weights = theirs.prompt_encoder["default"].embedding.weight.detach()
    assert torch.equal(loaded.vectors.flatten(1), weights) and loaded.card.kv_shape == (2, 2, 8)
    model = prefixed("llama_tied_gqa")
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        expected = -theirs.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, 2].log_softmax(-1)[8]
        found = model([loaded.vectors], pack_targets([6], [[([5, 6, 7], [8])]], kv=[0]))
    assert torch.allclose(found[0], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"prefix_projection": True}, "is prefix tuning with a projection"),
        ({"num_layers": None}, "has no sizes of a key-value prefix"),
        ({"num_attention_heads": 3}, "has no sizes of a key-value prefix"),
        ({"num_layers": 3}, "but adapter_config.json says"),
    ],
)
def test_folders_that_are_no_prefix_are_refused(tmp_path: Path, change: dict[str, Any], sentence: str) -> None:
    saved(tmp_path / "toy", drawn(3, KVShape(2, 2, 8)))
    for name in ("manifest.json", "card.json"):
        (tmp_path / "toy" / name).unlink()
    config = tmp_path / "toy" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(SoftPromptError, match=sentence):
        soft_prompt.load(str(tmp_path / "toy"))


def test_a_card_of_another_kind_is_refused(tmp_path: Path) -> None:
    made = saved(tmp_path / "toy", drawn(3, KVShape(2, 2, 8)))
    vectors = made.vectors.flatten(1)
    changes = {"kind": "embedding", "kv_shape": None, "width": 64, "content_hash": soft_prompt.content_hash(vectors)}
    SoftPrompt(vectors, made.card.model_copy(update=changes)).save(str(tmp_path / "other"))
    soft_prompt.load(str(tmp_path / "other"))
    card = tmp_path / "toy" / "card.json"
    (tmp_path / "toy" / "manifest.json").unlink()
    card.write_text(json.dumps(json.loads(card.read_text()) | {"kind": "embedding", "kv_shape": None, "width": 64}))
    with pytest.raises(SoftPromptError, match="do not match the card"):
        soft_prompt.load(str(tmp_path / "toy"))


# -- serving -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """A cache of 64 pages: 1,024 positions."""
    started = TransformersEngine(
        tiny_base("llama_tied_gqa"), 2, EngineConfig(cache_bytes=64 * PAGE * 2 * 2 * 2 * 8 * 4, context=128)
    )
    yield started
    started.close()


def generated(model: PromptedModel, prefix: Tensor | None, ids: list[int], new: int) -> list[int]:
    """Greedy tokens by transformers alone."""
    made: list[int] = []
    with model.plain() as plain, torch.no_grad():
        cache = cache_of([prefix], torch.float32) if prefix is not None else None
        step = torch.tensor([ids])
        for _ in range(new):
            out = plain(input_ids=step, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            made.append(int(out.logits[0, -1].argmax()))
            step = torch.tensor([made[-1:]])
    return made


def test_mixed_batches_answer_as_alone_also_after_pages_were_dropped(engine: Engine) -> None:
    """Lengths that do and do not fill pages, beside embeddings and the bare base, while long texts drop cached pages."""
    model, draw = prefixed("llama_tied_gqa"), random.Random(0)
    prefixes = {length: drawn(length, kv_shape(model), length) for length in (1, PAGE, 2 * PAGE + 5)}
    handles = {length: engine.add(prefix, f"kv{length}") for length, prefix in prefixes.items()}
    embedding = torch.randn(4, 32, generator=torch.Generator().manual_seed(9))
    other = engine.add(embedding, "embedding")
    texts = [[draw.randrange(3, 100) for _ in range(length)] for length in (1, 5, 20)]
    with torch.no_grad():
        labels = {
            length: TRIE.label_logprobs(
                -model([prefix], pack_labels([length], [texts], TRIE, [0])).double().view(len(texts), -1)
            )
            for length, prefix in prefixes.items()
        }
    assert engine.kind == "paged"
    wanted = {(length, at): generated(model, prefixes[length], text, 6) for length in prefixes for at, text in enumerate(texts)}
    wanted |= {(0, at): generated(model, None, text, 6) for at, text in enumerate(texts)}
    assert len({*map(tuple, wanted.values())}) > len(texts), "the prefixes matter"
    found: dict[tuple[int, int], list[int]] = {}

    def ask(length: int, at: int) -> None:
        request = Request(texts[at], handles.get(length), 6, ignore_end=True)
        found[length, at] = [each.id for each in engine.generate(request) if isinstance(each, Token)]

    for _ in range(3):
        threads = [threading.Thread(target=ask, args=key) for key in wanted]
        threads += [threading.Thread(target=lambda: [*engine.generate(Request([7, 8], other, 5))]) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == wanted
        for _ in range(12):  # 1,200 positions: more than the cache has
            list(engine.generate(Request([draw.randrange(3, 100) for _ in range(100)], None, 1)))
    for length, handle in handles.items():
        scores = torch.tensor(engine.choose(handle, texts, TRIE).result(), dtype=torch.float64)
        assert torch.allclose(scores, labels[length], atol=1e-5)
        tokens = engine.score(handle, texts[1], 1).result()
        again = by_cache(model, prefixes[length], [(texts[1][:1], texts[1][1:])])
        assert torch.allclose(torch.tensor([-each.logprob for each in tokens]), again, atol=1e-5)
    before = engine.resident_bytes
    for handle in (*handles.values(), other):
        engine.remove(handle)
    assert engine.residents == 0 and engine.resident_bytes < before


def test_a_prefix_is_computed_once(engine: Engine) -> None:
    handle = engine.add(drawn(2 * PAGE, KVShape(2, 2, 8), 5), "once")
    list(engine.generate(Request([5, 6, 7], handle, 3, ignore_end=True)))
    before = engine.stats.cached_tokens
    list(engine.generate(Request([8, 9], handle, 3, ignore_end=True)))
    assert engine.stats.cached_tokens - before == 2 * PAGE
    engine.remove(handle)


@pytest.mark.parametrize(
    ("vectors", "sentence"),
    [
        (drawn(3, KVShape(3, 2, 8)), r"its keys and values are \(3, 2, 8\), not \(2, 2, 8\)"),
        (drawn(3, KVShape(2, 2, 8)) * torch.nan, "keys and values are not finite"),
    ],
)
def test_prefixes_that_do_not_fit_are_refused(engine: Engine, vectors: Tensor, sentence: str) -> None:
    with pytest.raises(RequestError, match=sentence):
        engine.add(vectors, "unfit")
    assert engine.residents == 0


def test_a_base_without_pages_refuses_prefixes() -> None:
    engine = TransformersEngine(tiny_base("falcon"), 2, EngineConfig(context=64))
    try:
        with pytest.raises(RequestError, match="key-value prefixes are not served with this base"):
            engine.add(drawn(3, KVShape(2, 2, 8)), "kv")
    finally:
        engine.close()
