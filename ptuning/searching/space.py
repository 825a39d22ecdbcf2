"""The search space, and the experiment of a configuration. Plain data: trials import it without torch."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ptuning.config import PLACES, Experiment, ExperimentError, parse_experiment
from ptuning.settings.fields import Kind
from ptuning.settings.search import is_whole, takes_words

Values = Mapping[str, Any]
"""One configuration: dotted keys of the experiment and their values."""
Range = tuple[float, float]

KIND, LENGTH, RATE, INIT = "prompt.kind", "prompt.length", "train.learning_rate", "prompt.init"


def choices(experiment: Experiment) -> dict[str, tuple[Any, ...]]:
    """The keys that have listed values."""
    search = experiment.search
    listed = {key: values for key, values in search.space.items() if len(values) > 2 or takes_words(key)}
    whole = {key: tuple(int(value) if is_whole(key) else value for value in values) for key, values in listed.items()}
    kinds = {KIND: search.kind} if search.kind else {}
    return {LENGTH: search.length, INIT: search.init} | kinds | whole


def kinds(experiment: Experiment) -> tuple[Kind, ...]:
    """The kinds of soft prompt that a search trains."""
    return experiment.search.kind or (experiment.prompt.kind,)


def ranges(experiment: Experiment) -> dict[str, Range]:
    """The keys that have a range; the learning rate is drawn log-uniformly, the others uniformly."""
    search = experiment.search
    spans = {key: values for key, values in search.space.items() if len(values) == 2 and not takes_words(key)}
    return {RATE: search.learning_rate} | {key: (float(low), float(high)) for key, (low, high) in spans.items()}


def grid(experiment: Experiment) -> dict[str, list[Any]]:
    """All listed values, and of each range as many points as make at least `trials` combinations."""
    listed, spans = choices(experiment), {key: span for key, span in ranges(experiment).items() if span[0] < span[1]}
    have = math.prod(len(values) for values in listed.values())
    points = max(2, math.ceil((experiment.search.trials / have) ** (1 / max(1, len(spans))) - 1e-9))
    found = {key: list(values) for key, values in listed.items()}
    for key, (low, high) in ranges(experiment).items():
        shares = [place / (points - 1) for place in range(points)] if key in spans else [0.0]
        values = [low * (high / low) ** share if key == RATE else low + share * (high - low) for share in shares]
        found[key] = sorted({round(value) for value in values}) if is_whole(key) else values
    return found


def trial_tables(tables: Mapping[str, Any], name: str, values: Values) -> dict[str, Any]:
    """The experiment of one trial, as plain tables: the choice put in, the test rows taken out."""
    changed = {key: dict(value) if isinstance(value, dict) else value for key, value in tables.items()}
    changed["name"] = name
    changed["data"]["test"] = None
    changed["train"]["starts"] = 1  # a trial is one start: the search itself makes many
    for key, value in values.items():
        table, _, field = key.partition(".")
        changed[table][field] = value
    prompt = changed["prompt"]
    for init, source in (("text", "init_text"), ("soft-prompt", "init_from")):
        if prompt["init"] != init:
            prompt[source] = None
    return changed


def key_of(tables: Mapping[str, Any]) -> str:
    """Hash of everything that determines a trial's result within its search, its seed and budget included. Paths do not: what
    is there is the same for all trials (`run_setup.run_contents`)."""
    decisive = {
        table: {key: value for key, value in tables[table].items() if f"{table}.{key}" not in PLACES}
        for table in ("model", "prompt", "data", "train")
    }
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:16]


def score(experiment: Experiment, metrics: Mapping[str, float], length: int) -> float:
    """The objective of a search, to maximise: the metric minus the cost of the length."""
    value = metrics[experiment.metric]
    return (-value if experiment.metric == "loss" else value) - experiment.search.prefer_short * math.log2(length)


def best_result(experiment: Experiment, results: Sequence[Mapping[str, Any]], length: int) -> Mapping[str, Any] | None:
    """The evaluation whose soft prompt is kept: the last one that was the best when it was made (`Slot.observe`). Without such
    marks: the best value, ties go to the lower loss."""
    marked = next((each for each in reversed(results) if each.get("best")), None)
    if marked is not None:
        return marked
    key = experiment.metric
    sign = -1 if key == "loss" else 1
    return max(results, key=lambda each: (sign * each["values"][key], -each["values"]["loss"]), default=None)


def check(experiment: Experiment) -> None:
    """Every listed value makes a valid experiment.

    Raises:
        ExperimentError: one does not.
    """
    if not experiment.data.validation:
        raise ExperimentError("data.validation: a search compares on validation rows; set it")
    tables = experiment.model_dump(mode="json")
    low, high = ({key: span[end] for key, span in ranges(experiment).items()} for end in (0, 1))
    for base in (low, high):
        rounded = {key: round(value) if is_whole(key) else value for key, value in base.items()}
        for init in experiment.search.init:
            values = rounded | {LENGTH: experiment.search.length[0], INIT: init}
            changed = trial_tables(tables, experiment.name, values)
            for kind, source in (("text", "init_text"), ("soft-prompt", "init_from")):
                if init == kind and not changed["prompt"][source]:
                    raise ExperimentError(
                        f'search.init: "{init}" needs prompt.{source}; set it with prompt.init = "{init}", or remove the value'
                    )
            parse_experiment(changed, "search")
    if experiment.search.scheduler == "pbt" and experiment.search.trials < 2:
        raise ExperimentError("search.trials: pbt needs a population of at least 2; raise it or choose another scheduler")
