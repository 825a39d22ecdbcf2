"""The experiment: one TOML file that determines a result. One table per topic, in the order in which data flows.

Reading it imports neither torch nor ray. Mistakes are reported before anything starts, as one sentence (`ExperimentError`) that
names the place and the fix.
"""

from __future__ import annotations

import re
import string
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ptuning.errors import UserError, suggest
from ptuning.redaction import redact

NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,62}[A-Za-z0-9])?")
"""Names of experiments, runs and soft prompts: safe as a folder name, a registry entry and a model id."""

EMPTY = "is empty (an unset shell variable?); give it a value, or leave it out"
"""The message for a blank setting or command-line option that needs a value."""


def _non_blank(text: str) -> str:
    if not text.strip():
        raise ValueError(EMPTY)
    return text


NonBlank = Annotated[str, AfterValidator(_non_blank)]
"""A path, address, URI or name. A blank one could be taken for the working folder or `/`."""

Init = Literal["random", "vocabulary", "text", "labels", "soft-prompt"]

Metric = Literal["loss", "accuracy", "macro_f1", "exact_match", "token_f1", "rouge_l", "bleu"]

Share = Annotated[float, Field(ge=0, lt=1, strict=True)]

Positive = Annotated[int, Field(gt=0, strict=True)]

Count = Annotated[int, Field(ge=0, strict=True)]

PositiveNumber = Annotated[float, Field(gt=0, strict=True)]

Number = Annotated[float, Field(ge=0, strict=True)]

CLASSIFICATION_METRICS: tuple[Metric, ...] = ("loss", "accuracy", "macro_f1")

GENERATION_METRICS: tuple[Metric, ...] = ("loss", "exact_match", "token_f1", "rouge_l", "bleu")

MARGIN = 0.01
"""How much worse than the champion's a metric may be: absolute for accuracies and other scores, relative for losses."""


class ExperimentError(UserError):
    """The experiment file or an override is wrong."""


class Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, strict=False)


class ModelConfig(Table):
    """The frozen base."""

    path: NonBlank = "builtin"
    """"builtin", a Hugging Face id, or a folder."""
    revision: NonBlank | None = None
    """Commit, tag or branch of a Hugging Face id."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 for a base mostly stored in 16 bits or fewer if the hardware supports bfloat16, else float32."""
    trust_remote_code: bool = False
    """Run Python code that ships with the base. Only for bases whose authors you trust with this machine."""


class PromptConfig(Table):
    """The soft prompt's length and initialisation."""

    length: Positive = 20
    """Virtual tokens (P)."""
    init: Init = "vocabulary"
    """random: normal, with the standard deviation of the base's embeddings; vocabulary: embeddings of frequent tokens; text:
    embeddings of init_text; labels: embeddings of the label words (Lester et al. 2021, section 3.2); soft-prompt: copied from
    init_from (SPoT, Vu et al. 2022)."""
    init_text: NonBlank | None = None
    """Text for init = "text"; repeated or truncated to the length."""
    init_from: NonBlank | None = None
    """For init = "soft-prompt": the folder of a soft prompt, or name@alias in the registry."""

    @model_validator(mode="after")
    def _init_has_its_source(self) -> PromptConfig:
        for init, key in (("text", "init_text"), ("soft-prompt", "init_from")):
            value = getattr(self, key)
            if self.init == init and not value:
                raise ValueError(f'{key}: init = "{init}" needs it; set prompt.{key}')
            if self.init != init and value is not None:
                raise ValueError(f'{key}: is only used with init = "{init}"; set prompt.init = "{init}" or remove it')
        return self


