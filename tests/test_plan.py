"""Plans are arithmetic on what the real pass does: held against laws, known totals, the real pass and measured memory."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import REPOSITORY, tiny_base, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from ptuning.cli.app import app
from ptuning.model.packing import pack_targets
from ptuning.model.prompted_model import PromptedModel
from ptuning.planning.capacity import ServingPlan, Training, TrainingPlan, plan_serving
from ptuning.planning.meta_model import MetaModel, read_config
from ptuning.planning.placement import FILLED, place
from ptuning.planning.workload import Machine, RunShape, Workload
from ptuning.planning.zero3_simulator import Sharing, gather, live_numbers, node_copies_fit, share_numbers

SHAPES = REPOSITORY / "tests" / "data" / "shapes"
GB = 10**9


@lru_cache
def meta_model(recompute: bool = False) -> MetaModel:
    return MetaModel(tiny_config("llama"), torch.float32, checkpoint_gradients=recompute)


def training(ranks: int = 2, memory: int = GB, gpus: bool = True, **changes: int) -> Training:
    wanted = replace(RunShape(length=5, tokens=12, targets=3, batch=8, persistent=50, live=20_000), **changes)
    machine = Machine(ranks, memory, ranks, GB, 1e12, gpus)
    return Training(meta_model().shape, wanted, machine, meta_model().training, meta_model().evaluation)


PLANS = lru_cache(training)
"""Plans of two ranks, traced once."""


@pytest.mark.fast
@pytest.mark.parametrize(("name", "billions"), [("8b", 8.03), ("70b", 70.55), ("405b", 405.85)])
def test_parameters_of_public_shapes_are_the_known_totals(name: str, billions: float) -> None:
    shape = MetaModel(read_config(SHAPES / f"llama-{name}.json"), torch.bfloat16).shape
    assert shape.numbers / 1e9 == pytest.approx(billions, abs=0.005)


@contextlib.contextmanager
def keeping(base: torch.nn.Module) -> Iterator[dict[int, int]]:
    """Bytes of every storage that a pass keeps for its backward pass, the base's own tensors aside."""
    known = {tensor.untyped_storage()._cdata for tensor in [*base.parameters(), *base.buffers()]}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept


@pytest.mark.fast
@pytest.mark.parametrize("architecture", ["llama", "llama_tied_gqa", "gpt2", "gpt_neo", "qwen3", "gemma2"])
def test_a_blueprint_counts_what_the_real_pass_keeps(architecture: str) -> None:
    """Bytes that autograd keeps between forward and backward, on the meta device and on the CPU."""
    base = tiny_base(architecture, attention=None)
    model = PromptedModel(base)
    rows = [([5] * 9, [6, 7, 2])] * 4
    vectors = [torch.zeros(5, 32, requires_grad=True) for _ in range(2)]
    with keeping(base) as kept:
        nll = model(vectors, pack_targets([5, 5], [rows, rows]))
    found = MetaModel(tiny_config(architecture), torch.float32).training(Workload(2, 5, 4, 12, 3))
    backward = next(moment for moment in found.moments if not moment.forward)
    assert nll.requires_grad
    # Beside what is kept there is what the operation at hand works on: a few tensors of this small pass.
    assert 0.97 * sum(kept.values()) <= backward.peak <= 1.35 * sum(kept.values())


@pytest.mark.fast
@pytest.mark.parametrize("architecture", ["llama_tied_gqa", "gpt2"])
def test_a_pass_with_prefixes_is_planned(architecture: str) -> None:
    base = tiny_base(architecture, attention=None)
    layers, heads = 2, getattr(base.config, "num_key_value_heads", 4)
    vectors = [torch.zeros(5, layers, 2, heads, 8, requires_grad=True) for _ in range(2)]
    rows = [([5] * 9, [6, 7, 2])] * 4
    with keeping(base) as kept:
        PromptedModel(base)(vectors, pack_targets([5, 5], [rows, rows], kv=[0, 1]))
    planned = MetaModel(tiny_config(architecture), torch.float32)
    found = planned.training(Workload(2, 5, 4, 12, 3, kv=True))
    assert not planned.estimated
    backward = next(moment for moment in found.moments if not moment.forward)
    assert 0.97 * sum(kept.values()) <= backward.peak <= 1.35 * sum(kept.values())


