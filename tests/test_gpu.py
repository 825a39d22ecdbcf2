"""What GPUs need, seen without one: settings, limits and messages. What they compute: `test_accelerator`."""

from __future__ import annotations

import math
import multiprocessing
import os
import queue
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import tiny_base
from support.training import Killed, Run, experiment
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ptuning.cluster import network_check
from ptuning.cluster.failures import cause
from ptuning.config import parse_experiment
from ptuning.data.task import load_task
from ptuning.errors import UserError
from ptuning.inference import label_scorer
from ptuning.inference.transformers_engine import TransformersEngine
from ptuning.inference.types import EngineConfig
from ptuning.model import token_loss
from ptuning.model.base import Base, computes_in_bfloat16
from ptuning.model.label_trie import LabelTrie
from ptuning.model.packed_batch import PackedBatch
from ptuning.model.packing import pack_targets
from ptuning.model.prompted_model import PromptedModel
from ptuning.model.token_tree import TokenTree
from ptuning.planning.capacity import step_flops
from ptuning.planning.meta_model import MetaModel
from ptuning.planning.rates import gpu_rate
from ptuning.planning.workload import Workload
from ptuning.planning.zero3_simulator import node_copies_fit
from ptuning.searching import slot_count
from ptuning.settings.training import ZeroConfig
from ptuning.training import base_loader, loop, zero
from ptuning.training.distributed import Workers
from ptuning.training.loop import Pack
from ptuning.training.starts import LOWER

pytestmark = pytest.mark.fast


def test_no_attention_builds_a_plan_for_every_shape() -> None:
    torch.backends.cuda.enable_cudnn_sdp(True)
    PromptedModel(tiny_base("llama"))
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_gpus_that_emulate_bfloat16_do_not_compute_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert not computes_in_bfloat16()


