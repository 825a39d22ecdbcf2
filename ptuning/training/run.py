"""A run from the command to the soft prompt: Ray Train starts the workers, and what they report reaches the screen and the
tracker while they train. `run_execution` has checked everything before.

Resuming does not rest on Ray Train's own records: each start is a new Ray run that finds our newest checkpoint by itself. So a
damaged snapshot file of Ray's cannot block a run, and the number of workers may change.
"""

from __future__ import annotations

import shutil
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import RayError
from ray.train.v2.api.exceptions import TrainingFailedError

from ptuning import storage
from ptuning.cluster.connection import beside_driver
from ptuning.cluster.failures import disk_full, explain
from ptuning.config import Experiment
from ptuning.errors import RunFailed
from ptuning.tracking.tracker import Status
from ptuning.training.event_queue import EventQueue
from ptuning.training.messages import Event, read_event
from ptuning.training.ray_trainer import make_trainer
from ptuning.training.result import TrainResult
from ptuning.training.run_execution import Run, Say, execute_run
from ptuning.training.run_metrics import RunMetrics
from ptuning.training.run_trace import RunTrace
from ptuning.training.run_tracking import Recorder

Show = Callable[[Event], None]


def run_training(
    experiment: Experiment,
    *,
    resume: bool = False,
    show: Show = lambda event: None,
    say: Say = lambda line: None,
    register: str | None = None,
) -> TrainResult:
    """Train one soft prompt on a Ray cluster.

    `show` gets every event of the run, `say` lines for people. With `register` the result becomes the newest version of that
    name.

    Raises:
        UserError: something in the experiment or its surroundings is wrong; nothing was started or written.
        RunFailed: the training did not reach its end, or its result could not be registered.
    """
    return execute_run(
        experiment, "train", TrainResult, lambda run: _fit(run, show, say), resume=resume, say=say, register=register
    )


def _work() -> Callable[[dict[str, Any]], None]:
    """The function that each worker calls: a local function, as `make_trainer` requires."""

    def work(config: dict[str, Any]) -> None:
        from ptuning.imports import quick_imports

        with quick_imports():
            from ptuning.training import worker
        worker.work(config)

    return work


def _fit(run: Run, show: Show, say: Say) -> TrainResult:
    """Run Ray Train in this thread (so that Ctrl-C stops it cleanly) and follow its events in another."""
    experiment, folder, tracker = run.experiment, run.folder, run.tracker
    queue = beside_driver(EventQueue).remote()
    attempt = storage.join(folder, "ray")
    config = {"folder": folder, "events": queue}
    record = Recorder(tracker, base=run.base)
    trace = RunTrace(f"train {experiment.name}", {"ptuning.run": experiment.name, "ptuning.mlflow_run": tracker.run_id})

    exported = RunMetrics()

    def watch(event: Event) -> None:
        exported.progress()
        trace(event)
        show(event)

    follower = _Follower(queue, folder, record, watch, say)
    status: Status = "FAILED"
    failure: str | None = None
    interrupt = signal.getsignal(signal.SIGINT)
    try:
        make_trainer(experiment, attempt, run.scaling, _work(), config).fit()
        follower.stop()
        failure = follower.failure
        status = "FAILED" if failure else "FINISHED"
    except (TrainingFailedError, RayError) as error:
        follower.stop()
        failure = explain(follower.lost or error, folder, record.hang)
    except (KeyboardInterrupt, SystemExit):  # Train ends a run upon SIGINT with SystemExit(0) (2.60, data_parallel_trainer.py)
        follower.stop()
        status = "KILLED"
        raise KeyboardInterrupt from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, interrupt)  # Train's own handler stays otherwise, and keeps its controller alive
        follower.stop()
        ray.kill(queue)
        with suppress(OSError):  # said already: the disk is full
            tracker.finish(status)
        trace.send(failed=status == "FAILED")
        unsent = tracker.close(deadline_s=30)
        if storage.is_local(attempt):
            shutil.rmtree(attempt, ignore_errors=True)
    if failure or record.finished is None:
        raise RunFailed(failure or f"{experiment.name}: the workers ended without a result; continue with --resume")
    done = record.finished
    return TrainResult(
        experiment=experiment,
        run_id=tracker.run_id,
        folder=done.soft_prompt,
        steps=done.step,
        best_step=done.best_step,
        metrics=done.values,
        workers=record.workers,
        peak_bytes=done.peak_bytes,
        unsent=unsent,
    )


class _Follower:
    """Takes events from the queue to the screen and the tracker, in a thread of the driver."""

    def __init__(self, queue: Any, folder: str, record: Recorder, show: Show, say: Say) -> None:
        self._folder = folder
        self._queue = queue
        self._record = record
        self._show = show
        self._say = say
        self._stopped = threading.Event()
        self._unrecorded: list[Event] = []
        self.lost: RayError | None = None
        """Why the queue does not answer any more. The workers notice it as well and fail (`EventSender`)."""
        self._thread = threading.Thread(target=self._follow, name="ptuning-events", daemon=True)
        self._thread.start()

    @property
    def failure(self) -> str | None:
        """Why there is no result, if the events say so."""
        return self._record.failed or (disk_full(self._folder) if self._unrecorded else None)

    def stop(self) -> None:
        """Take what is left, then end."""
        self._stopped.set()
        self._thread.join()

    def _follow(self) -> None:
        last = False
        taken = 0
        while not last:
            last = self._stopped.wait(0.2)
            try:
                recorded = taken - len(self._unrecorded)
                events = [read_event(fields) for fields in ray.get(self._queue.take.remote(recorded))]
            except RayError as error:
                self.lost = error
                return
            taken += len(events)
            self._unrecorded += events
            # A full disk: what could not be recorded is kept until there is room. The workers do not wait for it.
            with suppress(OSError):
                while self._unrecorded:
                    warning = self._record(self._unrecorded[0])
                    self._unrecorded.pop(0)
                    if warning:
                        self._say(f"warning: {warning}")
            for event in events:
                self._show(event)
