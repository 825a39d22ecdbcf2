"""Measures this project against its peers on the same work: `python jobs/benchmark.py train`.

Both sides run in one process on the same base, data, dtype and threads, interleaved A B B A, and must agree on the gradient
before they are timed. Ratios are medians over pairs with a bootstrap interval; absolute times depend on the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import torch.distributed
import torch.multiprocessing
from peft import PromptTuningConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from ptuning import zero
from ptuning.base import find_base
from ptuning.config import read_experiment
from ptuning.model import PromptedModel, plan_targets
from ptuning.prepare import absolute, load_task
from ptuning.train import Assignment, Pack, step
from ptuning.train import train as train_slots
from ptuning.workers import Workers

Step = Callable[[], Tensor]


def random_llama(dtype: torch.dtype) -> PreTrainedModel:
    """A Llama shape of 58 M parameters with a vocabulary of 32,000; the same numbers at every call."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        pad_token_id=0,
    )
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def our_step(base: PreTrainedModel, vectors: Tensor, rows: list[tuple[list[int], list[int]]]) -> Step:
    """Loss and gradient `[P, H]` by this project."""
    model = PromptedModel(base)
    soft_prompt = vectors.clone().requires_grad_()

    def step() -> Tensor:
        soft_prompt.grad = None
        plan = plan_targets([len(soft_prompt)], [rows])
        model([soft_prompt], plan).mean().backward()
        assert soft_prompt.grad is not None
        return soft_prompt.grad

    return step


def peft_step(base: PreTrainedModel, vectors: Tensor, rows: list[tuple[list[int], list[int]]]) -> Step:
    """The same by PEFT's prompt tuning, in a plain loop."""
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=len(vectors))
    model: Any = get_peft_model(base, config)
    weight: Tensor = model.prompt_encoder["default"].embedding.weight
    weight.data.copy_(vectors)
    ids = torch.tensor([source + target for source, target in rows])
    labels = torch.full_like(ids, -100)
    for row, (source, target) in enumerate(rows):
        labels[row, len(source) : len(source) + len(target)] = torch.tensor(target)

    def step() -> Tensor:
        weight.grad = None
        model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss.backward()
        assert weight.grad is not None
        return weight.grad

    return step


def interleave(ours: Step, theirs: Step, pairs: int) -> tuple[list[float], list[float]]:
    """Seconds of each step, in the order A B B A A B ..."""
    times: tuple[list[float], list[float]] = ([], [])
    for pair in range(pairs):
        for side in (0, 1) if pair % 2 == 0 else (1, 0):
            began = time.perf_counter()
            (ours, theirs)[side]()
            times[side].append(time.perf_counter() - began)
    return times


def interval(ratios: list[float], seed: int = 0) -> tuple[float, float]:
    """Bootstrap 95 % interval of the median."""
    draw = np.random.default_rng(seed)
    medians = np.median(draw.choice(ratios, (2000, len(ratios))), axis=1)
    return float(np.quantile(medians, 0.025)), float(np.quantile(medians, 0.975))


