"""The experiment: one TOML file that determines a result. One table per topic, in the order in which data flows.

Reading it imports neither torch nor ray. Mistakes are reported before anything starts, as one sentence (`ExperimentError`) that
names the place and the fix.
"""

from __future__ import annotations

import glob
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError, field_validator, model_validator

from ptuning.errors import UserError, suggest
from ptuning.paths import is_path, locate
from ptuning.redaction import redact
from ptuning.settings.data import DataConfig
from ptuning.settings.fields import CLASSIFICATION_METRICS, GENERATION_METRICS, NAME, Metric, NonBlank, Table
from ptuning.settings.messages import sentence, takes_text
from ptuning.settings.model import ModelConfig, PromptConfig
from ptuning.settings.running import ComputeConfig, ServeConfig, TrackingConfig
from ptuning.settings.search import SearchConfig
from ptuning.settings.training import Objective, TrainConfig, ZeroConfig
from ptuning.settings.tuning import TuningConfig

PLACES = ("model.path", "prompt.init_from", "data.train", "data.validation", "data.test")
"""Settings that name a place. Two runs with the same content there are the same run, wherever it is."""


class ExperimentError(UserError):
    """The experiment file or an override is wrong."""


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
    tuning: TuningConfig = TuningConfig()
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
            raise ExperimentError(f"Experiment: {sentence(Experiment, error)}") from None

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
        labels = self.data.labels  # or that they are to be found
        if self.prompt.init == "labels" and not labels:
            raise ValueError('prompt.init: "labels" needs data.labels; list them or choose another init')
        for key, value in (("objective", self.train.objective == "choice"), ("class_weights", self.train.class_weights)):
            if value and not labels:
                raise ValueError(f"train.{key}: needs data.labels; list them")
        self._check_teacher()
        if self.train.text_weight not in ("auto", 0) and self.objective != "choice":
            raise ValueError(f'train.text_weight: has no effect with the objective "{self.objective}"; set it to 0')
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

    def _check_teacher(self) -> None:
        """Raises:
        ValueError: only one of the teacher and its objective is set, or what has no effect with them.
        """
        if self.train.objective == "distill" and not self.data.teacher:
            raise ValueError('train.objective: "distill" needs data.teacher, the text whose effect is learned; set it')
        if not self.data.teacher:
            return
        if self.objective != "distill":
            raise ValueError(f'data.teacher: has no effect with the objective "{self.objective}"; leave one of them out')
        if self.train.class_weights:
            raise ValueError("train.class_weights: has no effect on what a teacher says; leave it out")

    @property
    def objective(self) -> Objective:
        """The objective of training, "auto" resolved."""
        if self.train.objective == "auto":
            return "distill" if self.data.teacher else "choice" if self.data.labels else "text"
        return self.train.objective

    @property
    def chooses(self) -> bool:
        """Training compares labels, not all tokens of the vocabulary."""
        return self.objective == "choice" or (self.objective == "distill" and bool(self.data.labels))

    @property
    def metric(self) -> Metric:
        """The validation metric that selects the best step."""
        usual: Metric = "accuracy" if self.data.labels and self.objective != "distill" else "loss"
        return self.train.metric or usual


def read_experiment(path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """Read an experiment file and apply overrides `key=value` with dotted keys.

    Raises:
        ExperimentError: the file, an override or the experiment as a whole is wrong.
    """
    return with_texts(read_settings(path, overrides))


def read_settings(path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """As `read_experiment`, but a text that is in a file is still the name of the file.

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
    return changed_experiment(tables, overrides, str(path), path.parent)


def changed_experiment(tables: dict[str, Any], overrides: Sequence[str], source: str, folder: str | Path = ".") -> Experiment:
    """The experiment of plain tables, which are changed by overrides. `source` names them in messages; files that are not in
    the working folder may be in `folder`.

    Raises:
        ExperimentError: an override or the experiment as a whole is wrong.
    """
    for override in overrides:
        _apply(tables, override)
    experiment, folder = parse_experiment(tables, source), Path(folder)
    found = {split: _beside(source, folder) for split, source in experiment.data.sources()}
    for key, file in (("chat_template", experiment.data.chat_template_file), ("teacher", experiment.data.teacher_file)):
        if file:
            found[key] = _beside(file, folder)
    return experiment.model_copy(update={"data": experiment.data.model_copy(update=found)})


def with_texts(experiment: Experiment) -> Experiment:
    """The experiment with the text of `data.teacher`, if that names a file: the text is a part of it, the file is not.

    Raises:
        ExperimentError: there is no such file, or it is not a text.
    """
    given = experiment.data.teacher_file
    if given is None:
        return experiment
    try:
        text = locate(given).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ExperimentError(f"data.teacher: {given} cannot be read ({reason}); give a text, or a file with one") from None
    if not text.strip():
        raise ExperimentError(f"data.teacher: {given} is empty; write the text into it")
    return experiment.model_copy(update={"data": experiment.data.model_copy(update={"teacher": text})})


def _beside(source: str | Sequence[str], folder: Path) -> str | tuple[str, ...]:
    """A source of rows, with paths that are not in the working folder but beside the experiment file."""
    if not isinstance(source, str):
        return tuple(str(_beside(each, folder)) for each in source)
    path = Path(source)
    if not is_path(source) or source.startswith("~") or path.is_absolute() or _exists(path) or not _exists(folder / path):
        return source
    return str(folder / path)


def _exists(path: Path) -> bool:
    return path.exists() or (glob.has_magic(str(path)) and bool(glob.glob(str(path), recursive=True)))


def parse_experiment(tables: dict[str, Any], source: str = "experiment") -> Experiment:
    """Validate plain tables; `source` names them in messages."""
    try:
        return Experiment.model_validate(tables)
    except ValidationError as error:
        raise ExperimentError(f"{source}: {sentence(Experiment, error)}") from None


def parse_value(text: str) -> Any:
    """The value of key=value on a command line."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text  # a bare word is a string: the shell has removed the quotes


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
    value = parse_value(text)
    if not isinstance(value, str) and takes_text(Experiment, keys):
        value = text  # a name or a revision may look like a number or a date, for example 7e12345
    table = tables
    for part in keys[:-1]:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise ExperimentError(f"override {override!r}: {part} is not a table; write, for example, train.steps=100")
    table[keys[-1]] = value
