"""The tokenised splits of an experiment, checked against the context of the base."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ptuning.config import Experiment, ExperimentError
from ptuning.data.chat_encoder import make_encoder
from ptuning.data.dataset import Split, load_split
from ptuning.data.division import training_texts
from ptuning.data.encoder import Encoder, Teacher
from ptuning.data.findings import describe_split, of_template, warnings
from ptuning.data.sources import first_row
from ptuning.data.task_template import has_answers, task_template
from ptuning.errors import DataError
from ptuning.model.base import Base


@dataclass(frozen=True)
class Task:
    """An encoder and the tokenised splits."""

    encoder: Encoder
    train: Split
    validation: Split | None
    test: Split | None
    note: str = ""
    """What was recognised in rows without `data.input`."""
    remarks: tuple[str, ...] = ()
    """What in the template is probably a mistake."""

    @property
    def max_new_tokens(self) -> int:
        """Tokens of the longest training target, end token included."""
        return self.train.longest_answer


def load_task(experiment: Experiment, base: Base) -> Task:
    """The tokenised splits of an experiment.

    Raises:
        UserError: invalid rows, or text that cannot fit into the base's context.
    """
    config, length = experiment.data, experiment.prompt.length
    room = base.context - length
    if room < 2:
        raise ExperimentError(
            f"prompt.length: {length} virtual tokens leave no space for text in the {base.context} positions of {base.name}; "
            "lower it"
        )
    if config.max_tokens and config.max_tokens > room:
        raise ExperimentError(
            f"data.max_tokens: {length} virtual tokens and {config.max_tokens} of text exceed the {base.context} positions of "
            f"{base.name}; set it to at most {room}"
        )
    found = task_template(config, base.tokenizer, base.name)
    teacher = Teacher(config.teacher, base.context, config.teacher_tokens) if config.teacher else None
    encoder = make_encoder(found.template, base.tokenizer, min(config.max_tokens or room, room), teacher)
    answered = {source: teacher is None or has_answers(source, found) for _, source in config.sources()}
    texts = training_texts(config, found.template, found.rows, answered[config.train])
    sources = {**dict.fromkeys(texts, config.train), **dict(config.sources())}
    splits = {
        name: load_split(
            name,
            source,
            encoder,
            found.rows,
            references=config.references if answered[source] else None,
            texts=texts.get(name),
            answered=answered[source],
        )
        for name, source in sources.items()
    }
    if len(base.tokenizer) > base.vocabulary:
        _check_rows_of_tokens(experiment, base, encoder, splits.values())
    remarks = () if found.rows else of_template(found.template, lambda: first_row(config.train))
    return Task(encoder, splits["train"], splits.get("validation"), splits.get("test"), found.note, tuple(remarks))


def _check_rows_of_tokens(experiment: Experiment, base: Base, encoder: Encoder, splits: Iterable[Split]) -> None:
    """A tokenizer may have tokens for which the embedding has no row (an added pad, an image token): refuse texts that contain
    one."""
    texts = {"prompt.init_text": experiment.prompt.init_text or ""}
    texts |= {f"data.labels: '{label}'": label for label in experiment.data.labels or ()}
    used = {place: base.tokenizer(text, add_special_tokens=False)["input_ids"] for place, text in texts.items() if text}
    used |= {f"data.labels: '{label}'": ids for label, ids in zip(experiment.data.labels or (), encoder.label_ids, strict=True)}
    for split in splits:
        text, token = split.largest_token
        used[f"{split.source}: '{text[:80]}'"] = [token]
    for place, ids in used.items():
        if max(ids, default=0) >= base.vocabulary:
            shown = base.tokenizer.convert_ids_to_tokens(max(ids))
            raise DataError(
                f"{place} contains the token {shown!r} ({max(ids)}), for which the {base.vocabulary} rows of {base.name} have "
                "no vector; correct the text, or use the tokenizer that belongs to the model"
            )


def describe_task(task: Task) -> list[str]:
    """Lines about the splits: rows, tokens, truncated and dropped rows, and warnings about what is probably a mistake."""
    others = [split for split in (task.validation, task.test) if split is not None]
    lines = [f"rows: {task.note}"] if task.note else []
    lines += [describe_split(split, task.encoder.limit) for split in (task.train, *others)]
    labels = task.encoder.template.labels or ()
    return [*lines, *(f"warning: {line}" for line in (*task.remarks, *warnings(task.train, others, labels)))]