def compare(batch: int, text: int, length: int, dtype: torch.dtype, pairs: int) -> dict[str, Any]:
    """One shape: agreement of the gradients, an A/A control, and the ratio of step times PEFT / ours."""
    draw = np.random.default_rng(1)
    rows = [(draw.integers(5, 32_000, text - 2).tolist(), [7, 2]) for _ in range(batch)]
    vectors = torch.randn(length, 512, generator=torch.Generator().manual_seed(2)) * 0.02
    ours, theirs = our_step(random_llama(dtype), vectors, rows), peft_step(random_llama(dtype), vectors, rows)
    expected = theirs().float()
    difference = float((ours() - expected).norm() / expected.norm())
    control = interleave(ours, ours, max(3, pairs // 3))
    mine, other = interleave(ours, theirs, pairs)
    ratios = [b / a for a, b in zip(mine, other, strict=True)]
    return {
        "B": batch,
        "T": text,
        "P": length,
        "dtype": str(dtype).removeprefix("torch."),
        "gradient_difference": difference,
        "ours_s": statistics.median(mine),
        "peft_s": statistics.median(other),
        "ratio": statistics.median(ratios),
        "ratio_95": interval(ratios),
        "control": statistics.median(b / a for a, b in zip(*control, strict=True)),
    }


def train(arguments: argparse.Namespace) -> None:
    """Step time against PEFT, fp32 and bf16."""
    torch.set_num_threads(arguments.threads)
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        for batch, text, length in ((16, 32, 20), (16, 32, 100), (16, 64, 50)):
            found = compare(batch, text, length, dtype, arguments.pairs)
            limit = 1e-4 if dtype == torch.float32 else 0.1
            assert found["gradient_difference"] < limit, f"the gradients differ: {found}"
            results.append(found)
            low, high = found["ratio_95"]
            print(
                f"{found['dtype']:9} B={batch} T={text} P={length:3}: "
                f"ours {found['ours_s']:.3f} s, PEFT {found['peft_s']:.3f} s, "
                f"ratio {found['ratio']:.2f} [{low:.2f}, {high:.2f}], "
                f"gradients differ by {found['gradient_difference']:.0e}, A/A {found['control']:.2f}",
                flush=True,
            )
    for index in range(3):
        half = results[index]["ours_s"] / results[index + 3]["ours_s"]
        print(f"bf16 against fp32, P={results[index]['P']}: {half:.2f} times as fast")
    machine = {
        "processor": platform.processor() or platform.machine(),
        "threads": arguments.threads,
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
    }
    if arguments.out:
        Path(arguments.out).write_text(json.dumps({"machine": machine, "train": results}, indent=1))


def bare_worker(rank: int, port: int, path: str, overrides: list[str], folder: str) -> None:
    """One of two plain processes that train an experiment without Ray and MLflow."""
    local = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ |= {"MASTER_ADDR": "127.0.0.1"} | {name: str(value) for name, value in local.items()}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    experiment = absolute(read_experiment(path, overrides))
    base = find_base(experiment.model)
    model = zero.load(base, experiment.zero, base.dtype(experiment.model.dtype))
    pack = Pack(model, base, Workers.current(), lambda experiment: load_task(experiment, base))
    assignments = iter([[Assignment(experiment, f"{folder}/bare")]])
    train_slots(pack, lambda free: next(assignments, None), lambda event: None)
    torch.distributed.destroy_process_group()


def launch(arguments: argparse.Namespace) -> None:
    """Seconds of the whole command with 2 workers, against two bare processes that run the same loop."""
    overrides = ["compute.workers=2", "compute.cpus_per_worker=1", *arguments.overrides]
    seconds: dict[str, list[float]] = {"command": [], "bare": []}
    for _ in range(arguments.pairs):
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            command = [sys.executable, "-m", "ptuning", "train", arguments.experiment, *overrides, f"compute.storage={folder}"]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            seconds["command"].append(time.perf_counter() - began)
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            began = time.perf_counter()
            torch.multiprocessing.spawn(  # type: ignore[attr-defined]  # a re-export that torch does not declare
                bare_worker, (port, arguments.experiment, overrides, folder), nprocs=2
            )
            seconds["bare"].append(time.perf_counter() - began)
    for name, values in seconds.items():
        print(f"{name:8} {statistics.median(values):.1f} s {[round(value, 1) for value in values]}")
    print(f"Ray, MLflow and the checks add {statistics.median(seconds['command']) - statistics.median(seconds['bare']):.1f} s")
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(seconds))


def pack_worker(rank: int, port: int, path: str, overrides: list[str], folder: str) -> None:
    """One of two plain processes: bytes gathered and trial-steps per second over the number of slots."""
    local = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ |= {"MASTER_ADDR": "127.0.0.1"} | {name: str(value) for name, value in local.items()}
    torch.set_num_threads(1)
    gathered = count_gathered()
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    experiment = absolute(read_experiment(path, overrides))
    base = find_base(experiment.model)
    model = zero.load(base, experiment.zero, base.dtype(experiment.model.dtype))
    task = load_task(experiment, base)
    results = []
    for slots in (1, 2, 4, 8):
        pack = Pack(model, base, Workers.current(), lambda experiment: task, slots)
        for number in range(slots):
            pack.attach(Assignment(experiment.model_copy(update={"name": f"t{number}"}), f"{folder}/{slots}/{number}"))
        step(pack, lambda event: None)
        gathered[0], began, steps = 0, time.perf_counter(), 6
        for _ in range(steps):
            step(pack, lambda event: None)
        seconds = time.perf_counter() - began
        results.append(
            {
                "slots": slots,
                "bytes_per_trial_step": gathered[0] / (slots * steps),
                "trial_steps_per_s": slots * steps / seconds,
            }
        )
    if rank == 0:
        Path(folder, "pack.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


def count_gathered() -> list[int]:
    """A counter of the bytes that all-gathers bring to this process, in a list of one."""
    counter = [0]

    def counting(collective: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            output = arguments[0] if arguments else options["output_tensor"]
            tensors = output if isinstance(output, list) else [output]
            counter[0] += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            return collective(*arguments, **options)

        return call

    for name in ("all_gather_into_tensor", "all_gather"):
        setattr(torch.distributed, name, counting(getattr(torch.distributed, name)))
    return counter


class Memory:
    """The most memory that processes below this one used together, in bytes; shared pages count once (PSS)."""

    def __init__(self) -> None:
        self.peak = 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stopped.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stopped.wait(1.0):
            total = 0
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):
                    total += process.memory_full_info().pss
            self.peak = max(self.peak, total)


def nested_worker(path: str, overrides: list[str], trials: list[dict[str, Any]], out: str) -> None:
    """The usual nesting: Ray Tune, and one TorchTrainer per trial, as in Ray's own example."""
    import ray
    from ray import tune

    from ptuning import launch
    from ptuning.mailbox import Mailbox
    from ptuning.space import trial_tables

    experiment = absolute(read_experiment(path, overrides))
    launch.start_ray(experiment)
    tables, folder = experiment.model_dump(mode="json"), f"{experiment.compute.storage}/nested"
    scaling = launch.scale(experiment, spare=0.25)

    def trial(config: dict[str, Any]) -> None:
        from ptuning.config import Experiment
        from ptuning.launch import make_trainer

        number = config["number"]
        mine = Experiment.model_validate(trial_tables(tables, f"t{number}", trials[number]))
        mailbox = Mailbox.remote()  # type: ignore[attr-defined]  # added by ray.remote
        make_trainer(mine, f"{folder}/ray/{number}", scaling, {"folder": f"{folder}/{number}", "mailbox": mailbox}).fit()
        [finished] = [event for event in ray.get(mailbox.take.remote()) if event["kind"] == "finished"]
        tune.report(finished["values"])

    grid: Any = tune.Tuner(
        tune.with_resources(trial, {"cpu": 0.01}),
        param_space={"number": tune.grid_search(list(range(len(trials))))},
        tune_config=tune.TuneConfig(max_concurrent_trials=1),
        run_config=tune.RunConfig(name="tune", storage_path=f"{folder}/tune", verbose=0),
    ).fit()
    found = {result.config["number"]: result.metrics for result in grid if result.config and result.metrics}
    metric = f"validation_{experiment.metric}"
    Path(out).write_text(json.dumps([found[number][metric] for number in range(len(trials))]))
    ray.shutdown()


def search(arguments: argparse.Namespace) -> None:
    """A packed search against the usual nesting (Ray Tune, one TorchTrainer per trial): same trials, seeds and steps, no early
    stopping. Then ASHA on top, and the bytes that ZeRO-3 gathers over the number of slots."""
    common = ["compute.workers=2", "compute.cpus_per_worker=1", "search.finalists=1", "search.seeds=1", *arguments.overrides]
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        name = read_experiment(arguments.experiment, common).name
        ledger = Path(folder, "fifo", name, "ledger.json")
        for scheduler in ("fifo", "asha"):
            overrides = [*common, f"search.scheduler={scheduler}", f"compute.storage={folder}/{scheduler}"]
            results[scheduler] = timed([sys.executable, "-m", "ptuning", "search", arguments.experiment, *overrides])
            print(f"packed, {scheduler}: {results[scheduler]}", flush=True)
        trials = [entry for entry in json.loads(ledger.read_text())["trials"] if not entry["finalist"]]
        metric = read_experiment(arguments.experiment, common).metric
        packed = [entry["measured"][f"validation_{metric}"] for entry in trials]
        out = f"{folder}/nested.json"
        job = [arguments.experiment, json.dumps([*common, f"compute.storage={folder}/nested"])]
        job += [json.dumps([entry["values"] for entry in trials]), out]
        results["nested"] = timed([sys.executable, __file__, "nested", *job])
        alone = json.loads(Path(out).read_text())
        results["largest_difference"] = max(abs(one - two) for one, two in zip(packed, alone, strict=True))
        print(f"nested: {results['nested']}, metrics differ by {results['largest_difference']:.2g} at most", flush=True)
        print(f"packed is {results['nested']['seconds'] / results['fifo']['seconds']:.1f} times as fast")
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(results, indent=1))


def pack(arguments: argparse.Namespace) -> None:
    """Bytes gathered per trial-step and trial-steps per second over the number of slots, ZeRO-3 on 2 processes."""
    with tempfile.TemporaryDirectory() as folder:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        torch.multiprocessing.spawn(  # type: ignore[attr-defined]  # a re-export that torch does not declare
            pack_worker, (port, arguments.experiment, arguments.overrides, folder), nprocs=2
        )
        results = json.loads(Path(folder, "pack.json").read_text())
    for row in results:
        print(f"K={row['slots']}: {row['bytes_per_trial_step']:,.0f} bytes, {row['trial_steps_per_s']:.2f} trial-steps/s")
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(results))


