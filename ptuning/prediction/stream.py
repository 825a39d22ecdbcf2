"""The stream on Ray Data: rows of the table -> texts -> answers by engines -> parts. Rows of all soft prompts share batches.

A block is some kilobytes of text, so it has about the same number of tokens for short and long rows. Its rows are
answered together; the engine divides them by tokens.
"""

from __future__ import annotations

import json
import logging
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
from numpy.typing import NDArray
from ray.data import ActorPoolStrategy, DataContext, Datasource, ReadTask
from ray.data.block import BlockMetadata

from ptuning.cluster.connection import beside_driver
from ptuning.data.readers import Columns
from ptuning.data.sources import source_parts
from ptuning.errors import DataError
from ptuning.model.soft_prompt import SoftPrompt
from ptuning.prediction.parts import ERROR, FINISH, PREDICTION, PROBABILITIES, ROW, SCHEMA, TRUTH, VERSION, Parts
from ptuning.prediction.result import Answered
from ptuning.prediction.row_texts import RowTexts
from ptuning.prediction.survey import Survey, name_of

BLOCK = 1 << 17
"""Bytes of text in a block: some 30,000 tokens."""
ROWS = 256
"""Rows that are read at once."""
SMALL = 0.01
"""CPUs that a task asks for which only reads or writes."""
AT_ONCE = 2
"""Tasks that read at the same time, and tasks that write: each is a process, and what is small may start in any number."""
LOOK = 1.0
"""Seconds between two looks at the progress."""
NODE = "ray.io/node-id"
"""Ray's label of a node."""
TEXTS = "texts"
"""Column of the fields of a row's template, as JSON."""

_QUESTIONS = pa.schema(
    [
        (ROW, pa.int64()),
        (VERSION, pa.string()),
        (TEXTS, pa.string()),
        (TRUTH, pa.list_(pa.string())),
        (ERROR, pa.string()),
    ]
)


@dataclass(frozen=True)
class Questions:
    """How the rows of a table become questions."""

    survey: Survey
    columns: Columns
    """What is read of them."""
    asked: Mapping[str, RowTexts]
    """By version."""
    versions: Mapping[str, str]
    """The version of each name that a row may contain; of "", too."""
    model_column: str | None = None

    def of(self, number: int, row: Mapping[str, Any]) -> dict[str, Any]:
        """The question about a row; an error instead of texts if it has none."""
        version = self.versions[name_of(row, self.model_column) if self.model_column else ""]
        found: dict[str, Any] = {ROW: number, VERSION: version}
        texts = self.asked[version]
        try:
            found[TEXTS] = json.dumps(texts.asked(row), ensure_ascii=False)
            found[TEXTS].encode()
        except UnicodeEncodeError:
            return {ROW: number, VERSION: version, ERROR: "contains a lone surrogate (half a character); remove it"}
        except DataError as error:
            return {**found, ERROR: str(error)}
        return found | {TRUTH: texts.truth(row) or None}


class _Rows(Datasource):
    """The rows that are not answered yet, one task for each file of the table."""

    def __init__(self, questions: Questions, done: NDArray[np.int64], spread: bool) -> None:
        super().__init__()
        self._questions, self._done, self._spread = questions, done, spread

    @property
    def supports_distributed_reads(self) -> bool:
        return self._spread

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: DataContext | None = None
    ) -> list[ReadTask]:
        tasks, first = [], 0
        for number, rows in enumerate(self._questions.survey.parts):
            low, high = np.searchsorted(self._done, [first, first + rows])
            if high - low < rows:
                about = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
                tasks.append(ReadTask(_Reading(self._questions, number, first, self._done[low:high]), about))
            first += rows
        return tasks


@dataclass(frozen=True)
class _Reading:
    """Reads one file of the table."""

    questions: Questions
    part: int
    first: int
    done: NDArray[np.int64]

    def __call__(self) -> Iterator[pa.Table]:
        part = source_parts(self.questions.survey.source, self.questions.columns)[self.part]
        done, found = set(self.done.tolist()), list[dict[str, Any]]()
        for number, (_, row) in enumerate(part.rows(), self.first):
            if number not in done:
                found.append(self.questions.of(number, row))
            if len(found) == ROWS:
                yield pa.Table.from_pylist(found, _QUESTIONS)
                found = []
        if found:
            yield pa.Table.from_pylist(found, _QUESTIONS)


class _Shared:
    """What the engines share: the soft prompts, and the number of rows that were answered. On the driver's node.

    An engine that Ray starts again gets the soft prompts here. As arguments of its constructor they would be in Ray's object
    store, where a lost node loses them, and Ray (2.60) warns about it on stderr.
    """

    def __init__(self, soft_prompts: Mapping[str, SoftPrompt]) -> None:
        self._soft_prompts = soft_prompts
        self._rows = 0
        self._began = self._last = 0.0

    def soft_prompts(self) -> Mapping[str, SoftPrompt]:
        return self._soft_prompts

    def loaded(self) -> None:
        self._began = self._began or time.monotonic()

    def add(self, rows: int) -> None:
        self._rows += rows
        self._last = time.monotonic()

    def state(self) -> Answered:
        return Answered(self._rows, max(0.0, self._last - self._began), bool(self._began))


