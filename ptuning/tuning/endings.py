"""How jobs end: checkpoints and results are published, and what cannot go on fails. Everything may be repeated after a crash at
any instant: what is published already is found."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ptuning import storage
from ptuning.errors import UserError
from ptuning.redaction import logger, placeless
from ptuning.tuning.ids import new_id
from ptuning.tuning.job_run import JobRun
from ptuning.tuning.jobs import AUTO, Checkpoint, JobRecord, Trial
from ptuning.tuning.publication import KEPT, Publisher, repeatable
from ptuning.tuning.results import result_file
from ptuning.tuning.service import Jobs, Slots

log = logger(__name__)

AGAIN = 2.0
"""Seconds until something is tried again that MLflow or the storage has refused."""


class Endings:
    """Ends jobs, and holds their MLflow runs until then. Publishes in a thread, one after the other."""

    def __init__(self, jobs: Jobs, publisher: Publisher, slots: Slots, forget: Callable[[JobRecord], None]) -> None:
        """`forget` is called with a job that has ended."""
        self._jobs = jobs
        self._publisher = publisher
        self._slots = slots
        self._forget = forget
        self._tracked: dict[str, JobRun] = {}
        self._publishing = ThreadPoolExecutor(1, "tuning registry")
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Let nothing new begin."""
        self._stopped.set()
        self._publishing.shutdown(wait=False, cancel_futures=True)

    def publish(self, record: JobRecord, checkpoint: Checkpoint) -> None:
        """Publish a checkpoint, soon."""
        self._publishing.submit(self.guarded, self._publish_checkpoint, record, checkpoint)

    def finish(self, record: JobRecord) -> None:
        """Publish the result of a job whose trials have ended, soon."""
        self._publishing.submit(self.guarded, self._finish, record)

    def run_of(self, record: JobRecord) -> JobRun:
        """The MLflow run of a job."""
        if record.id not in self._tracked:
            self._tracked[record.id] = JobRun(record, self._jobs.server)
        return self._tracked[record.id]

    def fail(self, record: JobRecord, message: str, code: str, param: str | None) -> None:
        """End a job without a result."""
        record.error = {"code": code, "message": message, "param": param}
        self._jobs.move(record, "failed", f"The job failed: {message}", level="error")
        self._close_run(record, "FAILED")

    def guarded(self, work: Callable[..., None], record: JobRecord, *more: Any) -> None:
        """Do one job's work; an error is the job's, and never ends the thread."""
        try:
            work(record, *more)
        except InterruptedError:
            return
        except OSError as error:
            log.warning("%s: the storage failed, tried again: %s", record.id, error)
            if not self._stopped.wait(AGAIN):
                self._publishing.submit(self.guarded, work, record, *more)
        except Exception as error:
            log.exception("%s could not go on", record.id)
            with self._jobs.lock:
                if not record.ended:
                    reason = (
                        placeless(str(error))
                        if isinstance(error, UserError)
                        else "something went wrong here; see the server's log"
                    )
                    for trial in record.trials:
                        self._slots.leave(trial.run, "drop")
                    self.fail(record, reason, "server_error", None)

    def _close_run(self, record: JobRecord, status: Any) -> None:
        run = self._tracked.pop(record.id, None)
        self._forget(record)
        if run:
            tags = {"ptuning.state": record.status} | ({"ptuning.soft_prompt": record.version} if record.version else {})
            threading.Thread(target=run.end, args=(status, tags), name="tuning run", daemon=True).start()

    def _publish_checkpoint(self, record: JobRecord, checkpoint: Checkpoint) -> None:
        folder = self._jobs.store.folder(record.id)
        if checkpoint.version is None:
            if not storage.exists(storage.join(folder, checkpoint.folder), storage.MANIFEST):
                return
            version = self._repeated(
                lambda: self._publisher.checkpoint(record, checkpoint, storage.join(folder, checkpoint.folder))
            )
            with self._jobs.lock:
                checkpoint.version = version
                name = record.checkpoint_wire(checkpoint)["fine_tuned_model_checkpoint"]
                self._jobs.tell(record, f"Checkpoint created at step {checkpoint.step}: {name}")
                self._jobs.save(record)
        there = [each for each in record.checkpoints if each.version and not each.withdrawn]
        for old in there[:-KEPT]:
            self._repeated(lambda old=old: self._publisher.withdraw(old, storage.join(folder, old.folder)))  # type: ignore[misc]
            with self._jobs.lock:
                old.withdrawn = True
                self._jobs.save(record)

    def _finish(self, record: JobRecord) -> None:
        """Publish the best trial's soft prompt and end the job. May be repeated after a crash at any instant."""
        jobs = self._jobs
        folder = jobs.store.folder(record.id)
        done = [number for number, trial in enumerate(record.trials) if trial.status == "finished"]
        if not done:
            with jobs.lock:
                if not record.ended:
                    self.fail(record, record.trials[0].message or "it could not be trained", "training_failed", "training_file")
            return
        best = max(done, key=lambda number: goodness(record.metric, _validation(record.trials[number])))
        trial = record.trials[best]
        with jobs.lock:
            if record.ended:
                return
            if record.result_file is None:
                record.result_file = new_id("file")
            jobs.save(record)
            run = self.run_of(record)
        place = storage.join(folder, str(trial.soft_prompt))
        version = self._repeated(lambda: self._publisher.result(record, place, run.run_id()))
        content = result_file(jobs.progress(record), best)
        jobs.files.write_result(
            record.owner, f"{record.id}-metrics.csv", "fine-tune-results", content, file_id=record.result_file
        )
        with jobs.lock:
            record.version, record.fine_tuned_model = version, record.served_as
            record.result_files = [record.result_file]
            if record.hyperparameters.get("learning_rate_multiplier") == AUTO:
                record.hyperparameters |= {"learning_rate_multiplier": trial.multiplier}
            jobs.tell(record, f"New fine-tuned model created: {record.fine_tuned_model}, which is {version}")
            jobs.move(record, "succeeded", "The job has successfully completed")
            self._close_run(record, "FINISHED")
        for each in record.trials:
            storage.delete_folder(storage.join(folder, "trials", each.run, "checkpoints"))

    def _repeated(self, publish: Callable[[], Any]) -> Any:
        """What needs MLflow, as often as it takes."""
        pause = AGAIN
        while True:
            try:
                return publish()
            except UserError as error:
                if not repeatable(error):
                    raise
                log.warning("MLflow does not respond: %s", error)
            if self._stopped.wait(pause):
                raise InterruptedError("the server is stopping")
            pause = min(2 * pause, 60.0)


def _validation(trial: Trial) -> dict[str, float]:
    return {name.removeprefix("validation_"): value for name, value in trial.measured.items() if name.startswith("validation_")}


def goodness(metric: str, values: dict[str, float]) -> tuple[float, float]:
    """Greater is better; between equals the loss decides."""
    loss = values.get("loss", math.inf)
    return (-loss if metric == "loss" else values.get(metric, -math.inf)), -loss
