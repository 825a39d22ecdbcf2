"""From what a client asks for to the experiments of a job's trials."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from ptuning.config import Experiment, ExperimentError, parse_experiment
from ptuning.data.chat_encoder import chat_template_of
from ptuning.data.resolve import resolved
from ptuning.data.task import load_task
from ptuning.data.task_template import recognised
from ptuning.errors import DataError, UserError
from ptuning.model.base import Base
from ptuning.redaction import placeless
from ptuning.training.ray_trainer import for_workers
from ptuning.tuning.jobs import AUTO, JobRecord, Trial

HYPERPARAMETERS = "method.supervised.hyperparameters"
PARAMETERS = {
    "prompt.length": f"{HYPERPARAMETERS}.prompt_length",
    "prompt.kind": f"{HYPERPARAMETERS}.prompt_kind",
    "prompt.init": f"{HYPERPARAMETERS}.init",
    "prompt.init_text": f"{HYPERPARAMETERS}.init_text",
    "train.objective": f"{HYPERPARAMETERS}.objective",
    "train.batch_size": f"{HYPERPARAMETERS}.batch_size",
    "train.epochs": f"{HYPERPARAMETERS}.n_epochs",
    "train.learning_rate_multiplier": f"{HYPERPARAMETERS}.learning_rate_multiplier",
    "data.labels": "method.supervised.labels",
    "data.input": "method.supervised.template.input",
    "data.target": "method.supervised.template.target",
    "data.system": "method.supervised.system",
}
"""What a client calls a setting of the experiment."""

KEPT = (
    *("learning_rate", "optimizer", "weight_decay", "schedule", "warmup", "batch_size", "micro_batch_size", "steps", "epochs"),
    *("evaluate_every", "clip", "checkpoint_every", "gradient_checkpointing", "average_decay"),
)
"""Settings of [train] that jobs take from the server's experiment. The others belong to its own task."""

VALIDATION = 0.1
"""Fraction of the training rows that is used for validation if a job has no validation file."""
EPOCHS, LEAST_STEPS = 5, 50
"""A job without a number of epochs has at most this many, unless that is fewer steps than these."""
MOST_LABELS, ROWS_PER_LABEL = 20, 10
"""Answers are labels if there are at most this many different ones, and this many rows for each."""

CONVERSATION = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}Assistant: {{ message['content'] }}{{ eos_token }}\n"
    "{% else %}{{ message['role'] | capitalize }}: {{ message['content'] }}\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
"""The chat template of conversations on a base that has none."""


class JobRefused(UserError):
    """A job cannot be taken. `param`: what is wrong about it."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


def method_of(body: Mapping[str, Any]) -> dict[str, Any]:
    """The method of a request, with the hyperparameters that OpenAI's older clients send beside it."""
    supervised = dict((body.get("method") or {}).get("supervised") or {})
    older = body.get("hyperparameters") or {}
    given = {**older, **(supervised.get("hyperparameters") or {})}
    supervised["hyperparameters"] = {
        key: given.get(key, AUTO) for key in ("batch_size", "learning_rate_multiplier", "n_epochs")
    } | {key: value for key, value in given.items() if value is not None}
    return {"type": "supervised", "supervised": {key: value for key, value in supervised.items() if value is not None}}


def check(record: JobRecord, server: Experiment) -> None:
    """Check everything that needs no rows.

    Raises:
        JobRefused: something is wrong.
    """
    try:
        _experiment(record, server, "rows.jsonl", "rows.jsonl", "job", AUTO)
    except ExperimentError as error:
        raise in_clients_words(error) from None


def prepare(record: JobRecord, server: Experiment, base: Base, train: str, validation: str | None, rows: int) -> None:
    """Read the rows of a job and decide what was left to them: labels, steps, trials. `train`, `validation`: their sources.

    Raises:
        JobRefused: the rows are not right.
    """
    try:
        experiment = _with_labels(record, server, base, train, validation, rows)
        experiment, _ = resolved(experiment)
        if record.method["supervised"]["hyperparameters"]["n_epochs"] == AUTO and server.train.epochs is None:
            experiment = _fewer_steps(experiment, rows)
        task = load_task(experiment, base)
    except UserError as error:
        raise in_clients_words(error) from None
    config = experiment.train
    record.metric = experiment.metric
    record.tokens_per_step = float(task.train.lengths.sum()) / len(task.train) * config.batch_size
    multipliers = _multipliers(record, server)
    record.hyperparameters = {
        "batch_size": config.batch_size,
        "learning_rate_multiplier": AUTO if len(multipliers) > 1 else multipliers[0],
        "n_epochs": max(1, math.ceil(config.steps * config.batch_size / len(task.train) - 1e-9)),
    }
    every = min(config.evaluate_every, max(1, math.ceil(config.steps / 4)))
    tables = for_workers(experiment)
    for number, multiplier in enumerate(multipliers):
        run = f"{record.id}.t{number}"
        factor = server.train.learning_rate_multiplier * multiplier
        own = tables | {"name": run, "train": tables["train"] | {"learning_rate_multiplier": factor, "evaluate_every": every}}
        decisive = {key: own[key] for key in ("name", "prompt", "data", "train")}
        record.trials.append(Trial(run, decisive, config.steps, multiplier))