@pytest.mark.fast
@given(slots=st.integers(1, 32))
@settings(max_examples=10)
def test_a_pack_gathers_once_for_all_its_slots(slots: int) -> None:
    assert PLANS().plan(slots).received == PLANS().plan(1).received > 0


@pytest.mark.fast
@given(ranks=st.integers(2, 64))
def test_a_share_is_a_part_of_the_base(ranks: int) -> None:
    sizes = [parameter.numel() for parameter in meta_model().model.parameters()]
    share = share_numbers(sizes, Sharing(ranks, 0, 0, persistent=0))
    assert sum(sizes) <= share * ranks <= sum(sizes) + ranks * len(sizes)


@pytest.mark.fast
@given(length=st.integers(1, 20), tokens=st.integers(4, 30), rows=st.integers(1, 8), slots=st.integers(1, 4))
@settings(max_examples=4)
def test_more_of_anything_takes_no_less_memory(length: int, tokens: int, rows: int, slots: int) -> None:
    work = Workload(slots, length, rows, tokens, 3)
    peak = meta_model().training(work).peak
    for field in ("slots", "length", "rows", "tokens"):
        assert meta_model().training(replace(work, **{field: getattr(work, field) + 1})).peak >= peak


@pytest.mark.fast
def test_every_slot_adds_the_same() -> None:
    one, two, five = (meta_model().training(Workload(slots, 5, 4, 12, 3)) for slots in (1, 2, 5))
    assert one.with_slots(two, 5).peak == pytest.approx(five.peak, rel=0.01)


@pytest.mark.fast
def test_recomputing_keeps_less() -> None:
    work = Workload(4, 8, 8, 40, 2)
    assert meta_model(recompute=True).training(work).peak < 0.85 * meta_model().training(work).peak


@pytest.mark.fast
def test_limits_on_gathering_hold() -> None:
    timeline = meta_model().training(Workload(1, 5, 4, 12, 3))
    whole = sum(timeline.sizes) * 4
    tight = gather(timeline, Sharing(2, live=1, prefetch=0, persistent=0), 4)
    roomy = gather(timeline, Sharing(2, live=10**9, prefetch=0, persistent=0), 4)
    assert roomy.received == whole  # kept from the forward pass to the backward pass
    # The head's backward pass follows its forward pass at once; the embedding has none.
    assert tight.received == 2 * whole - 2 * timeline.sizes[0] * 4 or tight.received < 2 * whole
    assert tight.gathered < roomy.gathered <= whole
    assert gather(timeline, Sharing(1, 10**9, 0, 0), 4).received == 0


@pytest.mark.fast
def test_what_is_left_decides_how_much_is_gathered() -> None:
    assert live_numbers(80 * GB, 50 * GB, 2) == 5 * GB
    assert live_numbers(80 * GB, 79 * GB, 2) == 166_666_666
    # 8 B: a copy for each node of 8 GPUs is 2 GB on each; 405 B: 101 GB, where 80 are.
    assert node_copies_fit(16 * GB, 16, 8, 80 * GB)
    assert not node_copies_fit(811 * GB, 64, 8, 80 * GB)
    assert not node_copies_fit(16 * GB, 8, 8, 80 * GB)  # one node: there is nothing to be saved


@pytest.mark.fast
def test_slots_that_fit_fit() -> None:
    plans = training(memory=training().plan(3).needed)
    assert plans.most_slots(32) == 3 and plans.plan(4).needed > plans.machine.memory
    assert training(memory=1).most_slots(32) == 0


@pytest.mark.nightly
@pytest.mark.slow
def test_planned_memory_is_measured_memory(tmp_path: Path) -> None:
    """One shape and one worker; `python jobs/benchmark.py plan` measures them all."""
    out = tmp_path / "plan.json"
    command = [sys.executable, "jobs/benchmark.py", "plan", "--shape", "20 M", "--workers", "1", "--out", str(out)]
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, timeout=200)
    [row] = json.loads(out.read_text())
    assert row["plan"] == pytest.approx(row["measured"][0], rel=0.15)


