"""All information about one published soft prompt, as plain data and as lines of text."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import torch

from ptuning.errors import UserError
from ptuning.model.base import Base
from ptuning.model.compatibility import base_of
from ptuning.model.nearest_tokens import nearest_words, norms
from ptuning.model.soft_prompt import Card
from ptuning.registry.promotions import Move, PromotionLog
from ptuning.registry.publish import retrieve
from ptuning.registry.registry import CHAMPION, Reference, Registry, RegistryError, Version
from ptuning.settings.data import Template


@dataclass(frozen=True)
class Inspection:
    """A published soft prompt, its origin and what it means to its base. Print it to read it."""

    version: Version
    card: Card
    parent_versions: list[str]
    """Versions with the vectors that this one started from."""
    promotions: list[Move]
    """The moves of the champion to this version."""
    norms: dict[str, float]
    nearest_words: list[list[tuple[str, float]]] | None
    """For each virtual token the words with the highest cosine; None without its base."""
    missing: str | None
    """Why its base is not available."""

    def as_json(self) -> dict[str, Any]:
        """As plain data."""
        version, card = self.version, self.card
        return {
            "name": version.name,
            "version": version.version,
            "aliases": list(version.aliases),
            "state": version.tag("state"),
            "forced": version.tag("forced"),
            "card": card.model_dump(mode="json"),
            "lineage": {
                "run_id": version.run_id,
                "data": card.data,
                "parent": card.parent,
                "parent_versions": self.parent_versions,
            },
            "promotions": [{"kind": move.kind, "by": move.by, "time_ms": move.time_ms} for move in self.promotions],
            "norms": self.norms,
            "nearest_words": self.nearest_words,
            "missing": self.missing,
        }

    def __str__(self) -> str:
        version, card = self.version, self.card
        aliases = f" ({', '.join(version.aliases)})" if version.aliases else ""
        lines = [f"{version}{aliases}", *_card_lines(card), f"run          {version.run_id}"]
        lines += [f"data         {split} {fingerprint[:23]}" for split, fingerprint in card.data.items()]
        if card.parent:
            names = ", ".join(self.parent_versions) or "not in this registry"
            lines.append(f"parent       {card.parent[:12]} ({names})")
        if forced := version.tag("forced"):
            lines.append(f"forced       {forced}")
        own = f", the base's own words {self.norms['vocabulary_mean']:.3f}" if "vocabulary_mean" in self.norms else ""
        lines.append(f"norms        mean {self.norms['mean']:.3f}, largest {self.norms['largest']:.3f}{own}")
        if self.nearest_words is None:
            lines.append(f"words        unknown: {self.missing}")
        for place, words in enumerate(self.nearest_words or ()):
            near = "  ".join(f"{word!r} {cosine:.2f}" for word, cosine in words)
            lines.append(f"{'words' if place == 0 else '':<12} {place:>3}  {near}")
        return "\n".join(lines)


def inspect_version(registry: Registry, name: str, base_path: str | None) -> Inspection:
    """Card, lineage, promotions, norms, and the words nearest to every virtual token.

    Raises:
        UserError: the version does not exist or is damaged.
    """
    version = registry.find(name)
    loaded, _ = retrieve(registry, version)
    base, missing = _base(loaded.card, version, base_path)
    moves = PromotionLog(registry, version.name).state().moves
    return Inspection(
        version=version,
        card=loaded.card,
        parent_versions=[str(found) for found in registry.with_content(loaded.card.parent or "")],
        promotions=[move for move in moves if move.version == version.version],
        norms=norms(loaded.vectors, base),
        nearest_words=nearest_words(loaded.vectors, base) if base and loaded.card.kind == "embedding" else None,
        missing="keys and values are not near to words" if loaded.card.kind == "kv" else missing,
    )


def _base(card: Card, version: Version, path: str | None) -> tuple[Base | None, str | None]:
    try:
        return base_of(card, str(version), path), None
    except UserError as error:
        return None, str(error)


def _card_lines(card: Card) -> list[str]:
    template = card.template
    fingerprint = (card.base_fingerprint or {}).get("weights", "unknown")
    lines = [
        f"base         {card.base} (weights {fingerprint[:12]})",
        f"size         {card.length} virtual tokens {_width(card)}, {card.init or 'unknown'} at the start",
        f"content      {card.content_hash[:12]}",
    ]
    how = [*card.base_notes, *filter(None, (card.dtype, card.training_pass))]
    if how:
        lines.insert(1, f"computed     {', '.join(how)}")
    if template:
        lines += _template_lines(template)
        lines += [f"labels       {', '.join(template.labels)}", *_objective(card)] if template.labels else []
    else:
        lines.append("template     unknown")
    return lines + [f"metric       {name.replace('_', ' ')} {value:.4f}" for name, value in card.metrics.items()]


def _width(card: Card) -> str:
    if card.kv_shape is None:
        return f"of width {card.width}"
    layers, heads, width = card.kv_shape
    return f"as keys and values of {layers} layers, {heads} heads of width {width}"


def _template_lines(template: Template) -> list[str]:
    if not template.is_chat:
        return [f"input        {template.input!r}", f"target       {template.target!r}"]
    jinja = str(template.chat_template)
    lines = [f"chat         template of {len(jinja)} characters, SHA-256 {hashlib.sha256(jinja.encode()).hexdigest()[:12]}"]
    if template.chat_template_kwargs:
        lines.append(f"arguments    {json.dumps(template.chat_template_kwargs, ensure_ascii=False)}")
    if template.system:
        lines.append(f"system       {template.system!r}")
    return [*lines, f"trained      {'all answers' if template.loss == 'all' else 'the last answer'}"]


def _objective(card: Card) -> list[str]:
    """The training objective. It matters for generation that is not constrained to the labels."""
    train = (card.experiment or {}).get("train", {})
    if train.get("objective") != "choice":
        return []
    weight = train.get("text_weight", 0.0)
    text = f"text weight {weight:g}" if weight else "free generation does not produce the labels; constrain it to them"
    return [f"objective    choice; {text}"]


def similar(registry: Registry, reference: Reference) -> list[tuple[Version, float]]:
    """Other soft prompts of the same base, the most similar first: candidates to start from (SPoT, Vu et al. 2022).

    Similarity is the cosine of the averaged vectors, the paper's first measure (section 4.1). Of every name only the champion
    is compared, or the newest version if there is none.

    Raises:
        UserError: the version is missing, or its base is unknown.
    """
    wanted = registry.find(reference)
    base = (wanted.fingerprint or {}).get("weights")
    if base is None:
        raise RegistryError(f"{wanted}: its base is unknown; import it again with --base")
    chosen: dict[str, Version] = {}
    for version in registry.versions():
        fits = version.name != wanted.name and (version.fingerprint or {}).get("weights") == base
        if fits and (version.name not in chosen or CHAMPION in version.aliases):
            chosen[version.name] = version
    own = retrieve(registry, wanted)[0].vectors.mean(0).flatten()
    found = []
    for version in chosen.values():
        other = retrieve(registry, version)[0].vectors.mean(0).flatten()
        if len(other) == len(own):  # of the same kind
            found.append((version, float(torch.nn.functional.cosine_similarity(own, other, dim=0))))
    return sorted(found, key=lambda pair: -pair[1])
