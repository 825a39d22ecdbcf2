"""What a version must pass before it becomes champion, and the promotion itself.

Whatever is damaged is refused for good. What the gate measures (the base, the logits, the metric) `force` overrides; then the
reasons stand in a tag of the version and in the log.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ptuning.config import MARGIN, template_fields
from ptuning.errors import UserError
from ptuning.model.compatibility import base_of, check_base, next_logits
from ptuning.model.soft_prompt import Card, SoftPrompt
from ptuning.registry.promotions import PromotionLog, State
from ptuning.registry.publish import preferred_metrics, retrieve
from ptuning.registry.registry import FORCED, STATE, Reference, Registry, Version


class GateError(UserError):
    """A version did not pass."""


@dataclass(frozen=True)
class Promotion:
    """What a promotion did."""

    version: Version
    previous: int | None
    findings: list[str]
    """What `force` overrode."""
    moved: bool
    """False: it was champion already."""


def promote(
    registry: Registry, reference: Reference, *, base: str | None = None, margin: float = MARGIN, force: bool = False
) -> Promotion:
    """Make a version champion if it passes the gate and nobody moved the champion since the gate began.

    Args:
        base: where its base lies on this machine, if not where its card says.

    Raises:
        GateError: it does not pass.
        champion.MovedMeanwhile: another promotion was faster; nothing was changed.
        RegistryError, SoftPromptError, StorageError: not there, or damaged.
    """
    version = registry.find(reference)
    log = PromotionLog(registry, version.name)
    seen = log.state()
    if seen.champion == version.version:
        log.sync_alias()
        return Promotion(version, _previous(seen), [], moved=False)
    findings = examine(registry, version, seen, base, margin)
    if findings and not force:
        raise GateError(f"{version}: {'; '.join(findings)}; nothing was changed, --force promotes it all the same")
    log.promote(version.version, seen, "; ".join(findings) or None)
    registry.tag(version, {STATE: "forced", FORCED: "; ".join(findings)[:4000]} if findings else {STATE: "passed"})
    return Promotion(version, seen.champion, findings, moved=True)


def examine(registry: Registry, version: Version, seen: State, base: str | None, margin: float) -> list[str]:
    """Everything that speaks against a version, as half sentences; empty if it passes.

    Raises:
        UserError: it is damaged.
    """
    candidate, _ = retrieve(registry, version)
    findings = []
    try:
        findings += on_its_base(candidate, str(version), base)
    except UserError as error:
        findings.append(f"it cannot be tried on its base ({error})")
    if seen.champion is not None:
        champion = registry.find(Reference(version.name, seen.champion))
        findings += compare(candidate.card, retrieve(registry, champion)[0].card, str(champion), margin)
    return findings


def on_its_base(candidate: SoftPrompt, name: str, path: str | None) -> list[str]:
    """What is wrong with a soft prompt on its base: not finite in the base's own dtype, or without any effect.

    Raises:
        UserError: the base is not there, or another one.
    """
    base = base_of(candidate.card, name, path)
    check_base(candidate, name, base)
    dtype = base.dtype("auto")
    # Squared, because the first thing a layer does is to square them; a norm that overflows makes a silent zero.
    if not bool(torch.isfinite(candidate.vectors.to(dtype).square().sum(-1)).all()):
        return [f"its vectors are too large for {str(dtype).removeprefix('torch.')}, in which its base computes"]
    model = base.load(dtype).eval()
    ids = torch.tensor([base.tokenizer(_probe(candidate.card))["input_ids"]])
    tuned, untuned = next_logits(model, candidate.vectors, ids), next_logits(model, None, ids)
    if not bool(torch.isfinite(tuned).all()):
        return ["its logits are not finite"]
    if torch.equal(tuned, untuned):
        return ["the base answers the same with and without it"]
    return []


def compare(candidate: Card, champion: Card, champion_name: str, margin: float) -> list[str]:
    """What a candidate does worse than the champion: on the same rows, by the metric that both have."""
    for split in ("test", "validation"):
        if not candidate.data.get(split) or candidate.data.get(split) != champion.data.get(split):
            continue
        for metric in (f"{split}_{name}" for name in preferred_metrics(champion)):
            if metric in candidate.metrics and metric in champion.metrics:
                return _worse(metric, candidate.metrics[metric], champion.metrics[metric], champion_name, margin)
    return [f"no metric on the same rows compares it with the champion {champion_name}"]


def _worse(metric: str, value: float, best: float, name: str, margin: float) -> list[str]:
    loss = metric.endswith("loss")
    good = value <= best * (1 + margin) if loss else value >= best - margin  # false for what is not a number
    allowed = f"{margin:.0%}" if loss else f"{margin:g}"
    words = metric.replace("_", " ")
    return [] if good else [f"its {words} {value:.4f} is worse than the champion's {best:.4f} ({name}) by more than {allowed}"]


def _probe(card: Card) -> str:
    if card.template is None:
        return "The"
    return card.template.input.format_map(dict.fromkeys(template_fields(card.template.input), "This is a test."))


def _previous(state: State) -> int | None:
    return state.earlier[-1] if state.earlier else None
