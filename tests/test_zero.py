"""Law 3: sharding changes nothing. Real DeepSpeed, ZeRO-3, two gloo processes on this machine.

Starting processes and importing DeepSpeed costs some ten seconds, so one pair of processes does all the work and the tests
look at what it wrote.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from benchmarks.bare import count_gathered
from conftest import weights_hash

from ptuning.config import parse_experiment
from ptuning.data.task import load_task
from ptuning.imports import load_deepspeed
from ptuning.model import soft_prompt
from ptuning.model.base import find_base
from ptuning.model.packing import pack_targets
from ptuning.model.prompted_model import PromptedModel
from ptuning.planning.meta_model import MetaModel
from ptuning.planning.workload import Workload
from ptuning.planning.zero3_simulator import Sharing, gather, prefetch_numbers
from ptuning.settings.model import ModelConfig
from ptuning.settings.training import ZeroConfig
from ptuning.training.distributed import Workers
from ptuning.training.evaluate import evaluate, generate_rows
from ptuning.training.generation import Greedy
from ptuning.training.loop import Pack, train
from ptuning.training.messages import Event, StartRun, event_fields

LENGTHS = (5, 3)
LIVE = 1000
KEPT: dict[str, dict[str, Any]] = {
    "kept": {"stage": 3, "persistent_parameters": 12_000},
    "all_kept": {"stage": 3, "persistent_parameters": 10**9},
    "whole": {"stage": 0},
}
"""What two workers keep of the base between passes, as `zero.stage = "auto"` may decide it."""
OTHERWISE = {
    "choice": {"text_weight": 0},
    "text": {"objective": "text"},
    "both": {"text_weight": 0.3, "class_weights": "balanced"},
    "starts": {"starts": 3},
    "kv": {"kind": "kv"},
    "distill": {"teacher": "sort "},
}
"""What else is trained by two workers and by one: settings of [train], and the kind of soft prompt.
Shorter: half a second for every step of two workers."""


def rows(seed: int) -> list[tuple[list[int], list[int]]]:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randint(3, 300, (n,), generator=generator).tolist()  # noqa: E731
    return [(draw(4 + index % 5), draw(1 + index % 3)) for index in range(8)]


def prompts(width: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(length, width, generator=generator).requires_grad_() for length in LENGTHS]


def gradients(model: PromptedModel, width: int, workers: Workers, at_end: Any = None) -> torch.Tensor:
    """Gradient of the two slots' mean losses over the global batch, computed by all workers together. `at_end` is called at the
    end of the backward pass."""
    vectors = prompts(width)
    if at_end:
        vectors[0].register_hook(at_end)
    batches = [rows(2), rows(3)]
    plan = pack_targets(LENGTHS, [batch[workers.rank :: workers.size] for batch in batches])
    parts = model(vectors, plan).split(plan.per_slot)
    counts = [sum(len(target) for _, target in batch) for batch in batches]
    torch.stack([part.sum() / count for part, count in zip(parts, counts, strict=True)]).sum().backward()
    return workers.all_reduce(torch.cat([vector.grad.flatten() for vector in vectors]))


def kept_bytes(model: PromptedModel, width: int, batch: list[tuple[list[int], list[int]]]) -> int:
    """Bytes that a pass keeps for its backward pass, the base's own tensors aside."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in {parameter.data.untyped_storage().data_ptr() for parameter in model.parameters()}:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        nll = model(prompts(width), pack_targets(LENGTHS, [batch, batch]))
    nll.sum().backward()
    return sum(kept.values())


def run(workers: Workers, model: PromptedModel, base: Any, tables: dict[str, Any], folder: str) -> list[Event]:
    experiment = parse_experiment(tables)
    events: list[Event] = []
    pack = Pack(model, base, workers, lambda experiment: load_task(experiment, base))
    todo = iter([[StartRun(experiment, folder)]])
    train(pack, lambda free: next(todo, None), events.append)
    return events


