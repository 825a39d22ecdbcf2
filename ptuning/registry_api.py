"""`ptuning.Registry`: the registered soft prompts in Python. `ptuning prompts` and `ptuning compare` call the same methods.

Importing this module imports neither torch nor MLflow: each method imports what it needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ptuning.errors import UserError
from ptuning.settings.data import Template
from ptuning.settings.fields import MARGIN

if TYPE_CHECKING:
    from ptuning.model.soft_prompt import SoftPrompt
    from ptuning.registry.gate import Promotion
    from ptuning.registry.inspection import Inspection
    from ptuning.registry.merged_export import Merged
    from ptuning.registry.registry import Reference, Version
    from ptuning.registry.vllm_export import VllmExport
    from ptuning.serving.compare import Opinion


class Registry:
    """The registered soft prompts of a storage folder, or of an MLflow server.

    A name refers to its champion, or to its newest version if it has none; "name:3" is a version, "name@champion" the version
    of an alias.

    Args:
        storage: the storage folder whose tracking store to use; default: the store that MLFLOW_TRACKING_URI names, else the
            folder "runs".
        tracking: MLflow server or database to use instead.
    """

    def __init__(self, storage: str | None = None, tracking: str | None = None) -> None:
        from ptuning.registry import registry
        from ptuning.tracking.client import default_uri, named_uri

        named = named_uri(tracking, "--tracking") if tracking or storage is None else None
        self._registry = registry.Registry(named or default_uri(storage or "runs"))

    def __repr__(self) -> str:
        from ptuning.redaction import redact

        return f"Registry({redact(self._registry.uri)!r})"

    def list(self, name: str | None = None) -> Sequence[Version]:
        """All versions, or those of one name: by name, the newest first."""
        return self._registry.versions(name)

    def get(self, reference: str) -> Version:
        """The version that a reference points to.

        Raises:
            UserError: there is none.
        """
        return self._registry.find(reference)

    def load(self, reference: str) -> SoftPrompt:
        """The soft prompt, after a check of every hash.

        Raises:
            UserError: the soft prompt does not exist or is damaged.
        """
        from ptuning.registry.publish import retrieve

        return retrieve(self._registry, self.get(reference))[0]

    def promote(
        self, name: str, version: int | None = None, *, margin: float = MARGIN, force: bool = False, base: str | None = None
    ) -> Promotion:
        """Make a version champion if it passes the checks. The champion is served under the name.

        Args:
            version: its number, if `name` does not contain it.
            margin: how much worse than the current champion it may be.
            force: promote it even if it does not pass; a tag records this.
            base: the location of its base, if it differs from the card.

        Raises:
            UserError: it does not pass or does not exist, or the champion was changed by another process.
        """
        from ptuning.registry import gate

        return gate.promote(self._registry, single_version(name, version), base=base, margin=margin, force=force)

    def rollback(self, name: str) -> int:
        """Make the previous champion champion again; returns its version.

        Raises:
            UserError: there is none, or the champion was changed by another process.
        """
        from ptuning.registry.promotions import PromotionLog

        champion = PromotionLog(self._registry, name).rollback().champion
        assert champion is not None
        return champion

    def delete(self, reference: str) -> Version:
        """Delete a version ("name:3") that is not champion. Its run stays in MLflow.

        Raises:
            UserError: it does not exist, or is the champion.
        """
        from ptuning.registry import promotions

        return promotions.delete(self._registry, single_version(reference))

    def add(self, source: str, name: str, *, base: str | None = None, template: Template | None = None) -> Version:
        """Publish a soft prompt of another tool, such as PEFT.

        Args:
            source: the folder of a PEFT prompt-tuning adapter, or its Hugging Face id.
            base: the base it was made for; default: the base that the adapter names.
            template: how a row becomes text; default: the template of the adapter's card, if it has one.

        Raises:
            UserError: no such adapter, or not one for this base.
        """
        from ptuning.registry.peft_import import import_adapter
        from ptuning.tracking.client import database, default_artifact_root

        local = database(self._registry.uri)  # a server decides where artifacts are stored
        root = default_artifact_root(local.parent) if local else None
        return import_adapter(self._registry, source, name, base, template, root)

    def export(self, reference: str, folder: str) -> Version:
        """Write a soft prompt to a new folder that PEFT loads, with the public part of its card.

        Raises:
            UserError: it is damaged, or the folder is not empty.
        """
        from ptuning.registry.publish import fetch

        version = self.get(reference)
        fetch(self._registry, version, folder)
        return version

    def export_merged(self, reference: str, folder: str, *, base: str | None = None) -> tuple[Version, Merged]:
        """Write base and soft prompt as one plain checkpoint to a new folder.

        Raises:
            UserError: it is damaged or for another base, or the architecture cannot be merged.
        """
        from ptuning.registry import merged_export

        version = self.get(reference)
        return version, merged_export.export_merged(self._registry, version, folder, base)

    def export_vllm(self, references: Sequence[str], folder: str, *, base: str | None = None) -> VllmExport:
        """Write soft prompts and their base as one plain checkpoint for `vllm serve` to a new folder.

        Raises:
            UserError: one is damaged or for another base, or the architecture cannot be merged, or vLLM cannot load it.
        """
        from ptuning.registry.vllm_export import export_for_vllm

        return export_for_vllm(self._registry, [self.get(each) for each in references], folder, base)

    def inspect(self, reference: str, *, base: str | None = None) -> Inspection:
        """Card, lineage, promotions, and the words nearest to every virtual token. Print it to read it.

        Raises:
            UserError: it does not exist or is damaged.
        """
        from ptuning.registry.inspection import inspect_version

        return inspect_version(self._registry, reference, base)

    def similar(self, reference: str) -> Sequence[tuple[Version, float]]:
        """Other soft prompts of the same base with their cosine, the most similar first: candidates for prompt.init_from.

        Raises:
            UserError: it does not exist, or its base is unknown.
        """
        from ptuning.registry import inspection
        from ptuning.registry.registry import parse_reference

        return inspection.similar(self._registry, parse_reference(reference))

    def compare(self, name: str, text: str, *, base: str | None = None) -> Sequence[Opinion]:
        """The answers of the base, of the initial text and of every version to the same input."""
        from ptuning.serving.compare import compare

        return compare(self._registry, name, text, base)


def single_version(name: str, number: int | None = None) -> Reference:
    """The reference to one version: a name and its number, or "name:3" or "name@alias".

    Raises:
        UserError: it is not a single version.
    """
    from ptuning.registry.registry import Reference, check_name, parse_reference

    if number is not None:
        return Reference(check_name(name), number)
    reference = parse_reference(name)
    if reference.version is None and reference.alias is None:
        raise UserError(f"{name}: which version? write {name}:N; see ptuning prompts list")
    return reference
