"""A Ray Tune trial: requests a slot from the dispatcher, receives its metrics, and reports them to Tune. Does not import
torch."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from ray import tune

from ptuning import storage
from ptuning.config import Experiment
from ptuning.searching.space import LENGTH, best_result, score, trial_tables

STATE = "state.json"


class TrialFailed(RuntimeError):
    """The soft prompt could not be trained; Tune marks the trial."""


def run_trial(values: dict[str, Any], dispatcher: Any, tables: dict[str, Any], checkpoints: bool) -> None:
    """Follow one configuration to its end. `checkpoints`: hand them to Tune, for schedulers that let one trial go on
    from another."""
    experiment = Experiment.model_validate(tables)
    me = tune.get_context().get_trial_id()
    run, folder = ray.get(dispatcher.begin.remote(me))
    inherited = tune.get_checkpoint()
    if inherited:
        inherit({path.name: path.read_bytes() for path in Path(inherited.path).iterdir()}, folder)
    ray.get(dispatcher.attach.remote(me, run, folder, trial_tables(tables, run, values), values))
    seen: list[Any] = []
    while True:
        for event in ray.get(dispatcher.results.remote(me, run)):
            if event["kind"] == "failed":
                raise TrialFailed(event["details"]["message"])
            if event["kind"] in ("finished", "released"):
                return
            seen.append({**event, "best": event["details"]["best"]})
            best = best_result(experiment, seen, values[LENGTH])
            assert best is not None
            metrics = {"step": event["step"], "score": score(experiment, best["values"], values[LENGTH])}
            if checkpoints:
                _report_with_checkpoint(metrics, storage.join(folder, "checkpoints"))
            else:
                tune.report(metrics)


def _report_with_checkpoint(metrics: dict[str, Any], folder: str) -> None:
    """Hand over the newest checkpoint, a few rows of numbers, as soon as that of this evaluation is written."""
    deadline = time.monotonic() + 10
    while not (names := storage.list_folders(folder)) or names[-1] < f"step-{metrics['step']:09d}":
        if time.monotonic() > deadline:
            tune.report(metrics)
            return
        time.sleep(0.02)
    with tempfile.TemporaryDirectory() as temporary:
        for file, content in storage.read_folder(storage.join(folder, names[-1])).items():
            (Path(temporary) / file).write_bytes(content)
        tune.report(metrics, checkpoint=tune.Checkpoint.from_directory(temporary))


def inherit(files: Mapping[str, bytes], folder: str) -> int:
    """Go on from another trial's checkpoint, whose curve stays its own. `folder`: of the one that goes on. Returns the step, 0
    if these files are not a checkpoint."""
    if STATE not in files:
        return 0
    state = json.loads(files[STATE])
    own = {name: content for name, content in files.items() if name.startswith("state.")}
    own[STATE] = json.dumps(state | {"events": []}).encode()
    storage.write_folder(storage.join(folder, "checkpoints", f"step-{state['step']:09d}"), own)
    return int(state["step"])