def run_pack(workers: Workers, model: PromptedModel, base: Any, tables: dict[str, Any], folder: str, stop: int = 0) -> None:
    """Two runs side by side, whose seeds differ. `stop`: killed after this step."""

    def report(event: Event) -> None:
        if stop and event.kind == "step" and event.step == stop and event.run == "seed-1":
            raise KeyboardInterrupt

    pack = Pack(model, base, workers, lambda experiment: load_task(experiment, base), num_slots=2)
    experiments = [parse_experiment({**changed(tables, {"seed": seed}), "name": f"seed-{seed}"}) for seed in (0, 1)]
    todo = iter([[StartRun(each, f"{folder}/{each.name}") for each in experiments]])
    with contextlib.suppress(KeyboardInterrupt):
        train(pack, lambda free: next(todo, None), report)


def changed(tables: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    shorter = {"steps": 8, "evaluate_every": 4, "micro_batch_size": 5, "checkpoint_every": 4}
    train = {key: value for key, value in settings.items() if key not in ("kind", "teacher")}
    kind, teacher = {"kind": settings.get("kind", "embedding")}, {"teacher": settings.get("teacher")}
    data = {**tables["data"], **teacher}
    return {**tables, "data": data, "prompt": {**tables["prompt"], **kind}, "train": {**tables["train"], **shorter, **train}}


def work(rank: int, port: int, folder: str, tables: dict[str, Any]) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
        LOCAL_WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    from ptuning.training import base_loader

    workers = Workers.current()
    base = find_base(ModelConfig(path=tables["model"]["path"]))
    counted, shares = count_gathered(), []
    model = base_loader.load(
        base, ZeroConfig(stage=3, persistent_below=50, live_parameters=LIVE), torch.float32, progress=shares.append
    )
    found: dict[str, Any] = {"sharding": vars(base_loader.sharding(model.base)), "hash": weights_hash(model.base)}
    found["progress"], found["gathered"] = shares, []
    tensors = {"gradients": gradients(model, base.width, workers)}
    for _ in range(3):  # DeepSpeed gathers one by one until it has seen the pass twice
        counted[0] = 0
        gradients(model, base.width, workers)
        found["gathered"].append(counted[0])
    attention, there = list(model.base.model.layers[1].self_attn.parameters()), []
    gradients(model, base.width, workers, lambda _: there.extend(each.data.numel() for each in attention))
    found["attention_at_end"] = sum(there)
    found["kept"] = kept_bytes(model, base.width, rows(2))
    pack = Pack(model, base, workers, lambda experiment: load_task(experiment, base))
    tensors["embedding"] = pack.embed(list(range(20)))
    found["events"] = [event_fields(event) for event in run(workers, model, base, tables, f"{folder}/two")]
    for name, settings in OTHERWISE.items():
        run(workers, model, base, changed(tables, settings), f"{folder}/two-{name}")
    found["after_training"] = vars(base_loader.sharding(model.base))
    task = load_task(parse_experiment(tables), base)
    vectors = [vector.detach() for vector in prompts(base.width)]
    found["evaluations"] = [each.metrics for each in evaluate(model, vectors, task.test, task.encoder, workers)]
    inputs = [task.test.row(index)[0] for index in range(6)]
    found["greedy"] = [text for vector in vectors for text in Greedy(model, task.encoder, 8).texts(vector, inputs)]
    # The first rank's texts end sooner: it must not leave the other alone in the middle of a layer.
    found["together"] = Greedy(model, task.encoder, (1, 8)[rank], together=True).texts(vectors[0], inputs[rank:])
    found["texts"] = generate_rows(model, vectors, task.test, task.encoder, workers, 4)
    tensors["gradients_after_generation"] = gradients(model, base.width, workers)
    found["hash_after"] = weights_hash(model.base)
    checkpointed = base_loader.load(base, ZeroConfig(stage=3), torch.float32, checkpoint_gradients=True)
    tensors["gradients_checkpointed"] = gradients(checkpointed, base.width, workers)
    # Some of its tensors kept whole on every rank, and all of it.
    for name, settings in KEPT.items():
        kept = base_loader.load(base, ZeroConfig(persistent_below=50, live_parameters=LIVE, **settings), torch.float32)
        tensors[f"gradients_{name}"] = gradients(kept, base.width, workers)
        for _ in range(2):
            counted[0] = 0
            gradients(kept, base.width, workers)
        found[f"gathered_{name}"] = counted[0]
        if name == "whole":
            for other, train in OTHERWISE.items():
                run(workers, kept, base, changed(tables, train), f"{folder}/{name}-{other}")
            run_pack(workers, kept, base, tables, f"{folder}/{name}-pack")
            run_pack(workers, kept, base, tables, f"{folder}/{name}-killed", stop=6)
    half = base_loader.load(base, ZeroConfig(stage=3), torch.bfloat16)
    found["half"] = {"sharding": vars(base_loader.sharding(half.base)), "dtype": str(next(half.parameters()).dtype)}
    tensors["gradients_half"] = gradients(half, base.width, workers)
    Path(f"{folder}/rank{rank}.json").write_text(json.dumps(found))
    from safetensors.torch import save_file

    save_file(tensors, f"{folder}/rank{rank}.safetensors")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path) -> Any:
    """Results of both ranks, and the folder of the run with its tables."""
    from conftest import toy_rows
    from safetensors.torch import load_file

    folder = tmp_path_factory.mktemp("pair")
    for seed, (split, count) in enumerate({"train": 64, "validation": 33, "test": 31}.items()):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in toy_rows(count, seed)))
    tables = {
        "name": "toy",
        "model": {"path": str(tiny_base_folder)},
        "prompt": {"length": 6},
        "data": {split: str(folder / f"{split}.jsonl") for split in ("train", "validation", "test")}
        | {"input": "Text: {text}\nKind:", "target": " {label}", "labels": ["fruit", "tool"]},
        "train": {"steps": 20, "evaluate_every": 10, "batch_size": 9, "learning_rate": 0.05, "micro_batch_size": 2},
    }
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    load_deepspeed()
    from ptuning.training import base_loader, zero  # noqa: F401  # what both would import, each for ten seconds

    torch.multiprocessing.start_processes(work, (port, str(folder), tables), nprocs=2, start_method="fork")
    ranks = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    tensors = [load_file(folder / f"rank{rank}.safetensors") for rank in (0, 1)]
    return folder, tables, ranks, tensors