def timed(command: list[str]) -> dict[str, float]:
    """Wall time of a command and the peak memory of all its processes."""
    began = time.perf_counter()
    with Memory() as memory:
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return {"seconds": round(time.perf_counter() - began, 1), "peak_mib": round(memory.peak / 2**20)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("train", help=train.__doc__)
    command.add_argument("--pairs", type=int, default=10)
    command.add_argument("--threads", type=int, default=2)
    command.add_argument("--out", help="file for the raw numbers (JSON)")
    command.set_defaults(run=train)
    command = commands.add_parser("launch", help=launch.__doc__)
    command.add_argument("experiment")
    command.add_argument("overrides", nargs="*")
    command.add_argument("--pairs", type=int, default=3)
    command.add_argument("--out", help="file for the raw numbers (JSON)")
    command.set_defaults(run=launch)
    for run in (search, pack):
        command = commands.add_parser(run.__name__, help=run.__doc__)
        command.add_argument("experiment")
        command.add_argument("overrides", nargs="*")
        command.add_argument("--out", help="file for the raw numbers (JSON)")
        command.set_defaults(run=run)
    command = commands.add_parser("nested", help="used by search")
    for name in ("experiment", "overrides", "trials", "out"):
        command.add_argument(name)
    command.set_defaults(
        run=lambda found: nested_worker(found.experiment, json.loads(found.overrides), json.loads(found.trials), found.out)
    )
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
