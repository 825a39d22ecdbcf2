"""What a search reached: its winner, its finalists, and the leaderboard of all trials."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

from ptuning import storage
from ptuning.config import Experiment
from ptuning.searching.report import table
from ptuning.searching.trial_store import TrialStore
from ptuning.training.result import TrainResult

if TYPE_CHECKING:
    import pandas

PICTURES = ("landscape.png", "budget.png")
"""In the folder `report` of a search."""


@dataclass(frozen=True)
class Finalist:
    """A configuration that was trained with several seeds."""

    trial: str
    values: dict[str, Any]
    """Dotted keys of the experiment, and what the trial set them to."""
    mean: float
    """Mean score over the seeds, on the validation rows."""
    spread: float
    """Its standard deviation."""
    seeds: int


@dataclass(frozen=True)
class Leaderboard(Sequence[dict[str, Any]]):
    """The trials and the runs of the finalists, best first; failed ones come last, with their message."""

    columns: list[str]
    rows: list[list[Any]]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Leaderboard(self.columns, self.rows[index])
        return dict(zip(self.columns, self.rows[index], strict=True))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (dict(zip(self.columns, row, strict=True)) for row in self.rows)

    def to_pandas(self) -> pandas.DataFrame:
        """A DataFrame with the same columns."""
        import pandas

        return pandas.DataFrame(self.rows, columns=self.columns)

    def _repr_html_(self) -> str:
        return str(self.to_pandas().to_html(index=False, na_rep="", float_format=lambda value: f"{value:.4g}"))


@dataclass(frozen=True, kw_only=True)
class SearchResult(TrainResult):
    """The soft prompt of a search's winner, and how it was found."""

    winner: Finalist
    finalists: list[Finalist] = field(default_factory=list)
    """Highest mean first."""
    trials: dict[str, int] = field(default_factory=dict)
    """How many trials ended in which state."""
    trial_steps: int = 0
    """Steps of all trials together."""

    @cached_property
    def leaderboard(self) -> Leaderboard:
        """All trials, from the search's own store."""
        return Leaderboard(*table(self.experiment, list(TrialStore(self.run_folder).entries.values())))

    def pictures(self) -> dict[str, bytes]:
        """PNG files of the report: score over length and learning rate, best score over steps."""
        report = storage.join(self.run_folder, "report")
        return {name: storage.read_file(report, name) for name in PICTURES if storage.exists(report, name)}

    def as_json(self) -> dict[str, Any]:
        return super().as_json() | {"winner": asdict(self.winner), "finalists": [asdict(each) for each in self.finalists]}

    @classmethod
    def read(cls, plain: dict[str, Any], experiment: Experiment) -> Self:
        found = {"winner": Finalist(**plain["winner"]), "finalists": [Finalist(**each) for each in plain["finalists"]]}
        return super().read(plain | found, experiment)
