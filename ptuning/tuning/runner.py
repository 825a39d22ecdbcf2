"""What makes a job go on: its files are read, its trials enter the slots, their events are kept. `endings` does the rest."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ptuning import storage
from ptuning.cluster.failures import cause
from ptuning.config import Experiment
from ptuning.errors import UserError
from ptuning.model.base import Base, find_base
from ptuning.model.fingerprint import json_hash
from ptuning.redaction import logger, placeless
from ptuning.training.messages import Broken, Evaluated, Event, Failed, Fields, Finished, Loaded, Started, Stepped, read_event
from ptuning.tuning.endings import Endings, goodness
from ptuning.tuning.files import UnknownFile
from ptuning.tuning.group import NAME
from ptuning.tuning.ids import new_id
from ptuning.tuning.jobs import Checkpoint, JobRecord, Trial, now
from ptuning.tuning.publication import Publisher
from ptuning.tuning.quarantine import Quarantine
from ptuning.tuning.request import JobRefused, order_of, prepare
from ptuning.tuning.results import EVENTS, POINTS, due, validation_metrics
from ptuning.tuning.service import Jobs, Slots

log = logger(__name__)

MEASURED = 30
"""Steps of a trial from which its end is estimated."""
Wake = Callable[[Experiment, Base], None]
"""Makes sure that the workers run. The experiment is one that they will train."""


class Runner:
    """Lets jobs go on. Its public methods may be called from any thread; files are read, and soft prompts published, in one
    thread each."""

    def __init__(self, jobs: Jobs, publisher: Publisher, slots: Slots, wake: Wake) -> None:
        self._jobs = jobs
        self._endings = Endings(jobs, publisher, slots, self._forget)
        self._slots = slots
        self._wake = wake
        self._runs: dict[str, tuple[JobRecord, int]] = {}
        """Job and number of each trial."""
        self._times: dict[str, deque[tuple[int, int]]] = {}
        """Step and time in milliseconds of the last steps of a trial."""
        self._reading = ThreadPoolExecutor(1, "tuning files")
        self._base: Base | None = None
        self._quarantine = Quarantine(jobs.server.train.checkpoint_every)

    # -- beginning -----------------------------------------------------------------------------------------------------

    def recover(self) -> None:
        """Let all jobs go on that a process before this one had."""
        with self._jobs.lock:
            for record in self._jobs.records.values():
                if record.ended:
                    continue
                if record.status in ("running", "queued"):
                    record.status = "queued"
                for checkpoint in record.checkpoints:
                    if checkpoint.version is None:
                        self._endings.publish(record, checkpoint)
                self.begin(record)

    def begin(self, record: JobRecord) -> None:
        """Let a job go on that is not paused: read its files, if they have not been read, then queue its trials."""
        if record.status in ("validating_files", "queued"):
            self._reading.submit(self._endings.guarded, self._begin, record)

    def stop(self) -> None:
        """Let nothing new begin."""
        self._reading.shutdown(wait=False, cancel_futures=True)
        self._endings.stop()

    def _begin(self, record: JobRecord) -> None:
        jobs = self._jobs
        try:
            train, validation, rows = self._sources(record)
            base = self._found_base()
            fingerprint = json_hash(base.fingerprint.parts())
            if record.base_fingerprint not in ("", fingerprint):
                raise JobRefused("model: this server has another base than the job began with; start a new one", "model")
            copy = JobRecord.read(record.as_json())  # its files may take minutes to read, and clients ask meanwhile
            if not record.trials:
                prepare(copy, jobs.server, base, train, validation, rows)
            with jobs.lock:
                if not record.trials:
                    record.trials, record.hyperparameters = copy.trials, copy.hyperparameters
                    record.tokens_per_step, record.metric = copy.tokens_per_step, copy.metric
                    record.base_fingerprint = fingerprint
                if record.status not in ("validating_files", "queued"):  # it was stopped meanwhile
                    jobs.save(record)
                    return
                if record.status == "validating_files":
                    jobs.move(record, "queued", "Files validated, moving job to queued state")
                self._enter(record, base, train, validation)
        except UserError as error:
            refused = error if isinstance(error, JobRefused) else JobRefused(placeless(str(error)))
            with jobs.lock:
                if not record.ended:
                    self._endings.fail(record, str(refused), refused.code or "invalid_request", refused.param)

    def _enter(self, record: JobRecord, base: Base, train: str, validation: str | None) -> None:
        folder = self._jobs.store.folder(record.id)
        waiting = []
        for number, trial in enumerate(record.trials):
            self._runs[trial.run] = record, number
            if trial.status == "open":
                waiting.append(order_of(record, trial, self._jobs.server, train, validation, folder))
        for order in waiting:
            self._slots.enter(order)
        if not waiting:
            self._endings.finish(record)
        else:
            self._wake(Experiment.model_validate(waiting[0]["experiment"]), base)

    def _sources(self, record: JobRecord) -> tuple[str, str | None, int]:
        """Where the rows are, and the number of those to train on."""
        files = self._jobs.files
        found = []
        for param, file in (("training_file", record.training_file), ("validation_file", record.validation_file)):
            try:  # whose files they are was checked when the job was made
                found.append(files.data_source(file, None) if file else None)
            except UnknownFile:
                raise JobRefused(f"{param}: the file no longer exists; upload it again", param, "file_not_found") from None
        train, validation = found
        assert train is not None
        return train, validation, files.get(record.training_file, None).rows or 0

    def _found_base(self) -> Base:
        if self._base is None:
            self._base = find_base(self._jobs.server.model)
        return self._base

    # -- what workers report -------------------------------------------------------------------------------------------

    def hear(self, events: Sequence[Fields]) -> None:
        """Keep what the workers have reported."""
        with self._jobs.lock:
            for fields in events:
                try:
                    self._hear(read_event(fields))
                except Exception:  # one job's trouble is not its neighbours'
                    log.exception("an event of %s could not be kept", fields.get("run"))

    def _hear(self, heard: Event) -> None:
        if heard.run == NAME:
            self._hear_group(heard)
            return
        if heard.run not in self._runs:  # its job has ended
            return
        record, number = self._runs[heard.run]
        trial = record.trials[number]
        if record.ended:
            return
        match heard:
            case Started():
                self._started(record, trial, heard)
            case Stepped() if heard.step > trial.step:
                self._stepped(record, number, heard)
            case Evaluated() if heard.step > trial.evaluated:
                self._evaluated(record, number, heard)
            case Finished() if trial.status == "open":
                trial.step, trial.status, trial.measured = heard.step, "finished", dict(heard.values)
                trial.content_hash = heard.content_hash
                trial.soft_prompt = storage.relative(self._jobs.store.folder(record.id), heard.soft_prompt)
                self._endings.run_of(record).record(number, heard)
                self._trial_ended(record)
            case Failed() if trial.status == "open":
                trial.status, trial.message = "failed", placeless(heard.message.removeprefix(f"{heard.run}: "))
                self._trial_ended(record)
            case _:
                return
        self._jobs.touch(record)

    def _hear_group(self, heard: Event) -> None:
        if isinstance(heard, Broken):
            self._broken(placeless(cause(heard.workers)))
        elif isinstance(heard, Failed):
            self.group_failed(heard.message)
        elif isinstance(heard, Loaded):
            log.info("%d workers have loaded the base", heard.workers)

    def _warn(self, reason: str) -> None:
        for record in self._jobs.records.values():
            if record.status == "running":
                self._jobs.tell(record, f"{reason}; the job continues from its checkpoint", level="warn")

    def _broken(self, reason: str) -> None:
        self._warn(f"a worker failed: {reason}")
        before = self._quarantine.active
        run = self._quarantine.broken(self._slots.training())
        if run in self._runs:
            record, number = self._runs[run]
            self._slots.leave(run, "drop")
            message = f"its workers failed at step {record.trials[number].step + 1}, every time: {reason}"
            record.trials[number].status, record.trials[number].message = "failed", message
            self._jobs.touch(record)
            self._trial_ended(record)
            self._turn_over(run)
        elif self._quarantine.active and not before:
            log.warning("workers failed again and again: the jobs train one at a time")
            self._slots.limit(1)

    def _turn_over(self, run: str) -> None:
        """A run that trained alone has had its turn, or has ended."""
        self._quarantine.over(run)
        if self._quarantine.release([*self._slots.training(), *self._slots.waiting()]):
            self._slots.limit(math.inf)

    def group_lost(self, reason: str) -> None:
        """The workers have ended and will be started again."""
        with self._jobs.lock:
            self._warn(placeless(reason).partition(";")[0])

    def group_failed(self, reason: str) -> None:
        """No worker can train on this server: every job that needs one fails."""
        with self._jobs.lock:
            for record in self._jobs.records.values():
                if record.status in ("queued", "running") and any(trial.status == "open" for trial in record.trials):
                    for trial in record.trials:
                        self._slots.leave(trial.run, "drop")
                    self._endings.fail(record, placeless(reason), "server_error", None)

    def _started(self, record: JobRecord, trial: Trial, heard: Started) -> None:
        if record.status not in ("queued", "running"):
            return
        if heard.step:
            self._jobs.tell(record, f"Fine-tuning continues at step {heard.step + 1} of {heard.steps}")
        elif not trial.begun and record.status == "queued":
            self._jobs.tell(record, "Fine-tuning job started")
        trial.begun = True
        self._times.pop(trial.run, None)
        if record.status == "queued":
            record.status = "running"
            self._jobs.save(record)

    def _stepped(self, record: JobRecord, number: int, heard: Stepped) -> None:
        trial = record.trials[number]
        trial.step = heard.step
        if self._quarantine.progressed(trial.run):
            self._slots.requeue(trial.run)
            self._turn_over(trial.run)
        self._times.setdefault(trial.run, deque(maxlen=MEASURED)).append((heard.step, heard.time_ms))
        progress = self._jobs.progress(record)
        _extended(progress.curves, number)
        loss = heard.values["loss"]
        if due(heard.step, trial.steps, POINTS):
            progress.curves[number].append([heard.step, loss])
        if due(heard.step, trial.steps, EVENTS):
            self._tell_metrics(record, number, heard.step, "training", loss, {"train_loss": loss})
        self._endings.run_of(record).record(number, heard)

    def _evaluated(self, record: JobRecord, number: int, heard: Evaluated) -> None:
        trial = record.trials[number]
        trial.evaluated = heard.step
        progress = self._jobs.progress(record)
        _extended(progress.evaluations, number)
        progress.evaluations[number].append({"step": heard.step, "values": dict(heard.values)})
        metrics = validation_metrics(heard.step, heard.values)
        curve = progress.curves[number] if number < len(progress.curves) else []
        if curve and math.isfinite(curve[-1][1]):
            metrics["train_loss"] = curve[-1][1]
        self._tell_metrics(record, number, heard.step, "validation", heard.values["loss"], metrics)
        self._endings.run_of(record).record(number, heard)
        if not heard.best or heard.soft_prompt is None or any(each.step == heard.step for each in record.checkpoints):
            return
        if len(record.trials) > 1 and not self._is_best(record, heard.values):
            return
        folder = storage.relative(self._jobs.store.folder(record.id), heard.soft_prompt)
        checkpoint = Checkpoint(new_id("ftckpt", "_"), heard.step, now(), metrics, folder)
        record.checkpoints.append(checkpoint)
        self._endings.publish(record, checkpoint)

    def _is_best(self, record: JobRecord, values: dict[str, float]) -> bool:
        """Whether an evaluation is better than all checkpoints so far."""
        return all(goodness(record.metric, values) > goodness(record.metric, each.metrics) for each in record.checkpoints)

    def _tell_metrics(
        self, record: JobRecord, number: int, step: int, split: str, loss: float, metrics: dict[str, float]
    ) -> None:
        steps = record.trials[number].steps
        which = f"trial {number + 1} of {len(record.trials)}, " if len(record.trials) > 1 else ""
        data = {"step": step, "total_steps": steps, "train_mean_token_accuracy": None, **metrics}
        data |= {"trial": number + 1} if len(record.trials) > 1 else {}
        finite = {key: value if not isinstance(value, float) or math.isfinite(value) else None for key, value in data.items()}
        self._jobs.tell(record, f"{which}Step {step}/{steps}: {split} loss={loss:.4f}", data=finite)

    def estimate(self, record: JobRecord) -> int | None:
        """When a job will end, in Unix seconds, from the steps of its trials that were measured last."""
        if record.status != "running":
            return None
        left = []
        for trial in record.trials:
            times = self._times.get(trial.run)
            if trial.status != "open":
                continue
            if times is None or len(times) < 2:
                return None
            (first, began), (last, ended) = times[0], times[-1]
            left.append((trial.steps - trial.step) * (ended - began) / 1000 / (last - first))
        return math.ceil(time.time() + max(left)) if left else None

    def _forget(self, record: JobRecord) -> None:
        for trial in record.trials:
            self._runs.pop(trial.run, None)
            self._times.pop(trial.run, None)

    def _trial_ended(self, record: JobRecord) -> None:
        if self._quarantine.active:
            self._turn_over("")
        if all(trial.status != "open" for trial in record.trials):
            self._endings.finish(record)


def _extended(lists: list[Any], number: int) -> None:
    while len(lists) <= number:
        lists.append([])
