"""Publishing soft prompts to the registry and reading them back, with all checks. Tags hold what `list` shows."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

from ptuning import storage
from ptuning.errors import UserError
from ptuning.model import soft_prompt
from ptuning.model.soft_prompt import Card, SoftPrompt
from ptuning.registry.registry import FILES, STATE, Registry, RegistryError, Version, check_name
from ptuning.storage import StorageError

AGAIN = "choose another version, or publish it again from an intact copy"


def publish(
    registry: Registry,
    name: str,
    folder: str,
    run_id: str | None,
    artifact_root: str | None,
    more_tags: Mapping[str, str] | None = None,
) -> Version:
    """Publish the soft prompt in a folder as the newest version of a name. Publishing it twice returns the existing version.

    Args:
        run_id: the MLflow run that created it; without one, a run is created to hold it.
        artifact_root: where a local tracking store keeps the artifacts of that new run.
        more_tags: further tags of a new version.

    Raises:
        UserError: an invalid name, not a soft prompt, or MLflow does not respond.
    """
    check_name(name)
    loaded = soft_prompt.load(folder)
    check_not_base(name, loaded.card.base)
    files = {file: content for file, content in storage.read_folder(folder).items() if file in FILES}
    files = soft_prompt.without_passwords(files)
    tags = {**describe(loaded.card, files), **(more_tags or {})}
    for version in registry.versions(name):
        if all(version.tags.get(key) == tags[key] for key in ("ptuning.card_hash", "ptuning.content_hash")):
            return version
    if run_id is None:
        run_id = registry.create_run(name, artifact_root, {"content_hash": loaded.card.content_hash})
    with tempfile.TemporaryDirectory(prefix="ptuning-") as temporary:
        whole = Path(temporary) / "whole"
        storage.write_folder(str(whole), files)  # including the manifest
        registry.upload(run_id, whole)
    return registry.create(name, run_id, tags)


def check_not_base(name: str, base: str) -> None:
    """Refuse a name by which a server calls the base: a request could not tell them apart.

    Raises:
        RegistryError: it is such a name.
    """
    if name in (base, soft_prompt.public_base(base)):
        raise RegistryError(f"{name}: is the name of the base on a server; choose another name for the soft prompt")


def describe(card: Card, files: dict[str, bytes]) -> dict[str, str]:
    """The tags of a version, without unknown values."""
    metric = headline(card)
    known = {
        "base": card.base,
        "revision": card.revision,
        **{f"base.{part}": value for part, value in (card.base_fingerprint or {}).items()},
        "kind": card.kind,
        "length": str(card.length),
        "width": str(card.width),
        "metric": metric,
        "value": repr(card.metrics[metric]) if metric else None,
        "data": json.dumps(card.data, sort_keys=True) if card.data else None,
        "content_hash": card.content_hash,
        "card_hash": hashlib.sha256(files[soft_prompt.CARD]).hexdigest(),
        "parent": card.parent,
        "bytes": str(sum(map(len, files.values()))),
    }
    return {f"ptuning.{key}": value for key, value in known.items() if value} | {STATE: "new"}


def headline(card: Card) -> str | None:
    """The metric that a list shows for a soft prompt: on the test rows if there are any."""
    names = [f"{split}_{metric}" for split in ("test", "validation") for metric in preferred_metrics(card)]
    return next((name for name in names if name in card.metrics), None)


def preferred_metrics(card: Card) -> list[str]:
    """The metrics to compare soft prompts by: the one that selected the best step, then the loss."""
    chosen = (card.experiment or {}).get("train", {}).get("metric")
    default = "accuracy" if card.template and card.template.labels else "loss"
    return [chosen or default, "loss"]


def retrieve(registry: Registry, version: Version) -> tuple[SoftPrompt, dict[str, bytes]]:
    """A version's soft prompt and its files. Every hash is checked, also against the registry. Passwords that an earlier
    version of ptuning left in the card are removed.

    Raises:
        UserError: damaged, incomplete, not what was published, or MLflow does not respond.
    """
    with tempfile.TemporaryDirectory(prefix="ptuning-") as folder:  # readable only by this account
        registry.download(version, Path(folder))
        try:
            loaded, files = soft_prompt.load(folder), storage.read_folder(folder)
        except UserError as error:
            raise RegistryError(str(error).replace(folder, str(version))) from None
    if loaded.card.content_hash != version.tag("content_hash"):
        raise RegistryError(f"{version}: the vectors in its run {version.run_id} are not those that were published; {AGAIN}")
    card_hash = version.tag("card_hash")
    if card_hash and hashlib.sha256(files.get(soft_prompt.CARD, b"")).hexdigest() != card_hash:
        raise RegistryError(f"{version}: the card in its run {version.run_id} is not the one that was published; {AGAIN}")
    return loaded, soft_prompt.without_passwords(files)


def fetch(registry: Registry, version: Version, folder: str) -> SoftPrompt:
    """Write a version to a folder for others: the vectors bit for bit, and the public part of the card.

    Raises:
        UserError: the version is damaged, or the folder is not empty.
    """
    check_free(folder)
    loaded, files = retrieve(registry, version)
    storage.write_folder(folder, soft_prompt.public_files(loaded, files))
    return loaded


def check_free(folder: str) -> None:
    """Refuse to overwrite anything.

    Raises:
        StorageError: the folder exists.
    """
    _, path = storage.resolve(folder)
    if storage.is_local(folder) and Path(path).exists() and (not Path(path).is_dir() or any(Path(path).iterdir())):
        raise StorageError(f"{folder}: exists already; choose a new or empty folder")
    if storage.exists(folder, storage.MANIFEST):
        raise StorageError(f"{folder}: exists already; choose another one")