class Template(Table):
    """How a row becomes text. Stored in the card: training, evaluation and serving see the same tokens."""

    input: str
    """Text before the target, with fields of the row in braces: "Message: {text}\\nLabel:"."""
    target: str
    """Text to predict, for example " {label}". The end token is appended."""
    labels: tuple[str, ...] | None = None
    """All labels of a classification task. Without labels the target is free text."""
    max_tokens: Positive | None = None
    """Maximum tokens of input + target. Default: the base's context minus the soft prompt."""
    truncate: Literal["left", "right", "error"] = "right"
    """How an input that is too long is shortened: its longest field is truncated on this side, the template's own words stay;
    error: the row is refused (a training row is dropped)."""

    @field_validator("input", "target")
    @classmethod
    def _fields_are_plain_names(cls, template: str) -> str:
        template_fields(template)
        return template

    @model_validator(mode="after")
    def _labels_fit_the_target(self) -> Template:
        if self.labels is None:
            if not template_fields(self.target):
                raise ValueError('target: contains no field of the row; write, for example, " {label}"')
            return self
        if len(template_fields(self.target)) != 1:
            raise ValueError('target: must contain exactly one field if there are labels; write, for example, " {label}"')
        if len(self.labels) < 2:
            raise ValueError("labels: has fewer than two labels; list at least two")
        twins = sorted({label for label in self.labels if self.labels.count(label) > 1})
        if twins:
            raise ValueError(f"labels: {twins[0]!r} is listed twice; list each label once")
        return self


class DataConfig(Template):
    """The task. A split is a file (.jsonl, .csv, .parquet), "hub:org/name:split", or "builtin:task/split"."""

    train: NonBlank
    """Rows to train on."""
    validation: NonBlank | None = None
    """Rows that select the best step. Without them the last step is kept."""
    test: NonBlank | None = None
    """Rows on which the best soft prompt is evaluated once, at the end."""


TEXT_WEIGHT = 0.3
"""Measured (BENCHMARKS.md, "Labels as a choice"): it raises the accuracy of one-token labels and makes free generation produce
them."""


class TrainConfig(Table):
    """Training of one soft prompt."""

    objective: Literal["auto", "choice", "text"] = "auto"
    """choice: cross-entropy over the labels, as evaluation and serving read them; text: cross-entropy of every target token
    over the whole vocabulary, as in PEFT; auto: choice if there are labels, else text."""
    text_weight: Annotated[float, Field(ge=0, le=1, strict=True)] | Literal["auto"] = "auto"
    """With objective = "choice": weight of an additional text objective. It makes unconstrained generation (PEFT's generate,
    merged checkpoints) produce the label, too. auto: 0.3 if every label is one token of the base, else 0, because learning to
    spell a label costs accuracy."""
    class_weights: Literal["balanced"] | None = None
    """balanced: every label has the same weight in the loss, regardless of its number of rows. The predicted probabilities then
    assume that all labels are equally frequent."""
    learning_rate: Annotated[float, Field(gt=0, le=1e30, strict=True)] = 0.1
    """Peak learning rate. AdamW needs 0.03 to 0.3 with labels and less for text, Adafactor about 0.3 (Lester et al. 2021)."""
    optimizer: Literal["adamw", "adafactor"] = "adamw"
    """Optimizer of the soft prompt; the base has none."""
    weight_decay: Number = 0.0
    """Decoupled weight decay of the soft prompt."""
    starts: Annotated[int, Field(gt=0, le=32, strict=True)] = 1
    """Number of initialisations (different seeds) that train side by side for the first fifth of the steps. The one that is
    best on the validation rows (without them: on the training rows) continues. In a search every trial has one."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Learning rate after the warm-up: constant, or falling to 0 at the last step."""
    warmup: Share = 0.05
    """Fraction of the steps in which the learning rate rises from 0."""
    batch_size: Positive = 16
    """Rows per step, summed over all workers."""
    micro_batch_size: Positive | None = None
    """Maximum rows per worker in one pass. A larger part of the batch is split into several passes. Default: one pass."""
    steps: Positive = 300
    """Optimizer updates. The learning-rate schedule ends at the last one."""
    evaluate_every: Positive = 50
    """Steps between evaluations on the validation rows."""
    patience: Positive | None = None
    """Stop after this many evaluations in a row without improvement."""
    metric: Metric | None = None
    """Validation metric that selects the best step. Default: accuracy if there are labels, else loss."""
    clip: Number = 1.0
    """Maximum gradient norm of a soft prompt; 0 disables clipping."""
    checkpoint_every: Positive = 20
    """Steps between checkpoints. A crash loses at most this many steps."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more compute."""
    seed: Count = 0
    """Seed of the initialisation and of the order of the rows."""

    def resolved_text_weight(self, target_tokens: int) -> float:
        """The weight of the text objective. `target_tokens`: tokens of the longest label, its end token included."""
        if self.text_weight == "auto":
            return TEXT_WEIGHT if target_tokens <= 2 else 0.0
        return self.text_weight