@pytest.fixture(scope="module")
def alone(tiny_base_folder: Path) -> Any:
    from ptuning.training import base_loader

    base = find_base(ModelConfig(path=str(tiny_base_folder)))
    return base, base_loader.load(base, ZeroConfig(stage=0), torch.float32)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_each_rank_holds_its_share_of_the_base(pair: Any) -> None:
    _, _, ranks, _ = pair
    for rank in ranks:
        for moment in (rank["sharding"], rank["half"]["sharding"]):
            assert moment["held"] <= 0.55 * moment["whole"]
        assert rank["half"]["sharding"]["whole"] == rank["sharding"]["whole"] // 2
    assert sum(rank["sharding"]["held"] for rank in ranks) >= ranks[0]["sharding"]["whole"]
    assert ranks[0]["hash"] != ranks[1]["hash"]


def test_the_plan_gathers_what_deepspeed_gathers(pair: Any, alone: Any) -> None:
    meta_model = MetaModel(alone[0].config, torch.float32)
    timeline = meta_model.training(Workload(2, 5, 4, 8, 2))
    layers = meta_model.shape.layers
    sharing = Sharing(2, LIVE, prefetch_numbers(meta_model.shape.numbers, layers, LIVE), persistent=50)
    for rank in pair[2]:
        assert rank["gathered"][-1] == gather(timeline, sharing, 4).received
        assert rank["gathered"][-1] == rank["gathered"][-2]


def test_attention_is_released_in_the_backward_pass(pair: Any) -> None:
    """It gets its states by keyword, which DeepSpeed does not follow."""
    assert [rank["attention_at_end"] for rank in pair[2]] == [0, 0]


