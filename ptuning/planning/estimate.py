"""What a plan found, as plain data and as text for people."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ptuning.planning.capacity import ServingPlan, TrainingPlan, VllmRows
from ptuning.planning.workload import BaseShape, Machine, RunShape


@dataclass(frozen=True)
class Estimate:
    """The result of `ptuning plan`."""

    name: str
    base: str
    dtype: str
    shape: BaseShape
    machine: Machine
    settings: RunShape
    training: TrainingPlan
    """With one slot."""
    slots: int
    """Soft prompts that fit side by side; 0: not even one."""
    packed: TrainingPlan | None
    """The plan with all of them."""
    serving: ServingPlan
    placement: str
    """Where the base is during training, in one line (`placement.describe`)."""
    estimated: str | None
    """Why activations are an estimate from the shapes of the weights; None: they are those of the real pass."""
    advice: list[str]
    rows: list[str]
    """Lines about the rows, with warnings; empty if they were not read."""

    def __str__(self) -> str:
        return _describe(self)

    @property
    def fits(self) -> bool:
        return self.slots > 0

    @property
    def serves(self) -> bool:
        return self.serving.peak <= self.machine.memory and self.serving.running > 0

    def as_json(self) -> dict[str, Any]:
        """As plain data, in bytes and seconds. `estimated` is null, or the reason why activations are an estimate."""
        found = asdict(self) | {"fits": self.fits, "serves": self.serves}
        for name, plan in (("training", self.training), ("packed", self.packed), ("serving", self.serving)):
            if plan is not None:
                found[name]["peak"] = plan.peak
        return found


def _describe(found: Estimate) -> str:
    """What `ptuning plan` prints."""
    lines: list[str] = []

    def row(words: str, *cells: str) -> None:
        lines.append(f"{words:34}" + "".join(f"{cell:>16}" for cell in cells))

    machine, settings, one, serving = found.machine, found.settings, found.training, found.serving
    kind = "GPU" if machine.gpus else "CPU worker"
    lines.append(
        f"{found.name}: {found.base}, {found.shape.numbers / 1e9:.2f} B parameters, {found.dtype}, "
        f"{found.shape.bytes / 1e9:.1f} GB, on {machine.ranks} {kind}{'s' if machine.ranks > 1 else ''} of "
        f"{_gb(machine.memory)} each, {settings.length} virtual tokens, {settings.batch} rows of {settings.tokens} tokens\n"
    )
    packed = found.packed if found.packed and found.packed.slots > 1 else None
    columns = [one, *([packed] if packed else [])]
    row("training, per rank", *(f"{each.slots} slot{'s' if each.slots > 1 else ''}" for each in columns))
    for words, field in (
        ("taken before", "reserved"),
        ("share of the base", "share"),
        ("gathered, at most", "gathered"),
        ("activations, at most", "activations"),
        ("both, at most", "step"),
        ("an evaluation", "evaluation"),
        ("soft prompts, optimiser", "soft_prompts"),
        ("holes of the heap", "holes"),
        ("needed", "needed"),
    ):
        if field != "holes" or not machine.gpus:
            row(f"  {words}", *(_gb(getattr(each, field)) for each in columns))
    row("  gathered per step", *(_gb(each.received) for each in columns))
    row("  gathered per trial-step", *(_gb(each.received / each.slots) for each in columns))
    row("  step, at least", *(f"{each.seconds:.3g} s" for each in columns))
    row("  trial-steps per second", *(f"{each.slots / each.seconds:.3g}" for each in columns))
    row("  bound by", *(each.bound for each in columns))
    lines.append(f"  {found.placement}")
    lines.append(f"  slots that fit: {found.slots if found.fits else 'not even one'}\n")
    row("serving, a replica", "")
    for words, size in (
        ("taken before", serving.reserved),
        ("weights", serving.weights),
        ("keys and values (serve.cache_mb)", serving.cache),
        ("bank of soft prompts", serving.bank),
        ("a step", serving.step),
        ("needed", serving.peak),
    ):
        row(f"  {words}", _gb(size))
    if found.serves:
        row("  requests at once", str(serving.running))
        row("  with serve.cache_mb at most", f"{max(0, serving.room) >> 20:,}: {serving.most_running:,} requests")
        row("  soft prompts, transformers", f"{serving.resident:,} fit")
        if serving.at_once is not None:
            row("  in serve.resident_mb", f"{serving.at_once:,} at once; the others are read when they are asked")
        row("  soft prompts, vLLM", *_vllm(serving.vllm))
    if found.estimated:
        lines.append(
            f"activations are estimated, as the pass of this base cannot be replayed without values ({found.estimated})"
        )
    lines += found.rows
    for line in found.advice:
        lines.append(f"does not fit: {line}")
    return "\n".join(lines)


def _vllm(found: VllmRows | None) -> list[str]:
    if found is None:
        return ["none of this kind"]
    told = [f"{found.resident:,} in serve.rows = {found.rows:,} ({_gb(found.bytes)})"]
    return told + ([f"  at most {found.most_rows:,}: {found.most_resident:,}"] if found.most_rows > found.rows else [])


def _gb(size: float) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e7 else f"{size / 1e6:,.3g} MB"