def invoke(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, list(arguments))
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr.strip()


@pytest.mark.fast
def test_the_command_plans_without_weights(toy_task: SimpleNamespace, write_toml: Callable[..., Path], tmp_path: Path) -> None:
    tiny_config("llama").save_pretrained(tmp_path / "bare")
    toy_task.experiment["model"]["path"] = str(tmp_path / "bare")
    experiment = str(write_toml(toy_task.experiment))
    code, out, _ = invoke("plan", experiment, "--gpus", "2", "--tokens", "20", "--gpu-memory", "4", "--json")
    found = json.loads(out.splitlines()[-1])
    assert code == 0 and found["slots"] == 32 and found["training"]["received"] == found["packed"]["received"]
    code, out, _ = invoke("plan", experiment, "--gpus", "2", "--tokens", "20", "--gpu-memory", "4")
    assert code == 0 and "slots that fit: 32" in out and "requests at once" in out
    assert "soft prompts, vLLM" in out and "1,024 in serve.rows = 4,096" in out
    code, _, error = invoke("plan", experiment, "--gpus", "2")
    assert code == 2 and error.endswith("without a tokenizer rows cannot be counted; give --tokens")


@pytest.mark.fast
def test_rows_are_counted_where_there_is_a_tokenizer(toy_task: SimpleNamespace, write_toml: Callable[..., Path]) -> None:
    _, out, _ = invoke("plan", str(write_toml(toy_task.experiment)), "--json")
    assert 8 <= json.loads(out.splitlines()[-1])["settings"]["tokens"] <= 40


