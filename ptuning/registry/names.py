"""Names of soft prompts that a tuning job has made, as clients of OpenAI know them.

    ft:BASE:ORGANISATION:SUFFIX:XXXXXXXX                    the result of a job
    ft:BASE:ORGANISATION:SUFFIX:XXXXXXXX:ckpt-step-N        one of its checkpoints

A version that answers to such a name has it in a tag; its name in the registry stays a plain one, so `name:3` means the same
version.
"""

from __future__ import annotations

from ptuning.registry.registry import PAGE, Registry, RegistryError, Version

ORGANISATION = "ptuning"
SERVED_AS = "ptuning.served_as"
"""Tag with the name by which clients ask a version, besides `name:3`."""
OWNER = "ptuning.owner"
"""Tag with the owner of the job that made a version."""
REMEMBERED = 10_000
"""Names of results that a server keeps in mind."""
LONGEST = 64
"""Maximum characters of a name in the registry (`settings.fields.NAME`)."""


def tuned_name(base: str, suffix: str, code: str, step: int | None = None) -> str:
    """The name of a job's result, or of its checkpoint at a step. `code`: eight characters of the job."""
    name = f"ft:{base}:{ORGANISATION}:{suffix}:{code}"
    return name if step is None else f"{name}:ckpt-step-{step}"


def is_tuned_name(text: str) -> bool:
    """Whether it is meant as the name of a result or a checkpoint: plain references contain at most one colon."""
    return text.startswith("ft:") and text.count(":") >= 4


def result_name(suffix: str, code: str) -> str:
    """The registry's name of a job's result: its suffix, or one of its own."""
    return suffix or f"tuned-{code}"


def checkpoints_name(suffix: str, code: str) -> str:
    """The registry's name of a job's checkpoints, whose versions they are."""
    tail = f"-{code}-checkpoints"
    return f"{(suffix or 'tuned')[: LONGEST - len(tail)]}{tail}"


class TunedNames:
    """Which versions answer to the names of jobs' results. Remembers those that were found."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._found: dict[str, str] = {}

    def plain(self, name: str) -> str:
        """The name as `name:3`, if it is one of a job's result; others, and unknown ones, stay as they are.

        Raises:
            TrackingError: MLflow does not respond.
        """
        if not is_tuned_name(name):
            return name
        if name not in self._found:
            try:
                version = str(find_tuned(self._registry, name))
            except RegistryError:
                return name
            if len(self._found) >= REMEMBERED:
                self._found.clear()
            self._found[name] = version
        return self._found[name]


def find_tuned(registry: Registry, name: str) -> Version:
    """The version that answers to a name.

    Raises:
        RegistryError: there is none.
        TrackingError: MLflow does not respond.
    """
    quoted = name.replace("'", "")
    entries = (
        registry.pages("search_model_versions", f"tags.`{SERVED_AS}` = '{quoted}'", PAGE) if registry.is_there else iter(())
    )
    wanted = {(entry.name, int(entry.version)) for entry in entries}
    for each in sorted({entry for entry, _ in wanted}):
        for version in registry.versions(each):
            if (version.name, version.version) in wanted and version.tags.get(SERVED_AS) == name:
                return version
    raise RegistryError(f"{name[:200]!r}: no such result of a tuning job; see ptuning prompts list")