class ZeroConfig(Table):
    """How DeepSpeed ZeRO partitions the frozen base over the workers. All other DeepSpeed settings are derived."""

    stage: Literal[0, 3] = 3
    """3: the base is partitioned over the workers; 0: every worker holds the whole base."""
    offload: bool = False
    """Keep the partitions of the base in CPU memory (GPU workers only)."""
    live_parameters: Positive | None = None
    """Maximum parameters of the base that are gathered at once on a worker. Default: depends on the free memory."""
    persistent_below: Count = 10_000
    """Tensors with fewer elements than this (norms, biases) are not partitioned."""


class SearchConfig(Table):
    """The search over soft prompts."""

    trials: Positive = 16
    """Number of configurations to try."""
    length: tuple[Positive, ...] = (10, 20, 50, 100)
    """Values of prompt.length to choose from."""
    learning_rate: tuple[PositiveNumber, PositiveNumber] = (0.01, 1.0)
    """[low, high], sampled log-uniformly."""
    init: tuple[Init, ...] = ("random", "vocabulary")
    """Values of prompt.init to choose from."""
    space: dict[str, tuple[float, ...]] = {}
    """Further numeric settings of [train] to search: "train.warmup" = [low, high] is a range; three or more are choices."""
    slots: Positive | Literal["auto"] = "auto"
    """Soft prompts that train side by side over one base. auto: as many as fit into memory and raise the throughput."""
    groups: Positive = 1
    """Groups of workers. Each group loads a base of its own."""
    scheduler: Literal["asha", "fifo", "pbt"] = "asha"
    """asha: stop weak trials early; fifo: train every trial to the end; pbt: weak trials continue from strong ones."""
    algorithm: Literal["tpe", "random", "grid"] = "tpe"
    """How configurations are chosen."""
    finalists: Positive = 3
    """Number of best configurations that are trained again with several seeds."""
    seeds: Positive = 3
    """Seeds per finalist. The winner is the finalist with the best mean."""
    prefer_short: Number = 0.0
    """Bonus in units of the metric for halving the length: a shorter soft prompt is cheaper to serve."""
    seed: Count = 0
    """Seed of the search: it determines the configurations."""

    @field_validator("length", "init")
    @classmethod
    def _not_empty(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        if not values:
            raise ValueError("is empty; list at least one value")
        return values

    @field_validator("learning_rate")
    @classmethod
    def _low_to_high(cls, values: tuple[float, float]) -> tuple[float, float]:
        if not 0 < values[0] <= values[1]:
            raise ValueError(f"[{values[0]}, {values[1]}] is not a valid range; write [low, high] with 0 < low <= high")
        return values

    @field_validator("space", mode="before")
    @classmethod
    def _dotted(cls, tables: Any) -> Any:
        """`search.space.train.warmup=...` on the command line creates nested tables."""
        if not isinstance(tables, dict):
            return tables
        flat: dict[str, Any] = {}
        for key, value in tables.items():
            flat |= {f"{key}.{name}": inner for name, inner in value.items()} if isinstance(value, dict) else {key: value}
        return flat

    @field_validator("space")
    @classmethod
    def _numeric_fields(cls, space: dict[str, tuple[float, ...]]) -> dict[str, tuple[float, ...]]:
        for key, values in space.items():
            table, _, name = key.partition(".")
            known = SEARCHABLE.get(table, {})
            if name not in known:
                names = sorted(f"{table}.{name}" for table, fields in SEARCHABLE.items() for name in fields)
                fix = suggest(key, names, f"use one of {', '.join(names)}")
                raise ValueError(f"{key!r} is not a searchable number; {fix}")
            if len(values) < 2 or (len(values) == 2 and values[0] >= values[1]):
                raise ValueError(
                    f'"{key}" = {list(values)} is not a valid range; write [low, high] with low < high, or three or more values'
                )
            for value in values:
                try:
                    known[name].model_validate({name: int(value) if is_whole(key) and value == int(value) else value})
                except ValidationError as error:
                    message = error.errors()[0]["msg"]
                    raise ValueError(f'"{key}": {message[0].lower()}{message[1:]} (got {value:g}); change the range') from None
        return space

    def __hash__(self) -> int:
        return hash(self.model_dump_json())  # the space is a dict


SEARCHABLE: dict[str, dict[str, type[Table]]] = {
    "train": dict.fromkeys(("weight_decay", "warmup", "batch_size", "patience", "clip", "text_weight"), TrainConfig),
}
"""Numeric settings that `search.space` may contain. Length and learning rate have keys of their own; steps are the budget."""


def is_whole(key: str) -> bool:
    """True if a searchable setting accepts only whole numbers."""
    return key in ("train.batch_size", "train.patience")


class ServeConfig(Table):
    """The server."""

    host: NonBlank = "127.0.0.1"
    """Address to listen on. Any address but loopback requires API keys."""
    port: Annotated[int, Field(ge=0, le=65535, strict=True)] = 8000
    """Port of the API."""
    keys: NonBlank | None = None
    """File with one API key per line, "KEY" or "KEY admin". Default: the variable PTUNING_API_KEYS (comma-separated)."""
    soft_prompts: tuple[NonBlank, ...] = ()
    """Registered names to serve. Empty: every soft prompt trained for this base."""
    refresh_s: PositiveNumber = 2.0
    """Seconds between two checks of the registry: the maximum delay until a replica serves a promoted version."""
    replicas: Positive | tuple[Positive, Positive] = 1
    """Number of replicas, each with its own copy of the base; [min, max] scales with the number of requests."""
    cpus_per_replica: PositiveNumber = 1.0
    """CPU cores per replica."""
    gpus_per_replica: Number = 0.0
    """With a fraction several replicas share a GPU."""
    running: Positive = 32
    """Maximum requests in one batch of a replica."""
    waiting: Positive = 256
    """Maximum requests that wait in a replica. Further ones are answered with 429."""
    cache_mb: Positive = 512
    """Size of a replica's key-value cache in MB."""
    max_new_tokens: Positive = 1024
    """Maximum tokens of one answer."""
    max_answers: Positive = 16
    """Maximum answers to one request: n times the number of prompts. Texts to classify are limited by `waiting` instead."""
    max_body_kb: Positive = 1024
    """Maximum size of a request body in KiB. Larger ones are answered with 413."""
    deadline_s: PositiveNumber = 120.0
    """Seconds after which an answer is aborted. Clients cannot extend it."""
    drain_s: PositiveNumber = 30.0
    """Seconds that a stopping replica waits for requests in flight."""

    @field_validator("replicas")
    @classmethod
    def _min_to_max(cls, replicas: int | tuple[int, int]) -> int | tuple[int, int]:
        if isinstance(replicas, tuple) and replicas[0] > replicas[1]:
            raise ValueError(f"[{replicas[0]}, {replicas[1]}] is not a valid range; write [min, max] with min <= max")
        return replicas


class TrackingConfig(Table):
    """MLflow."""

    uri: NonBlank | None = None
    """Tracking server or database. Default: SQLite in the storage folder."""
    experiment: NonBlank = "ptuning"
    """MLflow experiment that the runs belong to."""


class ComputeConfig(Table):
    """Workers and storage."""

    workers: Positive | tuple[Positive, Positive] = 1
    """Data-parallel workers; [min, max]: as many as the cluster has resources for."""
    cpus_per_worker: PositiveNumber | None = None
    """Default: the machine's cores divided by the number of workers, at least 1 (on a cluster: 1)."""
    gpus_per_worker: Number | None = None
    """Default: 1 if the cluster has GPUs, else 0."""
    storage: NonBlank = "runs"
    """Folder or s3://bucket/folder for checkpoints, soft prompts and, by default, the tracking store."""
    address: NonBlank | None = None
    """Ray cluster to connect to. Default: RAY_ADDRESS, else a cluster on this machine that ends with the command."""
    max_failures: Count = 3
    """Maximum worker failures of a run. Each restart continues from the newest checkpoint; one failure more fails the run."""
    hang_s: PositiveNumber | None = None
    """Seconds without progress after which hung workers are restarted. Default: 20 times the longest step, at least 60."""

    @field_validator("workers")
    @classmethod
    def _min_to_max(cls, workers: int | tuple[int, int]) -> int | tuple[int, int]:
        if isinstance(workers, tuple) and workers[0] > workers[1]:
            raise ValueError(f"[{workers[0]}, {workers[1]}] is not a valid range; write [min, max] with min <= max")
        return workers

    @property
    def most_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[1]


class Experiment(Table):
    """Everything that determines a result."""

    name: NonBlank
    """Name of the run and of its folder in the storage."""
    model: ModelConfig = ModelConfig()
    prompt: PromptConfig = PromptConfig()
    data: DataConfig
    train: TrainConfig = TrainConfig()
    zero: ZeroConfig = ZeroConfig()
    search: SearchConfig = SearchConfig()
    serve: ServeConfig = ServeConfig()
    tracking: TrackingConfig = TrackingConfig()
    compute: ComputeConfig = ComputeConfig()

    def __init__(self, **tables: Any) -> None:
        """Make an experiment in Python: `Experiment(name="a", data={"train": ..., "input": ..., "target": ...})`.

        Raises:
            ExperimentError: something is wrong with it.
        """
        try:
            super().__init__(**tables)
        except ValidationError as error:
            raise ExperimentError(f"Experiment: {_sentence(error)}") from None

    # pydantic's own mark (2.12, main.py): `model_validate` does not come through here, so a file's errors name the file.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @classmethod
    def load(cls, path: str | Path, *overrides: str) -> Experiment:
        """Read an experiment file (TOML) and apply overrides, such as "train.steps=100".

        Raises:
            ExperimentError: something is wrong with the file, an override or the experiment as a whole.
        """
        return read_experiment(path, overrides)

    @field_validator("name")
    @classmethod
    def _safe_name(cls, name: str) -> str:
        if not NAME.fullmatch(name):
            raise ValueError(f"{name!r} is not a valid name; use at most 64 letters, digits, '-', '_' and '.', no slashes")
        return name

    @model_validator(mode="after")
    def _fits_together(self) -> Experiment:
        labels = self.data.labels
        if self.prompt.init == "labels" and not labels:
            raise ValueError('prompt.init: "labels" needs data.labels; list them or choose another init')
        for key, value in (("objective", self.train.objective == "choice"), ("class_weights", self.train.class_weights)):
            if value and not labels:
                raise ValueError(f"train.{key}: needs data.labels; list them")
        if self.train.text_weight not in ("auto", 0) and self.objective == "text":
            raise ValueError('train.text_weight: has no effect with the objective "text"; set it to 0')
        allowed = CLASSIFICATION_METRICS if labels else GENERATION_METRICS
        if self.train.metric not in (None, *allowed):
            task = "classification" if labels else "generation"
            raise ValueError(
                f'train.metric: "{self.train.metric}" is not measured on a {task} task; use one of {", ".join(allowed)}'
            )
        if self.train.patience and not self.data.validation:
            raise ValueError("train.patience: needs validation rows; set data.validation or remove train.patience")
        if self.train.batch_size < self.compute.most_workers:
            raise ValueError(
                f"train.batch_size: {self.train.batch_size} rows cannot be split over {self.compute.most_workers} workers; "
                "raise it or lower compute.workers"
            )
        return self

    @property
    def objective(self) -> Literal["choice", "text"]:
        """The objective of training, "auto" resolved."""
        if self.train.objective == "auto":
            return "choice" if self.data.labels else "text"
        return self.train.objective

    @property
    def metric(self) -> Metric:
        """The validation metric that selects the best step."""
        return self.train.metric or ("accuracy" if self.data.labels else "loss")


def template_fields(template: str) -> list[str]:
    """The fields of a template in order of appearance, each once.

    Raises:
        ValueError: unbalanced braces, or anything but a plain name between them.
    """
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"{template!r} is not a valid template ({error}); write literal braces as {{{{ and }}}}") from None
    fields: dict[str, None] = {}
    for _, name, spec, conversion in parts:
        if name is None:
            continue
        if not name.isidentifier() or spec or conversion:
            raise ValueError(f"{template!r}: {{{name}}} is not a plain field name; write literal braces as {{{{ and }}}}")
        fields[name] = None
    return list(fields)


