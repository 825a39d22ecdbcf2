"""The experiment file: what it means, and the exact sentence for everything that can be wrong with it."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from ptuning.config import Experiment, ExperimentError, parse_experiment, read_experiment
from ptuning.errors import UserError
from ptuning.settings.data import DataConfig
from ptuning.settings.fields import NAME
from ptuning.settings.foreign_keys import ADVICE, RENAMED, TABLES
from ptuning.settings.template import template_fields

pytestmark = pytest.mark.fast

SMALLEST: dict[str, Any] = {"name": "x", "data": {"train": "a.jsonl", "input": "{text}", "target": " {label}"}}
TOML = """
name = "x"
[data]
train = "a.jsonl"
input = "Message: {text}\\nLabel:"
target = " {label}"
[train]
steps = 10
"""


def tables(**changes: Any) -> dict[str, Any]:
    """The smallest experiment with changes, as `train__steps=3`."""
    result = copy.deepcopy(SMALLEST)
    for key, value in changes.items():
        *path, last = key.split("__")
        table = result
        for part in path:
            table = table.setdefault(part, {})
        table[last] = value
    return result


def sentence(call) -> str:
    with pytest.raises(ExperimentError) as error:
        call()
    assert isinstance(error.value, UserError) and isinstance(error.value, ValueError)
    return str(error.value)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "e.toml"
    path.write_text(TOML, encoding="utf-8")
    return path


def test_the_smallest_experiment_has_every_default():
    experiment = parse_experiment(SMALLEST)
    assert experiment.model.path == "builtin"
    assert experiment.prompt.length == 20
    assert experiment.zero.stage == "auto"
    assert experiment.compute.workers is None and experiment.compute.most_workers == 1
    assert experiment.metric == "loss"
    assert parse_experiment(tables(data__labels=["a", "b"])).metric == "accuracy"
    assert parse_experiment(tables(data__labels=["a", "b"], train__metric="macro_f1")).metric == "macro_f1"
    assert parse_experiment(tables(compute__workers=[2, 4])).compute.most_workers == 4


def test_every_field_of_the_file_is_described():
    """What `ptuning config --schema` prints is the reference of the file."""
    schema = Experiment.model_json_schema()
    undescribed = [
        f"{name}.{key}"
        for name, table in schema["$defs"].items()
        if name in ("ModelConfig", "DataConfig", "ComputeConfig", "ZeroConfig", "TrackingConfig")
        for key, field in table["properties"].items()
        if "description" not in field
    ]
    assert undescribed == []


def test_it_is_frozen():
    experiment = parse_experiment(SMALLEST)
    for table, key, value in (
        (experiment, "name", "y"),
        (experiment.train, "steps", 5),
        (experiment.data, "train", "b"),
    ):
        with pytest.raises(ValidationError, match="Instance is frozen"):
            setattr(table, key, value)
    hash(experiment)


# Wrong experiments ---------------------------------------------------------------------------------------------------

WRONG = [
    # Unknown keys.
    ({"train__lerning_rate": 1}, "train.lerning_rate: unknown key; did you mean train.learning_rate?"),
    ({"data__inptu": "a"}, "data.inptu: unknown key; did you mean data.input?"),
    ({"Name": "x"}, "Name: unknown key; did you mean name?"),
    ({"train__STEPS": 1}, "train.STEPS: unknown key; did you mean train.steps?"),
    (
        {"foo": 1},
        "foo: unknown key; known here: compute, data, model, name, prompt, search, serve, tracking, train, tuning, zero",
    ),
    ({"model__lr2": 1}, "model.lr2: unknown key; known here: dtype, path, quantization, revision, trust_remote_code"),
    # Keys of other tools and of other tables.
    ({"train__lr": 1}, "train.lr: unknown key; did you mean train.learning_rate?"),
    ({"lr": 1}, "lr: unknown key; did you mean train.learning_rate?"),
    ({"prompt__steps": 3}, "prompt.steps: unknown key; did you mean train.steps?"),
    ({"model__learning_rate": 1}, "model.learning_rate: unknown key; did you mean train.learning_rate?"),
    ({"seed": 1}, "seed: unknown key; did you mean train.seed?"),
    ({"epochs": 3}, "epochs: unknown key; did you mean train.epochs?"),
    ({"train__num_train_epochs": 3}, "train.num_train_epochs: unknown key; did you mean train.epochs?"),
    ({"num_virtual_tokens": 8}, "num_virtual_tokens: unknown key; did you mean prompt.length?"),
    ({"train__save_steps": 5}, "train.save_steps: unknown key; did you mean train.checkpoint_every?"),
    ({"train__eval_steps": 5}, "train.eval_steps: unknown key; did you mean train.evaluate_every?"),
    ({"train__warmup_steps": 5}, "train.warmup_steps: unknown key; write train.warmup, a fraction of the steps"),
    (
        {"train__per_device_train_batch_size": 5},
        "train.per_device_train_batch_size: unknown key; write train.batch_size, the rows of a step summed over all workers",
    ),
    (
        {"train__gradientAccumulationSteps": 5},
        "train.gradientAccumulationSteps: unknown key; write train.micro_batch_size, the rows of one pass on a worker",
    ),
    ({"data__max_seq_length": 5}, "data.max_seq_length: unknown key; did you mean data.max_tokens?"),
    (
        {"data__text_column": "x"},
        'data.text_column: unknown key; write the column in braces in data.input, for example "{text}"',
    ),
    (
        {"data__label_column": "x"},
        'data.label_column: unknown key; write the column in braces in data.target, for example " {label}"',
    ),
    ({"output_dir": "x"}, "output_dir: unknown key; did you mean compute.storage?"),
    ({"model__model_name_or_path": "x"}, "model.model_name_or_path: unknown key; did you mean model.path?"),
    ({"compute__num_workers": 2}, "compute.num_workers: unknown key; did you mean compute.workers?"),
    ({"compute__gpus": 2}, "compute.gpus: unknown key; write compute.workers and compute.gpus_per_worker"),
    ({"train__scheduler": "x"}, "train.scheduler: unknown key; did you mean train.schedule?"),
    ({"training": {"steps": 3}}, "training: unknown key; did you mean [train]?"),
    # Lists.
    ({"search__length": 20}, "search.length: is not a list (got 20); write a list: [20]"),
    ({"search__init": "random"}, "search.init: is not a list (got 'random'); write a list: [\"random\"]"),
    ({"search__learning_rate": 0.1}, "search.learning_rate: is not a list (got 0.1); write a list: [0.1]"),
    ({"data__labels": "ham, spam"}, 'data.labels: is not a list (got \'ham, spam\'); write a list: ["ham", "spam"]'),
    # Values.
    ({"name": "a/b"}, "name: 'a/b' is not a valid name; use at most 64 letters, digits, '-', '_' and '.', no slashes"),
    ({"name": ".."}, "name: '..' is not a valid name; use at most 64 letters, digits, '-', '_' and '.', no slashes"),
    ({"name": 3}, "name: input should be a valid string (got 3); change the value"),
    ({"tracking": 3}, "tracking: is not a table (got 3); write [tracking] and its keys below it"),
    ({"train__learning_rate": -1}, "train.learning_rate: input should be greater than 0 or 'auto' (got -1); change the value"),
    ({"train__learning_rate": 0}, "train.learning_rate: input should be greater than 0 or 'auto' (got 0); change the value"),
    (
        {"train__learning_rate": "x"},
        "train.learning_rate: input should be a valid number or 'auto' (got 'x'); change the value",
    ),
    (
        {"train__learning_rate": float("nan")},
        "train.learning_rate: input should be a finite number or 'auto' (got nan); change the value",
    ),
    ({"train__steps": 2.5}, "train.steps: input should be a valid integer (got 2.5); change the value"),
    ({"train__steps": "20"}, "train.steps: input should be a valid integer (got '20'); change the value"),
    ({"train__steps": True}, "train.steps: input should be a valid integer (got True); change the value"),
    ({"train__steps": {"a": 1}}, "train.steps: input should be a valid integer (got {'a': 1}); change the value"),
    ({"train__warmup": 2}, "train.warmup: input should be less than 1 (got 2); change the value"),
    ({"train__clip": -1}, "train.clip: input should be greater than or equal to 0 (got -1); change the value"),
    ({"prompt__length": 0}, "prompt.length: input should be greater than 0 (got 0); change the value"),
    (
        {"prompt__init": "lables"},
        "prompt.init: input should be 'random', 'vocabulary', 'text', 'labels' or 'soft-prompt' (got 'lables'); "
        'did you mean "labels"?',
    ),
    ({"zero__stage": 2}, "zero.stage: input should be 'auto', 0 or 3 (got 2); change the value"),
    ({"serve__port": 99999}, "serve.port: input should be less than or equal to 65535 (got 99999); change the value"),
    ({"compute__workers": 0}, "compute.workers: input should be greater than 0 (got 0); change the value"),
    (
        {"compute__gpus_per_worker": 2},
        "compute.gpus_per_worker: input should be less than or equal to 1 (got 2); change the value",
    ),
    ({"compute__gpus_per_worker": 0.5}, "compute.gpus_per_worker: input should be a valid integer (got 0.5); change the value"),
    ({"compute__workers": "a"}, "compute.workers: input should be a valid integer (got 'a'); change the value"),
    ({"compute__workers": [3, 1]}, "compute.workers: [3, 1] is not a valid range; write [min, max] with min <= max"),
    ({"search__length": []}, "search.length: is empty; list at least one value"),
    ({"search__length": [5, 0]}, "search.length: input should be greater than 0 (got 0); change the value"),
    (
        {"search__slots": "atuo"},
        """search.slots: input should be a valid integer or 'auto' (got 'atuo'); did you mean "auto"?""",
    ),
    ({"search__slots": "many"}, "search.slots: input should be a valid integer or 'auto' (got 'many'); change the value"),
    (
        {"search__learning_rate": [1, 0.1]},
        "search.learning_rate: [1.0, 0.1] is not a valid range; write [low, high] with 0 < low <= high",
    ),
    # Templates and labels.
    (
        {"data__input": "{a"},
        "data.input: '{a': the { at character 1 has no partner; write literal braces as {{ and }}",
    ),
    ({"data__input": "a}"}, "data.input: 'a}': the } at character 2 has no partner; write literal braces as {{ and }}"),
    ({"data__input": "{}"}, "data.input: '{}': {} contains no column name; write literal braces as {{ and }}"),
    ({"data__target": "x"}, 'data.target: contains no field of the row; write, for example, " {label}"'),
    (
        {"data__target": "{a} {b}", "data__labels": ["a", "b"]},
        'data.target: must contain exactly one field if there are labels; write, for example, " {label}"',
    ),
    ({"data__labels": ["a"]}, "data.labels: has fewer than two labels; list at least two"),
    ({"data__labels": ["a", "b", "a"]}, "data.labels: 'a' is listed twice; list each label once"),
    # Keys that do not go together.
    ({"prompt__init": "text"}, 'prompt.init_text: init = "text" needs it; set prompt.init_text'),
    ({"prompt__init": "soft-prompt"}, 'prompt.init_from: init = "soft-prompt" needs it; set prompt.init_from'),
    (
        {"prompt__init_text": "a"},
        'prompt.init_text: is only used with init = "text"; set prompt.init = "text" or remove it',
    ),
    ({"prompt__init": "labels"}, 'prompt.init: "labels" needs data.labels; list them or choose another init'),
    (
        {"train__metric": "accuracy"},
        'train.metric: "accuracy" is not measured on a generation task; use one of loss, exact_match, token_f1, rouge_l, bleu',
    ),
    (
        {"train__metric": "bleu", "data__labels": ["a", "b"]},
        'train.metric: "bleu" is not measured on a classification task; use one of loss, accuracy, macro_f1',
    ),
    ({"train__patience": 2}, "train.patience: needs validation rows; set data.validation or remove train.patience"),
    (
        {"train__batch_size": 2, "compute__workers": [1, 3]},
        "train.batch_size: 2 rows cannot be split over 3 workers; raise it or lower compute.workers",
    ),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[str(changes) for changes, _ in WRONG])
def test_a_wrong_experiment_is_one_sentence(changes, message):
    assert sentence(lambda: parse_experiment(tables(**changes), "e.toml")) == f"e.toml: {message}"


@pytest.mark.parametrize(
    ("plain", "message"),
    [
        ({"name": "x"}, "e.toml: data: is missing; set it"),
        ({"name": "x", "data": {}}, "e.toml: data.train: is missing; set it"),
        ({"data": SMALLEST["data"]}, "e.toml: name: is missing; set it"),
    ],
)
def test_a_missing_key_is_named(plain, message):
    assert sentence(lambda: parse_experiment(plain, "e.toml")) == message


def test_every_answer_names_a_key_that_exists():
    known = {f"{table}.{key}" for table in Experiment.model_fields for key in _keys(Experiment, [table])} | {"name"}
    assert set(RENAMED.values()) <= known
    written = {key for fix in ADVICE.values() for key in re.findall(r"[a-z]+\.[a-z_]+", fix)}
    assert written <= known and set(TABLES.values()) <= set(Experiment.model_fields)


def _keys(root: type[BaseModel], path: list[str]) -> list[str]:
    kind = root.model_fields[path[0]].annotation
    return list(kind.model_fields) if isinstance(kind, type) and issubclass(kind, BaseModel) else []


keys = st.text(st.characters(exclude_characters="."), min_size=1, max_size=12)
table_names = st.sampled_from([name for name in Experiment.model_fields if name != "name"])


@given(table_names, keys, st.one_of(st.integers(), st.text(max_size=5), st.lists(st.integers(), max_size=2)))
def test_any_unknown_key_is_named_with_its_path(table, key, value):
    if key in Experiment.model_fields[table].annotation.model_fields:
        return
    message = sentence(
        lambda: parse_experiment(tables(**{f"{table}__x": 0}) | {table: {**SMALLEST.get(table, {}), key: value}})
    )
    assert message.startswith(f"experiment: {table}.{key}: unknown key; ")


# Files and overrides -------------------------------------------------------------------------------------------------


def test_overrides(file):
    experiment = read_experiment(
        file,
        [
            "name=other",
            "train.steps=20",
            "train.learning_rate=1e-3",
            "model.path=org/name",
            "data.labels=['a', 'b']",
            "compute.workers=[2, 4]",
            "train.gradient_checkpointing=true",
            'data.input="{text}"',
            "prompt.init=text",
            "prompt.init_text=Is it spam? Yes = spam",
            "data.target={label}",
        ],
    )
    assert experiment.name == "other"
    assert experiment.train.steps == 20 and experiment.train.learning_rate == 0.001
    assert experiment.model.path == "org/name"
    assert experiment.data.labels == ("a", "b")
    assert experiment.compute.workers == (2, 4)
    assert experiment.train.gradient_checkpointing is True
    assert experiment.data.input == "{text}" and experiment.data.target == "{label}"
    assert experiment.prompt.init_text == "Is it spam? Yes = spam"


def test_later_overrides_win(file):
    assert read_experiment(file, ["train.steps=20", "train.steps=30"]).train.steps == 30
    assert read_experiment(file).train.steps == 10


@pytest.mark.parametrize("text", ["2024", "2024-01-31", "7e12345", "1.5", "true", "007"])
def test_text_that_looks_like_a_number_stays_text(file, text):
    experiment = read_experiment(file, [f"name={text}", f"model.revision={text}"])
    assert experiment.name == experiment.model.revision == text


@pytest.mark.parametrize("override", ["train.steps", "=3", ".steps=3", "train.=3", "train..steps=3", ""])
def test_an_override_without_key_or_value(file, override):
    expected = f"override {override!r}: write key=value, for example train.learning_rate=0.1"
    assert sentence(lambda: read_experiment(file, [override])) == expected


def test_an_override_through_a_value(file):
    expected = "override 'name.first=3': name is not a table; write, for example, train.steps=100"
    assert sentence(lambda: read_experiment(file, ["name.first=3"])) == expected


def test_a_wrong_override_names_its_path(file):
    expected = f"{file}: train.lr: unknown key; did you mean train.learning_rate?"
    assert sentence(lambda: read_experiment(file, ["train.lr=3"])) == expected


def test_files_that_cannot_be_read(tmp_path):
    missing = tmp_path / "missing.toml"
    expected = f"{missing}: no such file; give the path of an experiment file (.toml)"
    assert sentence(lambda: read_experiment(missing)) == expected
    (tmp_path / "sentiment.toml").write_text("", encoding="utf-8")
    for typed in ("sentimant.toml", "sentiment"):
        wrong = tmp_path / typed
        message = sentence(partial(read_experiment, wrong))
        assert message == f"{wrong}: no such file; did you mean {tmp_path}/sentiment.toml?"
    message = sentence(lambda: read_experiment(tmp_path))
    assert message.startswith(f"{tmp_path}: cannot be read (") and message.endswith("); give a TOML file")
    latin = tmp_path / "latin.toml"
    latin.write_bytes('name = "caf\u00e9"'.encode("latin-1"))
    assert sentence(lambda: read_experiment(latin)).startswith(f"{latin}: cannot be read (")
    broken = tmp_path / "broken.toml"
    broken.write_text("name = \n", encoding="utf-8")
    problem = "Invalid value (at line 1, column 8)"
    assert sentence(lambda: read_experiment(broken)) == f"{broken}: is not valid TOML ({problem}); correct the file"


def test_template_fields():
    assert template_fields("{a} {{b}} {c}{a}\n") == ["a", "c"]
    assert template_fields("no field") == []


# Round trip ----------------------------------------------------------------------------------------------------------

numbers = st.floats(1e-9, 1e9)
counts = st.integers(1, 10**6)
names = st.text(min_size=1).filter(str.strip)
experiments = st.fixed_dictionaries(
    {
        "name": st.from_regex(NAME, fullmatch=True),
        "data": st.fixed_dictionaries(
            {
                "train": names,
                "input": st.sampled_from(["{text}", "a {b}\n{{c}}", "ünï {text}:"]),
                "target": st.just(" {label}"),
                "validation": names,
            },
            optional={
                "labels": st.lists(st.text(), min_size=2, max_size=5, unique=True),
                "max_tokens": counts,
                "truncate": st.sampled_from(["left", "right", "error"]),
                "test": names,
            },
        ),
    },
    optional={
        "model": st.fixed_dictionaries({}, optional={"path": names, "revision": names, "dtype": st.just("float32")}),
        "prompt": st.fixed_dictionaries({"init": st.just("text"), "init_text": names, "length": counts}),
        "train": st.fixed_dictionaries(
            {"batch_size": st.integers(8, 64)},
            optional={"learning_rate": numbers, "patience": counts, "clip": numbers, "warmup": st.floats(0, 0.99)},
        ),
        "search": st.fixed_dictionaries(
            {}, optional={"length": st.lists(counts, min_size=1), "slots": st.one_of(counts, st.just("auto"))}
        ),
        "compute": st.fixed_dictionaries(
            {}, optional={"workers": st.one_of(st.integers(1, 8), st.tuples(st.just(1), st.integers(1, 8)).map(list))}
        ),
    },
)


@given(experiments)
def test_the_resolved_experiment_survives_json(plain):
    experiment = parse_experiment(plain)
    assert Experiment.model_validate_json(experiment.model_dump_json()) == experiment
    assert parse_experiment(json.loads(experiment.model_dump_json())) == experiment
    assert parse_experiment(experiment.model_dump()) == experiment
    assert DataConfig.model_validate_json(experiment.data.model_dump_json()) == experiment.data


@given(st.text(st.characters(codec="utf-8"), max_size=80).filter(lambda name: name.strip() and not NAME.fullmatch(name)))
def test_only_safe_names_are_names(name):
    assert sentence(lambda: parse_experiment(tables(name=name))).startswith(f"experiment: name: {name!r} is not a valid name; ")


def test_a_file_says_the_same_as_its_tables(write_toml):
    plain = tables(data__labels=["a", "b"], train__gradient_checkpointing=True, compute__workers=[1, 2], train__clip=0.5)
    assert read_experiment(write_toml(plain)) == parse_experiment(plain)


TEXT = {"data.input", "data.target", "data.labels", "data.label_values", "data.chat_template_kwargs"}
"""Strings of an experiment that may be blank: they are text. All others name something."""


def takes_text(kind: Any) -> bool:
    return kind is str or (get_origin(kind) is not Literal and any(map(takes_text, get_args(kind))))


def named_by_text(table: type[BaseModel], path: str = "") -> Iterator[str]:
    """The keys that take a free string."""
    for name, field in table.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from named_by_text(kind, f"{path}{name}.")
        elif takes_text(kind) and get_origin(kind) is not dict:
            yield f"{path}{name}"


@pytest.mark.parametrize("key", [key for key in named_by_text(Experiment) if key not in TEXT])
@pytest.mark.parametrize("blank", ["", "  \t"])
def test_what_names_something_is_not_blank(key, blank, tmp_path):
    (tmp_path / "e.toml").write_text(TOML)
    said = f"{key}: is empty (an unset shell variable?); give it a value, or leave it out"
    value = [blank] if key in ("serve.soft_prompts", "serve.cors_origins") else blank
    assert sentence(partial(parse_experiment, tables(**{key.replace(".", "__"): value}), "e.toml")) == f"e.toml: {said}"
    if value == blank:
        assert sentence(partial(read_experiment, tmp_path / "e.toml", [f"{key}={blank}"])).endswith(said)


def test_the_keys_that_name_something_are_known():
    assert set(named_by_text(Experiment)) - TEXT == {
        *("name", "model.path", "model.revision", "prompt.init_text", "prompt.init_from", "data.train", "data.validation"),
        "data.teacher",
        *("data.test", "data.references", "data.chat_template", "data.system", "serve.host", "serve.keys"),
        *(
            "serve.soft_prompts",
            "serve.cors_origins",
            "tracking.uri",
            "tracking.experiment",
            "compute.storage",
            "compute.address",
        ),
    }