def test_nothing_is_kept_for_weights_that_never_change(pair: Any, alone: Any) -> None:
    base, model = alone
    for rank in pair[2]:
        assert rank["kept"] == kept_bytes(model, base.width, rows(2))


def test_loading_tells_how_far_it_is(pair: Any) -> None:
    for rank in pair[2]:
        shares = rank["progress"]
        assert shares == sorted(shares) and 0 < shares[0] < 0.5 and shares[-1] == pytest.approx(1, abs=0.01)


def test_after_training_layers_are_released_again(pair: Any) -> None:
    for rank in pair[2]:
        # After a pass without backward DeepSpeed keeps what the backward would use first: here the head, a third of it all.
        assert rank["after_training"]["held"] <= 0.75 * rank["after_training"]["whole"]


def test_what_is_kept_whole_is_gathered_once(pair: Any, alone: Any) -> None:
    meta_model = MetaModel(alone[0].config, torch.float32)
    shape, timeline = meta_model.shape, meta_model.training(Workload(2, 5, 4, 8, 2))
    plain = Sharing(2, LIVE, prefetch_numbers(shape.numbers, shape.layers, LIVE), persistent=50)
    kept = KEPT["kept"]["persistent_parameters"]
    expected = gather(timeline, replace(plain, whole=kept, late=shape.embedding_at), 4).received
    for rank in pair[2]:
        assert rank["gathered_kept"] == expected < 0.8 * rank["gathered"][-1]
        assert rank["gathered_all_kept"] == rank["gathered_whole"] == 0


@pytest.mark.parametrize(
    "name",
    ["gradients", "gradients_after_generation", "gradients_checkpointed", *(f"gradients_{name}" for name in KEPT)],
)
def test_law_3_sharded_gradients_are_the_single_process_gradients(pair: Any, alone: Any, name: str) -> None:
    base, model = alone
    expected = gradients(model, base.width, Workers())
    for tensors in pair[3]:
        assert relative(tensors[name], expected) < 1e-5
    assert torch.equal(pair[3][0][name], pair[3][1][name])


def test_bf16_shards_compute_about_the_same(pair: Any, alone: Any) -> None:
    base, model = alone
    assert pair[2][0]["half"]["dtype"] == "torch.bfloat16"
    assert relative(pair[3][0]["gradients_half"], gradients(model, base.width, Workers())) < 0.1


def test_law_3_two_workers_train_what_one_trains(pair: Any, alone: Any) -> None:
    folder, tables, ranks, _ = pair
    base, model = alone
    events = run(Workers(), model, base, tables, f"{folder}/one")
    one = soft_prompt.load(f"{folder}/one/soft_prompt").vectors
    two = soft_prompt.load(f"{folder}/two/soft_prompt").vectors
    assert relative(two, one) < 1e-4
    curve = [event.values["loss"] for event in events if event.kind == "step"]
    sharded = [event["values"]["loss"] for event in ranks[0]["events"] if event["kind"] == "step"]
    assert sharded == pytest.approx(curve, rel=1e-4)
    finished = next(event for event in events if event.kind == "finished")
    assert ranks[0]["events"][-1]["values"] == pytest.approx(finished.values, rel=1e-4)


@pytest.mark.parametrize("name", OTHERWISE)
def test_law_3_holds_for_every_objective(pair: Any, alone: Any, name: str) -> None:
    """With a base that is partitioned, and with one that is whole on both workers."""
    folder, tables, _, _ = pair
    base, model = alone
    run(Workers(), model, base, changed(tables, OTHERWISE[name]), f"{folder}/one-{name}")
    found = {workers: soft_prompt.load(f"{folder}/{workers}-{name}/soft_prompt").vectors for workers in ("one", "two", "whole")}
    assert relative(found["two"], found["one"]) < 1e-4 and relative(found["whole"], found["one"]) < 1e-4


def pack_of(folder: Path) -> list[torch.Tensor]:
    return [soft_prompt.load(str(folder / f"seed-{seed}" / "soft_prompt")).vectors for seed in (0, 1)]


