"""The registry: every published soft prompt is a version of a name in MLflow's model registry, and aliases point to versions.

    name            its champion, or its newest version if it has no champion
    name:3          a version
    name@champion   the version that an alias points to

A version's source is the plain folder `soft_prompt/` among the artifacts of its run: no model flavour, no pickle. Everything
that `list` shows is in the version's tags, so listing a thousand versions takes two calls. Imports neither torch nor MLflow.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from ptuning.errors import TrackingError, UserError, suggest
from ptuning.redaction import redact
from ptuning.registry.changes import ChangeLog
from ptuning.settings.fields import NAME
from ptuning.tracking import client as tracking_client
from ptuning.tracking.client import asking

CHAMPION = "champion"
"""The alias of the served version. Only `promotions.PromotionLog` moves it."""
ARTIFACT = "soft_prompt"
"""Folder of the soft prompt among the artifacts of its run."""
FILES = {"adapter_config.json": 1 << 20, "adapter_model.safetensors": 1 << 30, "card.json": 1 << 24, "manifest.json": 1 << 20}
"""The only files that are downloaded, and their maximum sizes in bytes."""
FORMAT = "ptuning.format"
STATE, FORCED = "ptuning.state", "ptuning.forced"
EXPERIMENT = "ptuning imports"
"""MLflow experiment of the runs that hold imported soft prompts."""
PAGE = 5000

_REFERENCE = re.compile(
    rf"(?P<name>{NAME.pattern})(?::(?P<version>[1-9][0-9]{{0,8}})|@(?P<alias>[A-Za-z][A-Za-z0-9_-]{{0,63}}))?"
)


class RegistryError(UserError):
    """No such name, version or alias, or the operation is not allowed."""


@dataclass(frozen=True)
class Reference:
    """`name`, `name:3` or `name@alias`."""

    name: str
    version: int | None = None
    alias: str | None = None

    def __str__(self) -> str:
        return f"{self.name}:{self.version}" if self.version else f"{self.name}@{self.alias}" if self.alias else self.name


def parse_reference(text: str) -> Reference:
    """Parse a reference.

    Raises:
        RegistryError: the text is not a valid reference.
    """
    match = _REFERENCE.fullmatch(text)
    if not match:
        raise RegistryError(f"{text[:80]!r} is not a valid reference; write name, name:3 or name@champion")
    version = match["version"]
    return Reference(match["name"], int(version) if version else None, match["alias"])


def check_name(name: str) -> str:
    """Check the name of a soft prompt.

    Raises:
        RegistryError: the name is not valid.
    """
    if not NAME.fullmatch(name):
        raise RegistryError(f"{name[:80]!r} is not a valid name; use at most 64 letters, digits, '-', '_' and '.', no slashes")
    return name


@dataclass(frozen=True)
class Version:
    """A published soft prompt, as its tags describe it."""

    name: str
    version: int
    run_id: str
    created_ms: int
    aliases: tuple[str, ...]
    tags: Mapping[str, str]

    @classmethod
    def of(cls, entry: Any, aliases: Iterable[str] = ()) -> Version:
        """Of MLflow's own entry."""
        created = int(entry.creation_timestamp)
        return cls(entry.name, int(entry.version), entry.run_id, created, tuple(aliases), dict(entry.tags))

    def __str__(self) -> str:
        return f"{self.name}:{self.version}"

    def tag(self, key: str) -> str | None:
        """The value of the tag `ptuning.<key>`; None if there is no such tag."""
        return self.tags.get(f"ptuning.{key}") or None

    def number(self, key: str) -> float | None:
        text = self.tag(key)
        return float(text) if text else None

    @property
    def age_s(self) -> float:
        return max(0.0, time.time() - self.created_ms / 1000)

    @property
    def fingerprint(self) -> dict[str, str] | None:
        """Fingerprint of its base; None if unknown."""
        parts = {part: self.tag(f"base.{part}") for part in ("config", "tokenizer", "weights", "quantization")}
        return {part: value for part, value in parts.items() if value} or None


