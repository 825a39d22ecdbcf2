"""Imports soft prompts of other tools: a PEFT prompt-tuning adapter in a folder or on the Hugging Face Hub gets a card and a
name."""

from __future__ import annotations

import tempfile
from pathlib import Path

from huggingface_hub import snapshot_download

from ptuning import storage
from ptuning.errors import BaseError
from ptuning.model import soft_prompt
from ptuning.model.base import Base, find_base
from ptuning.model.compatibility import check_base
from ptuning.model.soft_prompt import CARD, CONFIG, WEIGHTS, Card, SoftPrompt, SoftPromptError, public_base
from ptuning.registry.publish import publish
from ptuning.registry.registry import FILES, Registry, Version, check_name
from ptuning.settings.data import Template
from ptuning.settings.model import ModelConfig


def import_adapter(
    registry: Registry, source: str, name: str, base: str | None, template: Template | None, artifact_root: str | None
) -> Version:
    """Publish an adapter: its two files unchanged, and a card. Missing information is recorded as unknown.

    Args:
        base: the base it was made for; default: the base that the adapter names.
        template: how a row becomes text; default: the template of the adapter's card, if it has one.

    Raises:
        UserError: no such adapter, made for another base, or MLflow does not respond.
    """
    check_name(name)
    folder = locate(source)
    loaded = soft_prompt.load(folder)
    card = new_card(loaded, folder, name, find_named_base(loaded, source, base or _known_base(registry, loaded.card)), template)
    files = {file: storage.read_file(folder, file) for file in (CONFIG, WEIGHTS)}
    with tempfile.TemporaryDirectory(prefix="ptuning-") as temporary:
        adopted = str(Path(temporary) / "soft_prompt")
        storage.write_folder(adopted, {**files, CARD: card.model_dump_json(indent=1).encode()})
        return publish(registry, name, adopted, None, artifact_root)


def _known_base(registry: Registry, card: Card) -> str | None:
    """The location of a card's base if the card does not give it (exports contain only the last name of a folder): taken from a
    registered soft prompt of the same base."""
    weights = (card.base_fingerprint or {}).get("weights")
    if weights is None or "/" in card.base or card.base == "builtin":
        return None
    same = {each.tag("base") or "" for each in registry.versions() if (each.fingerprint or {}).get("weights") == weights}
    return next((base for base in sorted(same) if base != card.base and public_base(base) == card.base), None)


def locate(source: str) -> str:
    """The folder of an adapter: a local one, or a download from the Hub.

    Raises:
        SoftPromptError: neither a folder nor on the Hub.
    """
    folder = Path(source).expanduser()
    if "://" in source or folder.is_dir():
        return source if "://" in source else str(folder.absolute())
    if source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise SoftPromptError(f"{source}: is neither an existing folder nor a Hugging Face id; correct the path")
    try:
        return snapshot_download(source, allow_patterns=list(FILES))
    except Exception as error:  # the hub client raises many types (offline, unknown, gated); the fix is the same
        reason = str(error).splitlines()[0]
        raise SoftPromptError(
            f"{source}: was not found on the Hugging Face Hub or in its cache ({reason}); check the id, or give a folder"
        ) from None


def find_named_base(loaded: SoftPrompt, source: str, base: str | None) -> Base:
    """The given base, or the one that the adapter names, if the soft prompt fits it.

    Raises:
        UserError: no base is known, it is missing, or the soft prompt does not fit it.
    """
    path = base or (loaded.card.base if loaded.card.base != "unknown" else None)
    if path is None:
        raise SoftPromptError(f"{source}: does not say which base it was made for; name it with --base")
    local = Path(path).expanduser()
    wanted = ModelConfig(
        path=str(local.absolute()) if path != "builtin" and local.is_dir() else path,
        revision=loaded.card.revision if base is None else None,
        quantization=loaded.card.quantization,
    )
    try:
        found = find_base(wanted)
    except BaseError as error:
        if base is not None:
            raise
        raise BaseError(f"{source}: {str(error).removeprefix('model.path: ')}, or name it with --base") from None
    check_base(loaded, source, found)
    return found


def new_card(loaded: SoftPrompt, folder: str, name: str, base: Base, template: Template | None) -> Card:
    """The adapter's card, or a new one with the known values; a given template replaces the card's."""
    known = loaded.card
    if storage.exists(folder, CARD):
        return known.model_copy(update={"template": template}) if template else known
    return known.model_copy(
        update={
            "name": name,
            "base": base.name,
            "revision": base.revision,
            "base_fingerprint": base.fingerprint.parts(),
            "template": template,
        }
    )