@pytest.mark.fast
def test_what_does_not_fit_says_what_would(toy_task: SimpleNamespace, write_toml: Callable[..., Path], tmp_path: Path) -> None:
    shape = tmp_path / "config.json"
    small = {"num_hidden_layers": 8, "hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 16}
    small |= {"vocab_size": 16_000, "bos_token_id": 0, "eos_token_id": 0}
    shape.write_text(json.dumps(json.loads((SHAPES / "llama-8b.json").read_text()) | small))
    common = [str(write_toml(toy_task.experiment)), "--config", str(shape), "--tokens", "512", "--gpus", "1", "--gpu-memory"]
    code, out, _ = invoke("plan", *common, "3.2")
    assert code == 0 and "does not fit: training: fits with train.micro_batch_size=1" in out  # it can be served
    code, out, _ = invoke("plan", *common, "2.8")
    assert code == 1 and "GPUs of 2.8 GB each would be enough, with train.gradient_checkpointing=true" in out
    assert "does not fit: serving: a replica needs 3.0 GB on one GPU; use a larger one" in out


@pytest.mark.fast
def test_capacity_of_both_engines_for_8_billion_parameters() -> None:
    """vLLM has a row per virtual token, of 4,096 numbers in bfloat16, divided among its ranks."""

    def plan(
        memory: int = 80 * GB, parallel: int = 1, kind: str = "embedding", resident: int = 1, limit: int | None = None
    ) -> ServingPlan:
        rows = RunShape(length=100, tokens=200, targets=4, batch=8, kinds=(kind,))
        return plan_serving(
            large.shape, rows, Machine(1, memory, 1, GB, 1e12, True), large.evaluation,
            cache=4 * GB, running=32, resident=resident, new=4, rows=4096, parallel=parallel, limit=limit,
        )  # fmt: skip

    large = MetaModel(read_config(SHAPES / "llama-8b.json"), torch.bfloat16)
    one, two = plan().vllm, plan(parallel=2).vllm
    assert one and two and (one.resident, one.bytes, two.bytes) == (40, 4096 * 4096 * 2, 4096 * 4096)
    more = plan(memory=81 * GB).vllm
    assert more and more.most_rows - one.most_rows == pytest.approx(GB / 8192, abs=1)
    assert two.most_rows == pytest.approx(2 * one.most_rows + large.shape.bytes / 8192, abs=2)
    for kind in ("embedding", "kv"):
        found = plan(kind=kind)
        at_most, beyond = (plan(kind=kind, resident=found.resident + extra) for extra in (0, 1))
        assert at_most.peak <= 80 * GB < beyond.peak
    # 100 virtual tokens: 4,096 numbers each, or keys and values of 32 layers, 8 heads of 128.
    for kind, numbers in (("embedding", 100 * 4096), ("kv", 100 * 32 * 2 * 8 * 128)):
        limited, free = plan(kind=kind, limit=GB), plan(kind=kind, resident=GB // (2 * numbers))
        assert limited.at_once == GB // (2 * numbers) and limited.bank == free.bank and free.at_once is None
    assert plan(kind="kv").vllm is None and plan(kind="kv").resident < plan().resident


@pytest.mark.fast
def test_unknown_shapes_are_refused(toy_task: SimpleNamespace, write_toml: Callable[..., Path], tmp_path: Path) -> None:
    experiment = str(write_toml(toy_task.experiment))
    strange = tmp_path / "config.json"
    strange.write_text('{"model_type": "no-such-model"}')
    code, _, error = invoke("plan", experiment, "--config", str(strange), "--tokens", "9")
    assert code == 2 and f"{strange}: is not a supported config (" in error and "\n" not in error
    code, _, error = invoke("plan", experiment, "--config", str(tmp_path / "nowhere"), "--tokens", "9")
    assert code == 2 and "there is no config.json; give the file or a folder that contains it" in error
    code, _, error = invoke("plan", experiment, "--gpus", "64", "--tokens", "9")
    assert code == 2 and "8 rows cannot be split over 64 workers; plan with train.batch_size=64, or fewer workers" in error
    code, _, error = invoke("plan", experiment, "--tokens", "500")
    assert code == 2 and "exceed the 128 positions of the base; set it to at most 124" in error


@lru_cache
def deep_model() -> MetaModel:
    return MetaModel(tiny_config("llama", num_hidden_layers=12), torch.float32)


def placed(
    memory: float, ranks: int = 2, per_node: int = 2, bandwidth: float = GB, **changes: Any
) -> tuple[RunShape, TrainingPlan]:
    """Where a tiny, deep Llama is placed on ranks with this memory (relative to the base, besides what it needs if it is
    partitioned), and its plan."""
    model = deep_model()
    wanted = replace(RunShape(length=5, tokens=12, targets=3, batch=8, persistent=50, stage="auto"), **changes)
    machine = Machine(ranks, 0, per_node, bandwidth, 1e12, True, 300 * GB)
    traces = model.training, model.evaluation
    least = Training(model.shape, replace(wanted, stage=3, live=1, copies=False), machine, *traces).plan(1).needed
    machine = replace(machine, memory=int((least + memory * model.shape.bytes) / FILLED))
    way = place(model.shape, wanted, machine, *traces)
    return way, Training(model.shape, way, machine, *traces).plan(1)


@pytest.mark.fast
def test_a_base_is_whole_where_it_fits_and_else_as_much_of_it_as_fits() -> None:
    ways, received = [], []
    for memory in (0.0, 0.3, 0.6, 1.5):
        way, plan = placed(memory, ranks=8, per_node=8, live=1)
        ways.append((way.stage, way.whole > 0))
        received.append(plan.received)
    assert ways[1:] == [(3, True), (3, True), (0, False)]
    assert received[0] > received[1] > received[2] > received[3] == 0
    assert placed(9.0, ranks=1, per_node=1)[0].stage == 0
    assert placed(9.0, offload=True)[0].stage == 3  # asked for
    assert placed(0.0, stage=3)[0].stage == 3 and placed(0.0, stage=0)[0].stage == 0


@pytest.mark.fast
def test_on_a_slow_network_nodes_keep_copies() -> None:
    slow, _ = placed(0.6, ranks=8, per_node=4, bandwidth=GB / 1000, live=1)
    fast, _ = placed(0.6, ranks=8, per_node=4, bandwidth=300 * GB, live=1)
    assert slow.copies and not fast.copies and fast.whole > slow.whole