class Registry:
    """The published soft prompts in one MLflow.

    Raises:
        TrackingError: MLflow does not respond. Any method may raise it.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri

    @cached_property
    def client(self) -> Any:
        with asking(self.uri):
            return tracking_client.connect(self.uri)

    @cached_property
    def changes(self) -> ChangeLog:
        return ChangeLog(self.uri, self.client)

    @property
    def is_there(self) -> bool:
        """False: the file of the database does not exist."""
        path = tracking_client.database(self.uri)
        return path is None or path.exists()  # reading must not create a database

    def versions(self, name: str | None = None) -> list[Version]:
        """All versions, or those of one name, by name and with the newest first. The number of calls does not grow with
        them."""
        if not self.is_there:
            return []
        names = f"name = '{check_name(name)}'" if name else None
        ours = " and ".join(filter(None, (names, f"tags.`{FORMAT}` = '1'")))
        aliases: dict[tuple[str, int], list[str]] = {}
        for model in self.pages("search_registered_models", names, 1000):
            for alias, number in model.aliases.items():
                aliases.setdefault((model.name, int(number)), []).append(alias)
        found = [
            Version.of(entry, sorted(aliases.get((entry.name, int(entry.version)), ())))
            for entry in self.pages("search_model_versions", ours, PAGE)
            if NAME.fullmatch(entry.name)  # other clients of MLflow may use any name: line breaks, look-alikes
        ]
        return sorted(found, key=lambda version: (version.name, -version.version))

    def with_content(self, content_hash: str) -> list[Version]:
        """The versions with these vectors."""
        if not self.is_there or not re.fullmatch(r"[0-9a-f]{64}", content_hash):
            return []
        entries = self.pages("search_model_versions", f"tags.`ptuning.content_hash` = '{content_hash}'", PAGE)
        wanted = {(entry.name, int(entry.version)) for entry in entries}
        return [
            version
            for name in sorted({name for name, _ in wanted})
            for version in self.versions(name)
            if (version.name, version.version) in wanted
        ]

    def pages(self, method: str, condition: str | None, size: int) -> Iterator[Any]:
        """All results of a search method of the client, page by page."""
        token: str | None = None
        while True:
            with asking(self.uri):
                page = getattr(self.client, method)(condition, max_results=size, page_token=token)
            yield from page
            token = page.token
            if not token:
                return

    def find(self, reference: str | Reference) -> Version:
        """The version that a reference points to.

        Raises:
            RegistryError: there is none.
        """
        wanted = parse_reference(reference) if isinstance(reference, str) else reference
        versions = self.versions(wanted.name)
        if not versions:
            raise self.unknown(wanted.name)
        if wanted.version:
            fitting = [version for version in versions if version.version == wanted.version]
        else:
            fitting = [version for version in versions if (wanted.alias or CHAMPION) in version.aliases]
            if not fitting and not wanted.alias:
                fitting = versions[:1]
        if not fitting:
            known = ", ".join(sorted({alias for version in versions for alias in version.aliases})) or "no alias"
            raise RegistryError(
                f"{wanted}: does not exist; {wanted.name} has the versions {_numbers(versions)} and {known}, choose one"
            )
        return fitting[0]

    def unknown(self, name: str) -> RegistryError:
        """The error for a name that is not in the registry."""
        fix = suggest(name, {version.name for version in self.versions()}, "see ptuning prompts list")
        return RegistryError(f"{name}: no soft prompt of this name in {redact(self.uri)}; {fix}")

    def create(self, name: str, run_id: str, tags: Mapping[str, str]) -> Version:
        """A new version whose source is the artifact folder of a run."""
        check_name(name)
        with asking(self.uri):
            try:
                self.client.create_registered_model(name)
            except Exception as error:
                if getattr(error, "error_code", None) != "RESOURCE_ALREADY_EXISTS":
                    raise
            source = f"{self.client.get_run(run_id).info.artifact_uri}/{ARTIFACT}"
            entry = self.client.create_model_version(name, source, run_id, tags={FORMAT: "1", **tags}, await_creation_for=0)
        self.changes.append(name, "created")
        return Version.of(entry)

    def tag(self, version: Version, tags: Mapping[str, str]) -> None:
        """Set tags of a version."""
        with asking(self.uri):
            for key, value in tags.items():
                self.client.set_model_version_tag(version.name, str(version.version), key, value)
        self.changes.append(version.name, "changed")

    def upload(self, run_id: str, folder: Path) -> None:
        """Upload the files of a soft prompt to a run; the manifest comes last."""
        with asking(self.uri):
            store = tracking_client.artifacts(self.client, run_id)
            for file in sorted(folder.iterdir(), key=lambda file: list(FILES).index(file.name)):
                store.log_artifact(str(file), ARTIFACT)

    def create_run(self, name: str, artifact_root: str | None, tags: Mapping[str, str]) -> str:
        """Create a run for an imported soft prompt; returns its id."""
        with asking(self.uri):
            experiment = tracking_client.experiment_id(self.client, EXPERIMENT, artifact_root)
            run_id = str(self.client.create_run(experiment, tags=dict(tags), run_name=name).info.run_id)
            self.client.set_terminated(run_id)
        return run_id

    def download(self, version: Version, folder: Path) -> None:
        """Download the files of a version into a folder: only the four files of `FILES`.

        Raises:
            RegistryError: a file is too large or missing.
        """
        missing = set(FILES)
        with asking(self.uri):
            store = tracking_client.artifacts(self.client, version.run_id)
            for entry in store.list_artifacts(ARTIFACT):
                name = PurePosixPath(entry.path).name
                if name not in FILES or entry.is_dir or entry.path != f"{ARTIFACT}/{name}":
                    continue
                if (entry.file_size or 0) > FILES[name]:
                    raise RegistryError(
                        f"{version}: {name} has {entry.file_size} bytes, too many for a soft prompt; choose another version"
                    )
                path = Path(store.download_artifacts(entry.path, str(folder)))
                path.replace(folder / name)
                missing.remove(name)
        if missing:
            place = redact(tracking_client.artifact_place(self.client, version.run_id))
            raise RegistryError(
                f"{version}: {', '.join(sorted(missing))} not found in {place}/{ARTIFACT}; mount that folder again or, if it "
                "was moved, give the storage folder it is in now (--storage, compute.storage)"
            )

    def remove(self, version: Version) -> None:
        """Delete a version from MLflow's registry, after `PromotionLog.mark_deleted`. Its run stays."""
        try:
            with asking(self.uri):
                self.client.delete_model_version(version.name, str(version.version))
        except TrackingError as error:
            if error.code != "RESOURCE_DOES_NOT_EXIST":
                raise
        self.changes.append(version.name, "changed")


def _numbers(versions: list[Version]) -> str:
    listed = [str(version.version) for version in versions[:8]]
    return ", ".join(listed) + (", ..." if len(versions) > 8 else "")