def read_experiment(path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """Read an experiment file and apply overrides `key=value` with dotted keys.

    Raises:
        ExperimentError: the file, an override or the experiment as a whole is wrong.
    """
    path = Path(path)
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        there = {file.name: str(file) for folder in (Path("jobs"), path.parent) for file in sorted(folder.glob("*.toml"))}
        fix = suggest(path.name, there, "give the path of an experiment file (.toml)", alike=0.75, shown=there.__getitem__)
        raise ExperimentError(f"{path}: no such file; {fix}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ExperimentError(f"{path}: cannot be read ({error}); give a TOML file") from None
    except tomllib.TOMLDecodeError as error:
        raise ExperimentError(f"{path}: is not valid TOML ({error}); correct the file") from None
    for override in overrides:
        _apply(tables, override)
    return parse_experiment(tables, str(path))


def parse_experiment(tables: dict[str, Any], source: str = "experiment") -> Experiment:
    """Validate plain tables; `source` names them in messages."""
    try:
        return Experiment.model_validate(tables)
    except ValidationError as error:
        raise ExperimentError(f"{source}: {_sentence(error)}") from None


def _apply(tables: dict[str, Any], override: str) -> None:
    if redact(override) != override:
        raise ExperimentError(
            f"override {redact(override)}: contains a password, which other users of this machine and readers of Ray's logs "
            "can see; write it into the experiment file, or set the service's own environment variable"
        )
    key, equals, text = override.partition("=")
    keys = key.strip().split(".")
    if not equals or not all(keys):
        raise ExperimentError(f"override {override!r}: write key=value, for example train.learning_rate=0.1")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string: the shell has removed the quotes
    if not isinstance(value, str) and _takes_text(keys):
        value = text  # a name or a revision may look like a number or a date, for example 7e12345
    table = tables
    for part in keys[:-1]:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise ExperimentError(f"override {override!r}: {part} is not a table; write, for example, train.steps=100")
    table[keys[-1]] = value


def _sentence(error: ValidationError) -> str:
    """The first problem of a validation as `table.key: problem; fix`."""
    problem, *others = error.errors()
    where: list[str] = []
    for part in problem["loc"]:  # after the keys come list indices and names of union branches
        if part not in _known_keys(where):
            break
        where.append(str(part))
    path = ".".join(where)
    if problem["type"] == "extra_forbidden":
        key, known = str(problem["loc"][-1]), _known_keys(where)
        fix = suggest(key, known, f"known here: {', '.join(sorted(known))}", shown=lambda name: ".".join([*where, name]))
        return f"{'.'.join([*where, key])}: unknown key; {fix}"
    if problem["type"] == "missing" and isinstance(problem["loc"][-1], str):
        return f"{path}: is missing; set it"
    if problem["type"] == "model_type":
        return f"{path}: is not a table (got {problem['input']!r}); write [{path}] and its keys below it"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        # Validators of a whole table name the key themselves: "key: ...".
        return f"{path}{'.' if path and re.match(r'[a-z_.]+: ', message) else ': ' if path else ''}{message}"
    # In a union of "auto" and numbers, "auto" is a branch of its own with an error of its own.
    words = [each for each in others if each["loc"][:-1] == problem["loc"][:-1] and each["type"] == "literal_error"]
    message += "".join(f" or {each['ctx']['expected']}" for each in words)
    expected = [each["ctx"]["expected"] for each in (problem, *words) if each["type"] == "literal_error"]
    choices = re.findall(r"'(.+?)'", " ".join(expected))
    fix = suggest(str(problem["input"]), choices, "change the value", shown=quoted)
    return f"{path}: {message[0].lower()}{message[1:]} (got {problem['input']!r}); {fix}"


def quoted(name: str) -> str:
    """A name in TOML quotes. The name must not contain quotes."""
    return f'"{name}"'


def _known_keys(tables: Sequence[str]) -> list[str]:
    table = _table(tables)
    return list(table.model_fields) if table else []


def _takes_text(keys: Sequence[str]) -> bool:
    table = _table(keys[:-1])
    field = table.model_fields.get(keys[-1]) if table else None
    return field is not None and field.annotation in (str, NonBlank, str | None, NonBlank | None)


def _table(tables: Sequence[str]) -> type[BaseModel] | None:
    """The class of a table, or None if there is no such table."""
    table: type[BaseModel] = Experiment
    for name in tables:
        field = table.model_fields.get(name)
        if field is None or not isinstance(field.annotation, type) or not issubclass(field.annotation, BaseModel):
            return None
        table = field.annotation
    return table
