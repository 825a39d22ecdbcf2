"""One prediction: a table and soft prompts -> a table with answers."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from ptuning import environment
from ptuning.cluster.connection import join_ray, leave_ray, own_cluster
from ptuning.cluster.failures import memory, ray_logs
from ptuning.cluster.local_paths import absolute_source, without_credentials
from ptuning.cluster.resources import await_resources
from ptuning.data.readers import Columns
from ptuning.errors import RunFailed, UserError
from ptuning.inference.inputs import RAW
from ptuning.model.compatibility import base_of_all
from ptuning.model.fingerprint import json_hash
from ptuning.model.soft_prompt import SoftPrompt
from ptuning.prediction.output import answer_columns, answer_values, check_output, write_output
from ptuning.prediction.parts import Parts
from ptuning.prediction.result import Answered, Measured, PredictResult
from ptuning.prediction.row_texts import RowTexts
from ptuning.prediction.stream import Questions, Workers, stream
from ptuning.prediction.survey import Survey, survey
from ptuning.redaction import first_line, redact
from ptuning.settings.data import Template
from ptuning.settings.label_values import canonical
from ptuning.settings.running import ComputeConfig
from ptuning.training import lease

Load = Callable[[str], tuple[str, SoftPrompt]]
"""A name of a soft prompt -> the version that it means, and its vectors and card."""


@dataclass(frozen=True)
class Wanted:
    """What is to be answered, where, and how."""

    name: str
    """Who answers rows that name no other soft prompt."""
    source: str | Sequence[str]
    output: str
    model_column: str | None = None
    probabilities: bool = False
    prefix: str = ""
    """In front of the names of the added columns."""
    base: str | None = None
    workers: int | None = None
    cpus: float | None = None
    address: str | None = None
    resume: bool = False


def run_prediction(
    wanted: Wanted,
    load: Load,
    show: Callable[[Answered, int], None] = lambda state, rows: None,
    say: Callable[[str], None] = lambda line: None,
) -> PredictResult:
    """Answer a table.

    Args:
        show: receives the progress, and how many rows there are to answer.
        say: receives lines for people.

    Raises:
        UserError: the table, a soft prompt or the output cannot be used; nothing was started or written.
        RunFailed: a process failed; what was answered stays, and `resume` goes on.
    """
    listed = [wanted.source] if isinstance(wanted.source, str) else wanted.source
    wanted = replace(
        wanted,
        source=[without_credentials(each, "ROWS", wanted.address) for each in listed],
        output=without_credentials(wanted.output, "--output", wanted.address),
    )
    check_output(wanted.output)
    parts = Parts(wanted.output)
    begun = parts.begun()
    if begun and not wanted.resume:
        raise UserError(
            f"{redact(wanted.output)}: was begun and is not complete; continue with --resume, or choose another output"
        )
    # A champion may have changed since. What was loaded from a folder has no version in a registry.
    known = {name: version for name, version in (begun or {}).get("versions", {}).items() if ":" in version}
    names = _Names(load, known)
    first = names.get(wanted.name)
    table = _surveyed(wanted, first[1].card.template or RAW, say)
    soft_prompts, asked = _chosen(wanted, table, names)
    base = base_of_all(soft_prompts, wanted.base)
    if Path(wanted.base or base.name).expanduser().is_dir():
        wanted = replace(wanted, base=str(Path(wanted.base or base.name).expanduser().absolute()))
    columns = answer_columns(
        [each.template.labels for each in asked.values() if each.template.labels],
        any(not each.template.labels for each in asked.values()),
        wanted.probabilities,
    )
    _check_columns(wanted, table, columns)
    questions = Questions(
        survey=replace(table, source=absolute_source(table.source)),  # the workers are in other folders
        columns=_read(asked, table, wanted.model_column),
        asked=asked,
        versions=names.of_rows(table, wanted),
        model_column=wanted.model_column,
    )
    hashes = {version: each.card.content_hash for version, each in soft_prompts.items()}
    about = {
        "versions": names.versions,
        "rows": table.rows,
        "key": json_hash([table.identity, questions.versions, wanted.model_column, hashes]),
    }
    if begun and begun.get("key") != about["key"]:
        raise UserError(
            f"{redact(wanted.output)}: was begun with other rows or soft prompts; choose another output, or the same as before"
        )
    try:
        with lease.held(parts.folder, say):
            if not begun:
                parts.begin(about)
            state = _answered(wanted, questions, parts, soft_prompts, show, say)
            measured = _written(wanted, table, asked, columns, parts)
    except lease.LeaseLost as error:
        raise RunFailed(str(error)) from None
    parts.delete()
    return PredictResult(
        output=redact(wanted.output),
        rows=measured.rows,
        errors=measured.errors,
        answered=state.rows,
        seconds=state.seconds,
        metrics=measured.metrics(),
        measured=measured.measured(),
        notes=tuple(measured.notes()),
    )


def _written(
    wanted: Wanted, table: Survey, asked: Mapping[str, RowTexts], columns: Mapping[str, Any], parts: Parts
) -> Measured:
    """Write the output; what is returned has seen every answer.

    Raises:
        RunFailed: it cannot be written.
    """
    measured = Measured({version: each.template for version, each in asked.items()})
    labels = {version: each.template.labels for version, each in asked.items() if each.template.labels}
    answers = (answer_values(answer, labels) for answer in measured.passing(parts.answers(table.rows)))
    named = ({f"{wanted.prefix}{key}": value for key, value in values.items()} for values in answers)
    try:
        write_output(wanted.output, table, {f"{wanted.prefix}{name}": kind for name, kind in columns.items()}, named)
    except OSError as error:
        raise RunFailed(
            f"{redact(wanted.output)}: cannot be written ({first_line(error)}); free space or correct the address, then "
            "continue with --resume"
        ) from None
    return measured


class _Names:
    """The soft prompts by the names that were given."""

    def __init__(self, load: Load, known: Mapping[str, str]) -> None:
        self._load, self._known = load, known
        self._found: dict[str, tuple[str, SoftPrompt]] = {}

    def get(self, name: str) -> tuple[str, SoftPrompt]:
        if name not in self._found:
            self._found[name] = self._load(self._known.get(name, name))
        return self._found[name]

    @property
    def versions(self) -> dict[str, str]:
        """The version of each name."""
        return {name: version for name, (version, _) in self._found.items()}

    def of_rows(self, table: Survey, wanted: Wanted) -> dict[str, str]:
        """The version of each name in the rows."""
        return {name: self.get(name or wanted.name)[0] for name in table.named or {"": 1}}


def _surveyed(wanted: Wanted, template: Template, say: Callable[[str], None]) -> Survey:
    """The table, read once. The separator of a CSV file is that of the fields of the main soft prompt."""
    fields = RowTexts(template).fields
    columns = Columns(tuple(sorted({*fields, *filter(None, [wanted.model_column])})), whole=True, labels=_values(template))
    table = survey(wanted.source, columns, wanted.model_column)
    for note in table.notes:
        say(note)
    return table


def _values(template: Template) -> tuple[str, ...]:
    """The values that a column of labels may have, by which class indices are told from names."""
    return tuple(map(canonical, [value for value, _ in template.label_values or ()] or template.labels or ()))


def _chosen(wanted: Wanted, table: Survey, names: _Names) -> tuple[dict[str, SoftPrompt], dict[str, RowTexts]]:
    """The soft prompts that the rows name, and what they are asked, by version.

    Raises:
        UserError: there is no such soft prompt, or the table lacks a column that it needs.
    """
    soft_prompts: dict[str, SoftPrompt] = {}
    asked: dict[str, RowTexts] = {}
    for name, row in (table.named or {"": 1}).items():
        try:
            version, found = names.get(name or wanted.name)
        except UserError as error:
            raise UserError(f"{table.place}, row {row}: {error}") from None
        soft_prompts[version] = found
        asked[version] = RowTexts.of_card(found.card.template or RAW, found.card.experiment)
        asked[version].check_columns(table.schema.names, table.first, table.place)
    return soft_prompts, asked


def _check_columns(wanted: Wanted, table: Survey, columns: Mapping[str, Any]) -> None:
    twins = [name for name in columns if f"{wanted.prefix}{name}" in table.schema.names]
    if twins:
        raise UserError(
            f"{table.place}: has a column '{wanted.prefix}{twins[0]}' already; give the added ones another name with --prefix"
        )


def _read(asked: Mapping[str, RowTexts], table: Survey, model_column: str | None) -> Columns:
    """What the workers read of the rows: every field of a template, if it is there."""
    fields = {field for each in asked.values() for field in each.fields} | set(filter(None, [model_column]))
    return Columns(tuple(sorted(fields)), dict.fromkeys(fields, ""), labels=table.columns.labels)


def _answered(
    wanted: Wanted,
    questions: Questions,
    parts: Parts,
    soft_prompts: Mapping[str, SoftPrompt],
    show: Callable[[Answered, int], None],
    say: Callable[[str], None],
) -> Answered:
    """Answer what is not answered yet."""
    done = parts.clean()
    left = questions.survey.rows - len(done)
    if len(done):
        say(f"{len(done)} of {questions.survey.rows} rows were answered before")
    if not left:
        return Answered(0, 0.0, False)
    environment.apply_for_cluster(wanted.address)
    started = join_ray(wanted.address, "--address")
    try:
        workers = _workers(wanted, say)
        return stream(questions, done, parts, soft_prompts, wanted.base, workers, lambda state: show(state, left))
    except Exception as error:  # Ray Data raises many types: of a task (also as the type that it raised), of an actor, its own
        if isinstance(error, UserError) and not isinstance(error, RayError):
            raise
        logs = ray_logs() if ray.is_initialized() else "its folder"
        raise RunFailed(f"{_reason(error)}; continue with --resume (Ray's own logs are in {logs})") from None
    finally:
        if started:
            leave_ray()


def _workers(wanted: Wanted, say: Callable[[str], None]) -> Workers:
    """How many processes with a base, and what each has.

    Raises:
        UserError: the cluster cannot have enough, or not in time.
    """
    have = ray.cluster_resources()
    gpus, cpus = int(have.get("GPU", 0)), have.get("CPU", 0.0)
    many = wanted.workers or max(1, gpus)
    here = own_cluster() and not wanted.address and not os.environ.get("RAY_ADDRESS")
    each = wanted.cpus or (max(1.0, cpus // many) if here else 1.0)
    fixes = {"CPU": "lower --workers or --cpus", "GPU": "lower --workers"}
    await_resources(
        many, {"CPU": each, "GPU": 1 if gpus else 0}, f"--workers: {many} workers", fixes, ComputeConfig().wait_s, say
    )
    # What reads and writes needs a little, too.
    return Workers(many, max(0.1, each - 0.1), 1 if gpus else 0, max(1, int(each)))


def _reason(error: Exception) -> str:
    """The last line that a person wrote."""
    text = redact(str(error))
    lines = [line.strip() for line in text.splitlines() if "Error: " in line]
    return memory(text) or (lines[-1].partition("Error: ")[2] if lines else first_line(error))