def test_memory_of_gpus_is_allocated_in_segments_that_grow(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    base.load(torch.float32)
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"


@pytest.mark.parametrize(("nodes", "copies"), [([2, 2, 2, 2], True), ([2, 2, 1], False), ([3, 3, 3], False)])
def test_nodes_keep_copies_only_if_they_have_equally_many_workers(
    base: Base, nodes: list[int], copies: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`nodes`: of each worker, the number of workers of its node; 8 + 4 fails in DeepSpeed, 6 + 4 + 2 waits forever."""
    monkeypatch.setattr(Workers, "current", lambda: Workers(0, max(4, len(nodes))))
    monkeypatch.setattr(Workers, "all_gather", lambda self, value: nodes if value == nodes[0] else [value])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(nodes[0]))
    found = zero.derive_config(ZeroConfig(), base, torch.float32)["zero_optimization"]
    assert ("zero_hpz_partition_size" in found) == copies
    assert not node_copies_fit(16, 12, 8, 80_000)


def _counting(rank: int, size: int, port: int, base: Base, tables: dict[str, Any], least: int, answer: Any) -> None:
    """A worker; the last one's memory holds `least` soft prompts in a pass."""
    own, forward = Workers(rank, size), PromptedModel.forward

    def limited(self: PromptedModel, soft_prompts: Any, plan: PackedBatch, *arguments: Any) -> torch.Tensor:
        if rank == size - 1 and len(plan.per_slot) > least:
            raise torch.OutOfMemoryError
        return forward(self, soft_prompts, plan, *arguments)

    PromptedModel.forward = limited  # type: ignore[method-assign]
    try:
        if size > 1:
            torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
        pack = Pack(PromptedModel(base.load(torch.float32)), base, own, lambda experiment: load_task(experiment, base), 99)
        try:
            found: Any = slot_count.count_slots(pack, parse_experiment(tables))
        except UserError as error:
            found = str(error)
        assert not pack.slots and pack.news_pending
        answer.put((rank, own.all_gather(found)))  # the workers are still together
    finally:
        PromptedModel.forward = forward  # type: ignore[method-assign]


@pytest.mark.parametrize(("size", "least", "expected"), [(1, 4, 4), (1, 0, None), (2, 1, 2), (2, 0, None)])
def test_all_workers_agree_on_the_slots_that_fit_into_every_gpu(
    size: int, least: int, expected: int | None, base: Base, toy_task: SimpleNamespace, monkeypatch: Any
) -> None:
    """Of two workers, each computes half of the soft prompts."""
    monkeypatch.setattr(slot_count, "_fitting", lambda pack, experiment, most: most)
    monkeypatch.setattr(slot_count, "GAIN", 1e-9)
    tables = {**toy_task.experiment, "search": {"trials": 16}}
    answers: Any = multiprocessing.get_context("fork").Queue() if size > 1 else queue.Queue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = (size, port, base, tables, least, answers)
    if size == 1:
        _counting(0, *arguments)
    else:
        torch.set_num_threads(1)  # the processes are forked, and threads do not survive that
        processes = [
            multiprocessing.get_context("fork").Process(target=_counting, args=(rank, *arguments)) for rank in range(size)
        ]
        for process in processes:
            process.start()
    found = [answers.get(timeout=120) for _ in range(size)]
    if size > 1:
        for process in processes:
            process.join(30)
    refused = "search.slots: not even one soft prompt fits into the memory of a worker"
    for _, each in found:
        assert len(each) == size
        assert all(count == expected if expected else str(count).startswith(refused) for count in each), each


@pytest.mark.parametrize(
    ("nodes", "network", "rate"), [(False, None, 300.0), (True, None, 300.0), (True, 12.5, 12.5), (False, 12.5, 300.0)]
)
def test_a_node_receives_by_all_its_links_together(nodes: bool, network: float | None, rate: float) -> None:
    assert gpu_rate(8, nodes, network) == rate
    assert gpu_rate(1, True) == 50.0


@pytest.mark.parametrize(
    ("rates", "nodes", "gpus", "state", "said"),
    [
        ([250e9, 200e9], 2, True, "ok", "200 GB/s per worker in an all-gather of 2 GPUs on 2 nodes; plans assume 300"),
        ([9e9] * 16, 2, True, "warn", "9 GB/s per worker in an all-gather of 16 GPUs on 2 nodes; plans assume 300"),
        ([0.7e9] * 3, 3, False, "ok", "0.7 GB/s per worker in an all-gather of 3 processes on 3 nodes; plans assume 1"),
    ],
)
def test_the_doctor_compares_the_network_with_the_plan(rates: Any, nodes: int, gpus: bool, state: str, said: str) -> None:
    found = network_check.judge(rates, 8, nodes, gpus)
    assert (found.state, found.text) == (state, said)
    if state == "warn":
        assert found.fix == "give the containers InfiniBand or EFA (cluster/README.md), or plan with --bandwidth 9"


def test_a_part_of_a_gpu_for_a_worker_is_refused(toy_task: SimpleNamespace) -> None:
    """Two workers on one GPU: NCCL refuses them. Two GPUs for a worker: it would compute on one."""
    for gpus in (0.5, 2):
        with pytest.raises(UserError, match="compute.gpus_per_worker"):
            experiment(toy_task, compute__gpus_per_worker=gpus)


ECHO = "RuntimeError: [Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7, OpType=_ALLGATHER_BASE)"


def test_messages_of_nccl_and_of_broken_gpus() -> None:
    assert cause([ECHO, "Traceback ...\nValueError: boom"]) == "ValueError: boom"
    assert cause([ECHO, ECHO]).startswith("a worker has lost its connection to another one")
    broken = (
        "Worker(hostname='a', pid=7, world_rank=1)\nRuntimeError: CUDA error: uncorrectable ECC error encountered\nCUDA ..."
    )
    said = cause([ECHO, broken])
    assert said.startswith("the GPU of worker 1 (pid 7 on a) failed (uncorrectable ECC error encountered)")


@pytest.mark.parametrize("window", [3, 4, 20, None])
def test_every_query_of_padding_has_a_key(window: int | None) -> None:
    """A query without any is not a number on some devices, and 0 * NaN would reach the keys of others."""
    tree = TokenTree()
    texts = tree.add([12, 2, 1], tree.add([3]))
    more = tree.add([8, 1, 2], texts, [0, 1, 2])
    for group in (texts, more):
        allowed = group.mask(window, 1, torch.device("cpu")).allowed
        assert allowed is not None and bool(allowed.any(-1).all())
    if window == 3:
        assert allowed is not None
        assert allowed[1, 0, 7].nonzero().flatten().tolist() == [15]  # the only token of its row
        assert allowed[1, 0, 0].nonzero().flatten().tolist() == [3, 4, 15]  # a token: as without padding


@pytest.fixture(scope="module")
def half(base: Base) -> PromptedModel:
    return base_loader.load(base, ZeroConfig(stage=0), torch.float16)


def test_gradients_in_float16_are_those_in_float32(
    base: Base, half: PromptedModel, toy_task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a loss so small that its gradients would vanish: it is scaled, and the scale is lowered until nothing overflows."""
    whole = base_loader.load(base, ZeroConfig(stage=0), torch.float32)
    found = []
    for model in (whole, half):
        run = Run(model, base, tmp_path / str(model.base.dtype))
        slot = run.pack.attach(loop.StartRun(experiment(toy_task), str(tmp_path / "unused")))
        [start] = slot.starts
        assert (start.scale > 1) == (model is half)
        # A mean over this many rows and tokens.
        monkeypatch.setattr(slot, "weights", lambda *given, weigh=slot.weights: weigh(*given[:3], (10**7, 10**7)))
        loop.step(run.pack, run.events.append)
        found.append(start.moments["exp_avg"].clone())
    assert float((found[0] - found[1]).norm() / found[0].norm()) < 0.02


def test_training_in_float16(base: Base, half: PromptedModel, toy_task: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """From a scale that is too large; soft prompt and optimiser are in float32; killed and resumed (law 5)."""
    monkeypatch.setattr(loop, "SCALE", 2.0**60)
    task = experiment(toy_task, prompt__length=8, train__steps=30, train__learning_rate=0.3, train__checkpoint_every=5)
    done = Run(half, base, tmp_path / "whole")(task)
    [finished] = done.of("finished")
    assert finished.values["test_accuracy"] > 0.9
    with pytest.raises(Killed):
        Run(half, base, tmp_path / "killed")(task, stop_after=12)
    again = Run(half, base, tmp_path / "killed")
    scales: list[float] = []
    again.on_event = lambda event: scales.extend(start.scale for slot in again.pack.slots for start in slot.starts)
    again(task)
    assert scales and set(scales) == {scales[0]} and 1 < scales[0] < 2.0**60 / LOWER
    assert torch.equal(done.result("toy").vectors, again.result("toy").vectors)
    assert done.result("toy").vectors.dtype == torch.float32


def test_a_loss_that_is_not_finite_still_ends_a_run_in_float16(
    base: Base, half: PromptedModel, toy_task: Any, tmp_path: Path
) -> None:
    run = Run(half, base, tmp_path)
    slot = run.pack.attach(loop.StartRun(experiment(toy_task), str(tmp_path / "toy")))
    slot.vectors.data[0, 0] = math.inf
    loop.step(run.pack, run.events.append)
    assert [event.kind for event in run.events] == ["failed"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_loss_of_many_predictions_is_computed_in_parts(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(0)
    logits = (torch.randn(13, 50, generator=draw) * 9).to(dtype)
    targets, weights = torch.randint(50, (13,), generator=draw), torch.rand(13, generator=draw)
    found = []
    for most in (13 * 50, 3 * 50, 1):
        monkeypatch.setattr(token_loss, "LOGITS", most)
        leaf = logits.clone().requires_grad_()
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda each, kept=kept: (kept.append(each.nbytes), each)[1], lambda each: each
        ):
            nll = token_loss.token_nll(leaf, targets)
        (nll * weights).sum().backward()
        assert nll.dtype == torch.float32 and (most == 13 * 50 or sum(kept) <= leaf.nbytes + 13 * 12)
        found.append((nll.detach(), leaf.grad))
    for nll, gradient in found[1:]:
        assert torch.allclose(nll, found[0][0], rtol=1e-6, atol=1e-5)
        assert gradient is not None and torch.allclose(gradient, found[0][1], atol=1e-3 if dtype == torch.bfloat16 else 1e-6)


def test_a_request_for_many_labels_is_computed_in_passes_of_a_limited_size(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = TransformersEngine(tiny_base("llama", attention=None), 2, EngineConfig(cache_bytes=1 << 20, context=128))
    try:
        handles = [engine.add(torch.full((3, 32), 0.1 * many), str(many)) for many in (1, 2)]
        trie, rows = LabelTrie(((5, 6, 2), (5, 7, 2), (8, 2))), [[5 + row] * (1 + row % 7) for row in range(40)]
        whole = engine.choose(handles[0], rows, trie).result(60)
        sizes: list[int] = []
        forward = PromptedModel.forward

        def counting(model: PromptedModel, soft_prompts: Any, plan: Any) -> Any:
            sizes.append(plan.positions)
            return forward(model, soft_prompts, plan)

        monkeypatch.setattr(PromptedModel, "forward", counting)
        monkeypatch.setattr(label_scorer, "LABEL_TOKENS", 64)
        parts = engine.choose(handles[0], rows, trie).result(60)
        assert len(sizes) > 3 and max(sizes) <= 64 + 3
        assert torch.allclose(torch.tensor(parts), torch.tensor(whole), atol=1e-5)
        monkeypatch.setattr(label_scorer, "LABEL_TOKENS", 4096)
        monkeypatch.setattr(label_scorer, "LOGITS", 8 * len(trie.nodes) * len(trie.ids))
        del sizes[:]
        assert torch.allclose(torch.tensor(engine.choose(handles[0], rows, trie).result(60)), torch.tensor(whole), atol=1e-5)
        assert len(sizes) == 5
        for handle in handles:
            engine.remove(handle)
    finally:
        engine.close()


def test_recomputing_activations_costs_another_forward_pass() -> None:
    counted, planned = [], []
    work = Workload(slots=1, length=6, rows=4, tokens=12, targets=3)
    rows = [([5] * 9, [8, 9, 2])] * 4
    for recompute in (False, True):
        base = tiny_base("llama", num_hidden_layers=6)
        model = PromptedModel(base)
        if recompute:
            model.checkpoint_gradients()
        vectors = torch.randn(6, 32).requires_grad_()
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model([vectors], pack_targets([6], [rows])).sum().backward()
        counted.append(counter.get_total_flops())
        planned.append(step_flops(MetaModel(base.config, torch.float32).shape, work, recompute))
    assert 1.35 < counted[1] / counted[0] < 1.5
    assert planned[1] / planned[0] == pytest.approx(counted[1] / counted[0], rel=0.04)