class _Engine:
    """One base in a process of its own. A block of questions -> a block of answers."""

    def __init__(self, shared: Any, base: str | None, threads: int) -> None:
        import torch  # not in the driver, which needs none

        from ptuning.inference.predictor import Predictor

        torch.set_num_threads(threads)
        self._shared = shared
        self._predictor = Predictor(ray.get(shared.soft_prompts.remote()), base=base, engine="auto")
        shared.loaded.remote()

    def __del__(
        self,
    ) -> None:  # called by Ray Data when the last block was answered: threads of the engine keep a process alive
        if predictor := getattr(self, "_predictor", None):
            predictor.close()

    def __call__(self, block: pa.Table) -> pa.Table:
        rows = block.to_pylist()
        asked = [(row[VERSION], json.loads(row[TEXTS])) for row in rows if row[ERROR] is None]
        answers = iter(self._predictor.answer_rows(asked))
        found = []
        for row in rows:
            answer = next(answers) if row[ERROR] is None else None
            values = (
                {
                    PREDICTION: answer.prediction,
                    PROBABILITIES: answer.probabilities,
                    FINISH: answer.finish_reason,
                    ERROR: answer.error,
                }
                if answer
                else {ERROR: row[ERROR]}
            )
            found.append({ROW: row[ROW], VERSION: row[VERSION], TRUTH: row[TRUTH], **values})
        self._shared.add.remote(len(found))
        return pa.Table.from_pylist(found, SCHEMA)


@dataclass(frozen=True)
class Workers:
    """The processes that answer."""

    many: int
    cpus: float
    gpus: int
    threads: int


def stream(
    questions: Questions,
    done: NDArray[np.int64],
    parts: Parts,
    soft_prompts: Mapping[str, SoftPrompt],
    base: str | None,
    workers: Workers,
    look: Callable[[Answered], None],
) -> Answered:
    """Answer all rows that are not done, and write them as parts. `look`: receives the progress.

    Raises:
        RayError: a process failed; what is written stays.
    """
    shared = beside_driver(ray.remote(num_cpus=0)(_Shared)).remote(dict(soft_prompts))
    with _context(), _watched(shared, look):
        rows = ray.data.read_datasource(
            _Rows(questions, done, not _is_local(questions.survey.source)),
            num_cpus=0 if _is_local(questions.survey.source) else SMALL,  # the driver's node may have none
            concurrency=AT_ONCE,
            override_num_blocks=1,  # or Ray Data (2.60) divides what each task reads until there are 200 blocks
        )
        answers = rows.map_batches(
            _Engine,
            fn_constructor_args=(shared, base, workers.threads),
            batch_size=None,
            batch_format="pyarrow",
            # While one block is computed, the next one is tokenised.
            compute=ActorPoolStrategy(
                size=workers.many,
                max_tasks_in_flight_per_actor=4,
                max_concurrent_calls_per_actor=2,
                enable_true_multi_threading=True,
            ),
            num_cpus=workers.cpus,
            num_gpus=workers.gpus,
        )
        options: dict[str, Any] = {"num_cpus": SMALL}
        if parts.is_local:
            options = {"num_cpus": 0, "label_selector": {NODE: ray.get_runtime_context().get_node_id()}}
        answers.write_parquet(parts.path, filesystem=parts.filesystem, ray_remote_args=options, concurrency=AT_ONCE)
    state: Answered = ray.get(shared.state.remote())
    return state


def _is_local(source: Any) -> bool:
    """Whether only this machine may have it."""
    listed = [source] if isinstance(source, str) else source
    return any("://" not in each and not each.startswith(("hub:", "builtin:")) for each in listed)


@contextmanager
def _context() -> Iterator[None]:
    """Small blocks, and nothing on stdout."""
    context = DataContext.get_current().copy()
    context.target_max_block_size = BLOCK
    context.target_min_block_size = 0
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logger = logging.getLogger("ray.data")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with DataContext.current(context), warnings.catch_warnings():
            # Small tables have fewer blocks than there may be tasks at once (2.60).
            warnings.filterwarnings("ignore", "The (maximum|minimum) number of concurrent")
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def _watched(shared: Any, look: Callable[[Answered], None]) -> Iterator[None]:
    """Report the progress while something runs."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(LOOK):
            try:
                look(ray.get(shared.state.remote(), timeout=10))
            except Exception:  # the cluster is lost, or ends: the stream reports it
                time.sleep(LOOK)

    thread = threading.Thread(target=watch, name="ptuning-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
