"""What a run reached: for Python, for `--json`, and for the run's own record."""

from __future__ import annotations

import base64
import html
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from ptuning import storage
from ptuning.config import Experiment
from ptuning.errors import TrackingError
from ptuning.redaction import redact
from ptuning.tracking import client as tracking_client

if TYPE_CHECKING:  # torch: a command that trains needs none in its own process
    from ptuning.model.soft_prompt import SoftPrompt


PLOTS = "plots"
"""Folder of the pictures among the artifacts of a run."""

HEADLINES = (
    *("test_accuracy", "test_agreement", "test_macro_f1", "test_rouge_l", "test_bleu", "test_loss"),
    *("validation_agreement", "validation_accuracy", "validation_loss"),
)
"""The metrics that are reported first, in this order."""


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """One trained soft prompt."""

    experiment: Experiment
    """The experiment with absolute paths."""
    run_id: str | None
    """Its MLflow run; None if MLflow has not answered yet."""
    folder: str
    """The folder of the soft prompt."""
    steps: int
    best_step: int
    """The step whose soft prompt was kept."""
    metrics: dict[str, float]
    """Metrics with their split, as `test_accuracy`."""
    workers: int | None = None
    peak_bytes: list[int] = field(default_factory=list)
    """Peak memory of each worker, by rank."""
    unsent: int = 0
    """Records that could not be sent to MLflow yet; the next command sends them."""
    seconds: float = 0.0
    """From the command to the result."""
    registered: str | None = None
    """The version that it was published as, `name:3`."""

    @property
    def name(self) -> str:
        return self.experiment.name

    @property
    def run_folder(self) -> str:
        """The run's folder: checkpoints, record, soft prompt."""
        return storage.join(self.experiment.compute.storage, self.name)

    @cached_property
    def soft_prompt(self) -> SoftPrompt:
        """The vectors `[P, H]` and their card, read from `folder`.

        Raises:
            UserError: the folder is damaged, or no longer exists.
        """
        from ptuning.model import soft_prompt

        return soft_prompt.load(self.folder)

    def __str__(self) -> str:
        return describe(self.as_json())

    def pictures(self) -> dict[str, bytes]:
        """PNG files of the run in MLflow by name, such as "loss.png"; none if MLflow does not answer."""
        if self.run_id is None:
            return {}
        with suppress(TrackingError), tempfile.TemporaryDirectory(prefix="ptuning-") as folder:
            uri = tracking_client.tracking_uri(self.experiment)
            with tracking_client.asking(uri):
                store = tracking_client.artifacts(tracking_client.connect(uri), self.run_id)
                paths = [Path(store.download_artifacts(each.path, folder)) for each in store.list_artifacts(PLOTS)]
            return {path.name: path.read_bytes() for path in sorted(paths)}
        return {}

    def _repr_html_(self) -> str:
        """For notebooks: the line, the metrics and the pictures."""
        rows = "".join(f"<tr><td>{html.escape(name)}</td><td>{value:.4f}</td></tr>" for name, value in self.metrics.items())
        shown = "".join(
            f'<img alt="{html.escape(name)}" height="300" src="data:image/png;base64,{base64.b64encode(content).decode()}">'
            for name, content in self.pictures().items()
        )
        return f"<p>{html.escape(redact(str(self)))}</p><table>{rows}</table>{shown}"

    def as_json(self) -> dict[str, Any]:
        """The last line of `--json`, and the summary in the run's record."""
        plain = {each.name: getattr(self, each.name) for each in fields(self) if each.name not in ("experiment", "folder")}
        if self.registered is None:
            del plain["registered"]
        return {"name": self.name, "soft_prompt": self.folder} | plain

    @classmethod
    def read(cls, plain: dict[str, Any], experiment: Experiment) -> Self:
        """The inverse of `as_json`, and of what a run's record made of it: its folder may have been moved."""
        known = {each.name for each in fields(cls)}
        given = {key: value for key, value in plain.items() if key in known}
        run = storage.join(experiment.compute.storage, experiment.name)
        return cls(experiment=experiment, folder=storage.inside(run, plain["soft_prompt"]), **given)


def describe(plain: Mapping[str, Any]) -> str:
    """One line for people from what `as_json` gave: what was reached, and where it is."""
    numbers = [f"{name.replace('_', ' ', 1)} {plain['metrics'][name]:.4f}" for name in HEADLINES if name in plain["metrics"]]
    line = (
        f"{plain['name']}: {', '.join(numbers[:3]) or 'trained'} after {plain['steps']} steps in {plain['seconds']:.0f} s; "
        f"soft prompt in {plain['soft_prompt']}, MLflow run {plain['run_id'] or 'not shipped yet'}"
    )
    if tokens := plain["metrics"].get("teacher_tokens"):
        line += f"; it takes the place of {tokens:.0f} tokens of text"
    if name := plain.get("registered"):
        line += f"; registered as {name}, make it champion with: ptuning prompts promote {name}"
    return f"{_winner(plain)}; {line}" if "winner" in plain else line


def _winner(plain: Mapping[str, Any]) -> str:
    """Of a search."""
    chosen = {key.rpartition(".")[2]: value for key, value in plain["winner"]["values"].items()}
    values = ", ".join(f"{key} {each:.3g}" if isinstance(each, float) else f"{key} {each}" for key, each in chosen.items())
    trials = ", ".join(f"{many} {state}" for state, many in plain["trials"].items())
    return f"winner {plain['winner']['trial']} ({values}) of {trials}"
