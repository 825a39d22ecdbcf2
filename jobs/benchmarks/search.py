"""A packed search against the usual nesting, and what a pack of soft prompts saves."""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from benchmarks.bare import count_gathered, spawn
from ptuning.cluster.local_paths import absolute
from ptuning.config import read_experiment
from ptuning.data.task import load_task
from ptuning.model.base import find_base
from ptuning.tracking import plots
from ptuning.training import base_loader
from ptuning.training.distributed import Workers
from ptuning.training.loop import Pack, step
from ptuning.training.messages import StartRun


def pack_worker(path: str, overrides: list[str], folder: str) -> None:
    """One of two plain processes: bytes gathered and trial-steps per second over the number of slots."""
    gathered = count_gathered()
    workers = Workers.current()
    experiment = absolute(read_experiment(path, overrides))
    base = find_base(experiment.model)
    model = base_loader.load(base, experiment.zero, base.dtype(experiment.model.dtype))
    task = load_task(experiment, base)
    results = []
    for slots in (1, 2, 4, 8):
        pack = Pack(model, base, workers, lambda experiment: task, slots)
        for number in range(slots):
            pack.attach(StartRun(experiment.model_copy(update={"name": f"t{number}"}), f"{folder}/{slots}/{number}"))
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
    if workers.is_main:
        Path(folder, "pack.json").write_text(json.dumps(results))


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
        while not self._stopped.wait(4.0):  # reading the pages of a dozen processes takes a third of a second
            total = 0
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):
                    total += process.memory_full_info().pss
            self.peak = max(self.peak, total)


def nested_worker(path: str, overrides: list[str], trials: list[dict[str, Any]], out: str, settings: str) -> None:
    """The usual nesting: Ray Tune, and one TorchTrainer per trial, as in Ray's own example. `settings`: Ray's defaults
    (`ray`), or those with which this project starts it (`ours`): fewer actors, and an end that is noticed sooner."""
    import ray
    from ray import tune
    from ray.train.torch import TorchTrainer

    from ptuning.cluster import connection
    from ptuning.searching.space import trial_tables
    from ptuning.training import ray_trainer
    from ptuning.training.event_queue import EventQueue

    experiment = absolute(read_experiment(path, overrides))
    if settings == "ours":
        connection.start_ray(experiment)
    else:
        ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    tables, folder = experiment.model_dump(mode="json"), f"{experiment.compute.storage}/nested"
    scaling = ray_trainer.scale(experiment, spare=0.25)

    def work(config: dict[str, Any]) -> None:
        from ptuning.training import worker

        worker.work(config)

    def trial(config: dict[str, Any]) -> None:
        from ptuning.config import Experiment
        from ptuning.training.ray_trainer import make_trainer

        number = config["number"]
        mine = Experiment.model_validate(trial_tables(tables, f"t{number}", trials[number]))
        queue = EventQueue.remote()  # type: ignore[attr-defined]  # added by ray.remote
        where = {"folder": f"{folder}/{number}", "events": queue}
        if settings == "ours":
            trainer = make_trainer(mine, f"{folder}/ray/{number}", scaling, work, where)
        else:
            trainer = TorchTrainer(
                work,
                train_loop_config={"experiment": mine.model_dump(mode="json"), "threads": None} | where,
                scaling_config=scaling,
                run_config=ray.train.RunConfig(name=f"t{number}", storage_path=f"{folder}/ray"),
            )
        trainer.fit()
        [finished] = [event for event in ray.get(queue.take.remote(0)) if event["kind"] == "finished"]
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
        if arguments.nested != "none":
            out = f"{folder}/nested.json"
            job = [arguments.experiment, json.dumps([*common, f"compute.storage={folder}/nested"])]
            job += [json.dumps([entry["values"] for entry in trials]), out, arguments.nested]
            results["nested"] = timed([sys.executable, sys.argv[0], "nested", *job])
            alone = json.loads(Path(out).read_text())
            results["largest_difference"] = max(abs(one - two) for one, two in zip(packed, alone, strict=True))
            print(f"nested: {results['nested']}, metrics differ by {results['largest_difference']:.2g} at most", flush=True)
            print(f"packed is {results['nested']['seconds'] / results['fifo']['seconds']:.1f} times as fast")
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(results, indent=1))


def pack(arguments: argparse.Namespace) -> None:
    """Bytes gathered per trial-step and trial-steps per second over the number of slots, ZeRO-3 on 2 processes."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(pack_worker, 2, arguments.experiment, arguments.overrides, folder)
        results = json.loads(Path(folder, "pack.json").read_text())
    for row in results:
        print(f"K={row['slots']}: {row['bytes_per_trial_step']:,.0f} bytes, {row['trial_steps_per_s']:.2f} trial-steps/s")
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(results, indent=1))
        speeds = {"2 workers": [(row["slots"], row["trial_steps_per_s"]) for row in results]}
        picture = plots.curves(speeds, "A pack of soft prompts", "trial-steps per second", "slots")
        Path(arguments.out).with_suffix(".png").write_bytes(picture)


def timed(command: list[str]) -> dict[str, float]:
    """Wall time of a command and the peak memory of all its processes."""
    began = time.perf_counter()
    with Memory() as memory:
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return {"seconds": round(time.perf_counter() - began, 1), "peak_mib": round(memory.peak / 2**20)}


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The commands `search` and `pack`."""
    for run in (search, pack):
        command = commands.add_parser(run.__name__, help=run.__doc__)
        command.add_argument("experiment")
        command.add_argument("overrides", nargs="*")
        command.add_argument("--out", help="file for the raw numbers (JSON)")
        command.set_defaults(run=run)
        if run is search:
            command.add_argument(
                "--nested", choices=("ray", "ours", "none"), default="ray", help="settings of Ray for the nesting, if any"
            )
    command = commands.add_parser("nested", help="used by search")
    for name in ("experiment", "overrides", "trials", "out", "settings"):
        command.add_argument(name)
    command.set_defaults(
        run=lambda found: nested_worker(
            found.experiment, json.loads(found.overrides), json.loads(found.trials), found.out, found.settings
        )
    )
