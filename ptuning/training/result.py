"""What a run reached: for Python, for `--json`, and for the run's own record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

from ptuning import storage
from ptuning.config import Experiment

if TYPE_CHECKING:  # torch: a command that trains needs none in its own process
    from ptuning.model.soft_prompt import SoftPrompt


HEADLINES = (
    *("test_accuracy", "test_macro_f1", "test_rouge_l", "test_bleu", "test_loss"),
    *("validation_accuracy", "validation_loss"),
)
"""The metrics that are told first, in this order."""


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """One trained soft prompt."""

    experiment: Experiment
    """As it was run, with absolute paths."""
    run_id: str | None
    """Its MLflow run; None: the tracker did not answer yet."""
    folder: str
    """Where the soft prompt lies."""
    steps: int
    best_step: int
    """The step whose soft prompt was kept."""
    metrics: dict[str, float]
    """Metrics with their split, as `test_accuracy`."""
    workers: int | None = None
    peak_bytes: list[int] = field(default_factory=list)
    """Most memory of each worker, by rank."""
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
            UserError: the folder is damaged, or is not there any more.
        """
        from ptuning.model import soft_prompt

        return soft_prompt.load(self.folder)

    def __str__(self) -> str:
        return describe(self.as_json())

    def as_json(self) -> dict[str, Any]:
        """The last line of `--json`, and the summary in the run's record."""
        plain = {each.name: getattr(self, each.name) for each in fields(self) if each.name not in ("experiment", "folder")}
        if self.registered is None:
            del plain["registered"]
        return {"name": self.name, "soft_prompt": self.folder} | plain

    @classmethod
    def read(cls, plain: dict[str, Any], experiment: Experiment) -> Self:
        """The inverse of `as_json`."""
        known = {each.name for each in fields(cls)}
        given = {key: value for key, value in plain.items() if key in known}
        return cls(experiment=experiment, folder=plain["soft_prompt"], **given)


def describe(plain: Mapping[str, Any]) -> str:
    """One line for people from what `as_json` gave: what was reached, and where it is."""
    numbers = [f"{name.replace('_', ' ', 1)} {plain['metrics'][name]:.4f}" for name in HEADLINES if name in plain["metrics"]]
    line = (
        f"{plain['name']}: {', '.join(numbers[:3]) or 'trained'} after {plain['steps']} steps in {plain['seconds']:.0f} s; "
        f"soft prompt in {plain['soft_prompt']}, MLflow run {plain['run_id'] or 'not shipped yet'}"
    )
    if name := plain.get("registered"):
        line += f"; registered as {name}, make it champion with: ptuning prompts promote {name}"
    return f"{_winner(plain)}; {line}" if "winner" in plain else line


def _winner(plain: Mapping[str, Any]) -> str:
    """Of a search."""
    chosen = {key.rpartition(".")[2]: value for key, value in plain["winner"]["values"].items()}
    values = ", ".join(f"{key} {each:.3g}" if isinstance(each, float) else f"{key} {each}" for key, each in chosen.items())
    trials = ", ".join(f"{many} {state}" for state, many in plain["trials"].items())
    return f"winner {plain['winner']['trial']} ({values}) of {trials}"
