"""The checks before a version becomes champion, and the promotion itself.

Damaged versions are always refused. `force` overrides the measured checks (base, logits, metric); the findings are then
recorded in a tag of the version and in the promotion log.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ptuning.data.chat_encoder import make_encoder
from ptuning.data.conversations import MESSAGES
from ptuning.errors import UserError
from ptuning.model.base import Base
from ptuning.model.compatibility import base_of, check_base, next_logits
from ptuning.model.self_check import find_input
from ptuning.model.soft_prompt import Card, SoftPrompt
from ptuning.registry.promotions import PromotionLog, State
from ptuning.registry.publish import preferred_metrics, retrieve
from ptuning.registry.registry import FORCED, STATE, Reference, Registry, Version
from ptuning.settings.data import Template
from ptuning.settings.fields import MARGIN


class GateError(UserError):
    """A version did not pass the checks."""


@dataclass(frozen=True)
class Promotion:
    """Result of a promotion."""

    version: Version
    previous: int | None
    findings: list[str]
    """What `force` overrode."""
    moved: bool
    """False: the version already was champion."""


def promote(
    registry: Registry,
    reference: Reference,
    *,
    base: str | None = None,
    margin: float = MARGIN,
    force: bool = False,
    tested: bool = False,
) -> Promotion:
    """Make a version champion if it passes the checks and the champion did not change since they began.

    Args:
        base: the location of its base on this machine, if it differs from the card.
        tested: it has answered on its base, which is not loaded again.

    Raises:
        GateError: the version does not pass.
        MovedMeanwhile: another promotion came first; nothing was changed.
        RegistryError, SoftPromptError, StorageError: the version is missing or damaged.
    """
    version = registry.find(reference)
    log = PromotionLog(registry, version.name)
    seen = log.state()
    if seen.champion == version.version:
        log.sync_alias()
        return Promotion(version, _previous(seen), [], moved=False)
    findings = examine(registry, version, seen, base, margin, tested)
    if findings and not force:
        raise GateError(f"{version}: {'; '.join(findings)}; nothing was changed, use --force to promote it anyway")
    log.promote(version.version, seen, "; ".join(findings) or None)
    registry.tag(version, {STATE: "forced", FORCED: "; ".join(findings)[:4000]} if findings else {STATE: "passed"})
    return Promotion(version, seen.champion, findings, moved=True)


def examine(
    registry: Registry, version: Version, seen: State, base: str | None, margin: float, tested: bool = False
) -> list[str]:
    """All findings against a version, as clauses; empty if it passes.

    Raises:
        UserError: the version is damaged.
    """
    candidate, _ = retrieve(registry, version)
    findings = []
    try:
        findings += [] if tested else on_its_base(candidate, str(version), base)
    except UserError as error:
        findings.append(f"it cannot be tested on its base ({error})")
    if seen.champion is not None:
        champion = registry.find(Reference(version.name, seen.champion))
        findings += compare(candidate.card, retrieve(registry, champion)[0].card, str(champion), margin)
    return findings


def on_its_base(candidate: SoftPrompt, name: str, path: str | None) -> list[str]:
    """Findings about a soft prompt on its base: not finite in the base's dtype, or without effect.

    Raises:
        UserError: the base is missing, or not the one the soft prompt was made for.
    """
    base = base_of(candidate.card, name, path)
    check_base(candidate, name, base)
    dtype = base.dtype("auto")
    # Squared, because a layer first computes the norm of its input; if that overflows, the result is silently zero.
    if not bool(torch.isfinite(candidate.vectors.to(dtype).square().sum(-1)).all()):
        return [f"its vectors are too large for {str(dtype).removeprefix('torch.')}, in which its base computes"]
    model = base.load(dtype).eval()
    ids = torch.tensor([_probe(candidate.card, base)])
    feeding = find_input(model)
    tuned, untuned = next_logits(model, candidate.vectors, ids, feeding), next_logits(model, None, ids, feeding)
    if not bool(torch.isfinite(tuned).all()):
        return ["its logits are not finite"]
    if torch.equal(tuned, untuned):
        return ["it does not change the base's answer"]
    return []


def compare(candidate: Card, champion: Card, champion_name: str, margin: float) -> list[str]:
    """Findings from the comparison with the champion: on the same rows, by a metric that both have."""
    for split in ("test", "validation"):
        if not candidate.data.get(split) or candidate.data.get(split) != champion.data.get(split):
            continue
        for metric in (f"{split}_{name}" for name in preferred_metrics(champion)):
            if metric in candidate.metrics and metric in champion.metrics:
                return _worse(metric, candidate.metrics[metric], champion.metrics[metric], champion_name, margin)
    return [f"it has no metric on the same rows as the champion {champion_name}"]


def _worse(metric: str, value: float, best: float, name: str, margin: float) -> list[str]:
    loss = metric.endswith("loss")
    good = value <= best * (1 + margin) if loss else value >= best - margin  # false for NaN
    allowed = f"{margin:.0%}" if loss else f"{margin:g}"
    words = metric.replace("_", " ")
    return [] if good else [f"its {words} {value:.4f} is worse than the champion's {best:.4f} ({name}) by more than {allowed}"]


def _probe(card: Card, base: Base) -> list[int]:
    """The ids of a short input."""
    template = card.template or Template(input="{text}", target="{text}")
    text = "This is a test." if card.template else "The"
    encoder = make_encoder(template, base.tokenizer, 2**31)
    if template.is_chat:
        return encoder.input_ids({MESSAGES: [{"role": "user", "content": text}]})
    return encoder.input_ids(dict.fromkeys(encoder.fields, text))


def _previous(state: State) -> int | None:
    return state.earlier[-1] if state.earlier else None