def test_law_4_workers_that_take_whole_soft_prompts_train_what_one_trains(pair: Any, alone: Any) -> None:
    """A soft prompt is computed by one worker, with the rows that one worker alone would compute. And a run that
    two workers have begun can be finished by one (law 5)."""
    folder, tables, _, _ = pair
    base, model = alone
    for seed in (0, 1):
        settings = {**changed(tables, {"seed": seed, "micro_batch_size": None}), "name": f"seed-{seed}"}
        run(Workers(), model, base, settings, f"{folder}/alone/seed-{seed}")
    one = pack_of(folder / "alone")
    run_pack(Workers(), model, base, tables, f"{folder}/whole-killed")
    for name in ("whole-pack", "whole-killed"):
        assert all(relative(found, expected) < 1e-5 for found, expected in zip(pack_of(folder / name), one, strict=True))


def test_law_2_every_shard_is_unchanged_after_training(pair: Any) -> None:
    for rank in pair[2]:
        assert rank["hash"] == rank["hash_after"]


def test_embedding_rows_are_read_whole_from_a_sharded_base(pair: Any, alone: Any) -> None:
    _, model = alone
    expected = model.base.get_input_embeddings().weight[:20].detach()
    for tensors in pair[3]:
        assert torch.equal(tensors["embedding"], expected)


def test_evaluation_and_generation_do_not_depend_on_sharding(pair: Any, alone: Any) -> None:
    base, model = alone
    task = load_task(parse_experiment(pair[1]), base)
    vectors = [vector.detach() for vector in prompts(base.width)]
    expected = evaluate(model, vectors, task.test, task.encoder, Workers())
    inputs = [task.test.row(index)[0] for index in range(6)]
    texts = [text for vector in vectors for text in Greedy(model, task.encoder, 8).texts(vector, inputs)]
    for rank in pair[2]:
        for found, each in zip(rank["evaluations"], expected, strict=True):
            assert found == pytest.approx(each.metrics, rel=1e-5)
        assert rank["greedy"] == texts
        assert rank["texts"] == generate_rows(model, vectors, task.test, task.encoder, Workers(), 4)


def test_workers_whose_texts_end_at_different_tokens_wait_for_each_other(pair: Any, alone: Any) -> None:
    _, tables, ranks, _ = pair
    base, model = alone
    task = load_task(parse_experiment(tables), base)
    inputs = [task.test.row(index)[0] for index in range(6)]
    vectors = prompts(base.width)[0].detach()
    for rank, longest in enumerate((1, 8)):
        assert ranks[rank]["together"] == Greedy(model, task.encoder, longest).texts(vectors, inputs[rank:])


def test_weights_that_are_not_the_files_are_refused(alone: Any, tmp_path: Path, tiny_base_folder: Path) -> None:
    from ptuning.errors import BaseError
    from ptuning.training import base_loader

    base, _ = alone
    loaded = base.load(torch.float32)
    loaded.model.layers[1].mlp.up_proj.weight.data[0, 0] += 1.0
    with pytest.raises(BaseError, match="was not loaded as it is stored"):
        base_loader._check_weights(loaded, base)


def test_derived_settings_fit_a_frozen_base(alone: Any) -> None:
    from ptuning.training import zero

    config = zero.derive_config(ZeroConfig(live_parameters=123, offload=True), alone[0], torch.bfloat16)
    partition = config["zero_optimization"]
    assert partition["stage"] == 3 and partition["reduce_bucket_size"] <= 1_000_000
    assert partition["stage3_max_live_parameters"] == 123 and partition["offload_param"]["device"] == "cpu"
    assert config["bf16"]["enabled"] is True


def test_no_compiled_operation_is_loaded(alone: Any) -> None:
    """DeepSpeed would compile C++ on the first use, on machines that have no compiler."""
    import deepspeed.ops

    from ptuning.training import zero

    zero._skip_compiled_collectives()
    assert deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] is False
