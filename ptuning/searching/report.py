"""Results of a search, from its store: the ranking of the trials, the best metric over budget, and whether early stopping is
reliable on this task."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ptuning import storage
from ptuning.config import Experiment
from ptuning.searching.space import INIT, KIND, LENGTH, RATE, best_result, score
from ptuning.searching.trial_store import TrialRecord, TrialStore
from ptuning.tracking import plots
from ptuning.tracking.tracker import Tracker


def value_of(experiment: Experiment, entry: TrialRecord) -> tuple[float, float] | None:
    """Score and negative loss of a trial's best evaluation; larger is better. None if it was never evaluated."""
    best = best_result(experiment, entry.results, entry.values[LENGTH])
    if best is None:
        return None
    return score(experiment, best["values"], entry.values[LENGTH]), -best["values"]["loss"]


def ranked(experiment: Experiment, entries: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Best first; those that failed or were never evaluated are left out."""
    valued = [(value_of(experiment, entry), entry) for entry in entries if entry.status != "failed"]
    known = [(value, entry) for value, entry in valued if value is not None]
    return [entry for _, entry in sorted(known, key=lambda pair: pair[0], reverse=True)]


def table(experiment: Experiment, entries: Sequence[TrialRecord]) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of the leaderboard; failed trials are at the end, with their reason."""
    keys = list(dict.fromkeys(key for entry in entries for key in entry.values))
    order = ranked(experiment, entries)
    columns = ["rank", "trial", *keys, "step", "state", experiment.metric, "loss", "score", "message"]
    rows: list[list[Any]] = []
    for entry in [*order, *(entry for entry in entries if entry not in order)]:
        best = best_result(experiment, entry.results, entry.values[LENGTH]) if entry in order else None
        numbers = best["values"] if best else {}
        found = value_of(experiment, entry) if best else None
        rows.append(
            [
                len(rows) + 1 if best else None,
                entry.run,
                *(entry.values.get(key) for key in keys),
                entry.step,
                entry.status,
                numbers.get(experiment.metric),
                numbers.get("loss"),
                found[0] if found else None,
                entry.message or (f"clone of {entry.origin}" if entry.origin else None),
            ]
        )
    return columns, rows


def budget_curve(experiment: Experiment, entries: Sequence[TrialRecord]) -> list[dict[str, float]]:
    """Best metric over what was spent: at each evaluation the trial-steps of all trials until then, and the best so far."""
    events = sorted(
        (result["time_ms"], entry.run, result["step"], result["values"]) for entry in entries for result in entry.results
    )
    steps: dict[str, int] = {}
    rows: list[dict[str, float]] = []
    lower = experiment.metric == "loss"
    best = None
    for time_ms, run, step, values in events:
        steps[run] = step
        value = values[experiment.metric]
        best = value if best is None else min(best, value) if lower else max(best, value)
        rows.append({"trial_steps": sum(steps.values()), "seconds": (time_ms - events[0][0]) / 1000, "best": best})
    return rows


def as_csv(rows: Sequence[dict[str, Any]]) -> str:
    out = io.StringIO()
    if rows:
        writer = csv.DictWriter(out, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return out.getvalue()


def early_late(experiment: Experiment, entries: Sequence[TrialRecord]) -> dict[int, tuple[float, int]]:
    """For each evaluation step before the last: Spearman's rank correlation of the metric there with that at the end, over the
    trials that were trained to the end, and their number. Below 0.6, stopping early is unreliable."""
    whole = [entry for entry in entries if entry.status == "finished" and entry.results]
    curves = [{result["step"]: result["values"][experiment.metric] for result in entry.results} for entry in whole]
    found = {}
    for step in sorted({step for curve in curves for step in curve})[:-1]:
        pairs = [(curve[step], curve[max(curve)]) for curve in curves if step in curve and max(curve) > step]
        if len(pairs) > 2 and (value := spearman(*zip(*pairs, strict=True))) is not None:
            found[step] = (value, len(pairs))
    return found


def spearman(one: Sequence[float], two: Sequence[float]) -> float | None:
    """Rank correlation with mean ranks for ties; None if all are equal."""
    from scipy.stats import spearmanr  # half a second that no command should begin with

    if len(set(one)) == 1 or len(set(two)) == 1:
        return None
    return float(spearmanr(one, two).statistic)


def write_report(experiment: Experiment, store: TrialStore, tracker: Tracker, folder: str) -> None:
    """Leaderboard, pictures and figures of what is known so far: to the parent run and the search's folder."""
    trials = store.trials()
    columns, rows = table(experiment, list(store.entries.values()))
    if not rows:
        return
    tracker.table("leaderboard.json", columns, rows)
    curve = budget_curve(experiment, trials)
    correlation = early_late(experiment, trials)
    files = {
        "leaderboard.csv": as_csv([dict(zip(columns, row, strict=True)) for row in rows]).encode(),
        "budget.csv": as_csv(curve).encode(),
    }
    points = []
    for entry in ranked(experiment, trials):
        best = best_result(experiment, entry.results, entry.values[LENGTH])
        assert best is not None
        values = entry.values
        start = f"{values[KIND]}, {values[INIT]}" if KIND in values else values[INIT]
        points.append((values[LENGTH], values[RATE], best["values"][experiment.metric], start))
    if points:
        best_so_far = {"best so far": [(int(row["trial_steps"]), row["best"]) for row in curve]}
        files["landscape.png"] = plots.landscape(points, experiment.metric, f"{experiment.name}: {len(points)} trials")
        files["budget.png"] = plots.curves(
            best_so_far, experiment.name, f"best validation {experiment.metric}", "steps of all trials", stairs=True
        )
    if store.interventions:
        tracker.json("report/interventions.json", [asdict(each) for each in store.interventions])
    for name, content in files.items():
        storage.write_file(storage.join(folder, "report"), name, content)
        tracker.artifact_bytes(f"report/{name}", content)
    numbers = [{"step": step, "spearman": value, "trials": many} for step, (value, many) in correlation.items()]
    tracker.json("report/early_late.json", numbers)
    for step, (value, _) in correlation.items():
        tracker.metrics({"search/early_late_spearman": value}, step)
