"""All information about one published soft prompt, as plain data and as lines of text."""

from __future__ import annotations

from typing import Any

import torch

from ptuning.errors import UserError
from ptuning.model.base import Base
from ptuning.model.compatibility import base_of
from ptuning.model.nearest_tokens import nearest_words, norms
from ptuning.model.soft_prompt import Card
from ptuning.registry.promotions import PromotionLog
from ptuning.registry.publish import retrieve
from ptuning.registry.registry import CHAMPION, Reference, Registry, RegistryError, Version


def inspect_version(registry: Registry, name: str, base_path: str | None) -> dict[str, Any]:
    """Card, lineage, promotions, norms, and the words nearest to every virtual token (None if its base is missing).

    Raises:
        UserError: the version is missing or damaged.
    """
    version = registry.find(name)
    loaded, _ = retrieve(registry, version)
    base, missing = _base(loaded.card, version, base_path)
    moves = PromotionLog(registry, version.name).state().moves
    return {
        "name": version.name,
        "version": version.version,
        "aliases": list(version.aliases),
        "state": version.tag("state"),
        "forced": version.tag("forced"),
        "card": loaded.card.model_dump(mode="json"),
        "lineage": {
            "run_id": version.run_id,
            "data": loaded.card.data,
            "parent": loaded.card.parent,
            "parent_versions": [str(found) for found in registry.with_content(loaded.card.parent or "")],
        },
        "promotions": [
            {"kind": move.kind, "by": move.by, "time_ms": move.time_ms} for move in moves if move.version == version.version
        ],
        "norms": norms(loaded.vectors, base),
        "nearest_words": nearest_words(loaded.vectors, base) if base else None,
        "missing": missing,
    }


def _base(card: Card, version: Version, path: str | None) -> tuple[Base | None, str | None]:
    try:
        return base_of(card, str(version), path), None
    except UserError as error:
        return None, str(error)


def version_lines(shown: dict[str, Any]) -> list[str]:
    """The inspection as text."""
    card, lineage = shown["card"], shown["lineage"]
    aliases = f" ({', '.join(shown['aliases'])})" if shown["aliases"] else ""
    lines = [f"{shown['name']}:{shown['version']}{aliases}", *_card_lines(card)]
    lines.append(f"run          {lineage['run_id']}")
    lines += [f"data         {split} {fingerprint[:23]}" for split, fingerprint in lineage["data"].items()]
    if lineage["parent"]:
        names = ", ".join(lineage["parent_versions"]) or "not in this registry"
        lines.append(f"parent       {lineage['parent'][:12]} ({names})")
    if shown["forced"]:
        lines.append(f"forced       {shown['forced']}")
    lengths = shown["norms"]
    own = f", mean of the base's embeddings {lengths['vocabulary_mean']:.3f}" if "vocabulary_mean" in lengths else ""
    lines.append(f"norms        mean {lengths['mean']:.3f}, largest {lengths['largest']:.3f}{own}")
    if shown["nearest_words"] is None:
        return [*lines, f"words        unknown: {shown['missing']}"]
    for place, words in enumerate(shown["nearest_words"]):
        near = "  ".join(f"{word!r} {cosine:.2f}" for word, cosine in words)
        lines.append(f"{'words' if place == 0 else '':<12} {place:>3}  {near}")
    return lines


def _card_lines(card: dict[str, Any]) -> list[str]:
    template = card["template"]
    fingerprint = (card["base_fingerprint"] or {}).get("weights", "unknown")
    lines = [
        f"base         {card['base']} (weights {fingerprint[:12]})",
        f"size         {card['length']} virtual tokens of width {card['width']}, {card['init'] or 'unknown'} at the start",
        f"content      {card['content_hash'][:12]}",
    ]
    if template:
        lines.append(f"input        {template['input']!r}")
        lines.append(f"target       {template['target']!r}")
        lines += [f"labels       {', '.join(template['labels'])}", *_objective(card)] if template["labels"] else []
    else:
        lines.append("template     unknown")
    return lines + [f"metric       {name.replace('_', ' ')} {value:.4f}" for name, value in card["metrics"].items()]


def _objective(card: dict[str, Any]) -> list[str]:
    """The training objective. It matters for generation that is not constrained to the labels."""
    train = (card["experiment"] or {}).get("train", {})
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
    own = retrieve(registry, wanted)[0].vectors.mean(0)
    found = [
        (version, float(torch.nn.functional.cosine_similarity(own, retrieve(registry, version)[0].vectors.mean(0), dim=0)))
        for version in chosen.values()
    ]
    return sorted(found, key=lambda pair: -pair[1])