def _fewer_steps(experiment: Experiment, rows: int) -> Experiment:
    """The experiment with the server's steps, or fewer if a job has few rows."""
    config = experiment.train
    steps = min(config.steps, max(LEAST_STEPS, math.ceil(EPOCHS * rows / config.batch_size)))
    return experiment.model_copy(update={"train": config.model_copy(update={"steps": steps})})


def order_of(
    record: JobRecord, trial: Trial, server: Experiment, train: str, validation: str | None, folder: str
) -> dict[str, Any]:
    """What a worker needs to train a trial. Places are as they are now: the storage may have been moved."""
    tables = for_workers(server) | trial.experiment
    tables["data"] = trial.experiment["data"] | {"train": train}
    if validation:
        tables["data"]["validation"] = validation
    if record.parent:
        tables["prompt"] = trial.experiment["prompt"] | {"init_from": f"{folder}/{record.parent}"}
    return {
        "run": trial.run,
        "owner": record.owner,
        "experiment": tables,
        "folder": f"{folder}/trials/{trial.run}",
        "keep_best": True,
    }


def _multipliers(record: JobRecord, server: Experiment) -> list[float]:
    """Factors of the server's learning rate, one for each of a job's trials: the one that the client gives, or several over the
    range of a search. Around a learning rate that depends on the base ("auto"), the range is as wide as that of a search."""
    given = record.method["supervised"]["hyperparameters"]
    multiplier, trials = given.get("learning_rate_multiplier", AUTO), given.get("trials", AUTO)
    if multiplier != AUTO:
        return [float(multiplier)]
    explicit = any(given.get(key, AUTO) != AUTO for key in ("n_epochs", "batch_size"))
    many = (1 if explicit else server.tuning.trials) if trials == AUTO else int(trials)
    if many == 1:
        return [1.0]
    low, high = server.search.learning_rate
    middle = math.sqrt(low * high) if server.train.learning_rate == "auto" else server.train.peak
    return [float(f"{low * (high / low) ** ((number + 0.5) / many) / middle:.4g}") for number in range(many)]


def _with_labels(
    record: JobRecord, server: Experiment, base: Base, train: str, validation: str | None, rows: int
) -> Experiment:
    """The experiment of a job whose labels are found in its rows, unless the client says what they are."""
    given = record.method["supervised"].get("labels", AUTO)
    plain = _experiment(record, server, train, validation, record.id, given)
    if (
        plain.data.is_chat
        and not plain.data.chat_template
        and recognised(plain.data)
        and chat_template_of(base.tokenizer) is None
    ):
        template: str | None = CONVERSATION
    else:
        template = None
    if given == AUTO:
        plain = _experiment(record, server, train, validation, record.id, AUTO, template)
        try:
            plain, _ = resolved(plain)
            labels = plain.data.labels or ()
            if len(labels) <= MOST_LABELS and rows >= ROWS_PER_LABEL * len(labels):
                return plain
        except DataError:
            pass  # free text; what else is wrong with the rows is found below
        given = "none"
    return _experiment(record, server, train, validation, record.id, given, template)


def _experiment(
    record: JobRecord,
    server: Experiment,
    train: str,
    validation: str | None,
    name: str,
    labels: Any,
    chat_template: str | None = None,
) -> Experiment:
    supervised = record.method["supervised"]
    given = supervised["hyperparameters"]
    defaults = server.model_dump(mode="json")
    prompt = {"length": server.prompt.length, "kind": server.prompt.kind, "init": "vocabulary"}
    prompt |= {key: given[name] for key, name in (("length", "prompt_length"), ("kind", "prompt_kind")) if name in given}
    prompt |= {key: given[key] for key in ("init", "init_text") if key in given}
    if record.parent:
        prompt |= {"init": "soft-prompt", "init_from": record.parent}
        prompt.pop("init_text", None)
    train_table = {key: defaults["train"][key] for key in KEPT} | {"seed": record.seed}
    if given.get("batch_size", AUTO) != AUTO:
        train_table["batch_size"] = given["batch_size"]
    if given.get("learning_rate_multiplier", AUTO) != AUTO:
        factor = server.train.learning_rate_multiplier * float(given["learning_rate_multiplier"])
        train_table["learning_rate_multiplier"] = factor  # checked like any other setting: the product may be 0
    if given.get("n_epochs", AUTO) != AUTO:
        train_table |= {"epochs": float(given["n_epochs"]), "steps": 0}
    if "objective" in given:
        train_table["objective"] = given["objective"]
    data = {"train": train, "validation": validation or VALIDATION, "split_seed": record.seed, **supervised.get("template", {})}
    data |= {"system": supervised["system"]} if "system" in supervised else {}
    data |= {"chat_template": chat_template} if chat_template else {}
    if labels not in (None, "none"):
        data["labels"] = labels
    tables = {"name": name, "prompt": prompt, "data": data, "train": train_table}
    tables |= {key: defaults[key] for key in ("model", "zero", "tracking", "compute", "search")}
    return parse_experiment(tables, "job")


def in_clients_words(error: UserError) -> JobRefused:
    """An error of the product with the names that a client of the API knows, without this machine's places."""
    message = re.sub(r"^(?:job|experiment): ", "", str(error))
    place = message.partition(":")[0]
    param = PARAMETERS.get(place, "training_file" if isinstance(error, DataError) or place.startswith("data.") else None)
    if param and place in PARAMETERS:
        message = param + message[len(place) :]
    return JobRefused(
        placeless(message), param or HYPERPARAMETERS, "invalid_training_file" if param == "training_file" else None
    )
