"""Exports a base with several soft prompts as one plain checkpoint for `vllm serve`, without anything of ptuning there.

All soft prompts are in one batch: each has its own virtual tokens, and the chat template selects one of them by
`chat_template_kwargs` of a request. A text that begins with the virtual tokens selects one, too.
"""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ptuning.model.base import Base
from ptuning.model.compatibility import base_of, check_base
from ptuning.model.soft_prompt import SoftPrompt
from ptuning.registry.merged_chat import CHOICE, Draft, write_choice
from ptuning.registry.merged_check import OTHERWISE, ExportError
from ptuning.registry.merged_checkpoint import write_checkpoint
from ptuning.registry.publish import check_free, retrieve
from ptuning.registry.registry import Registry, Version
from ptuning.registry.token_suppression import Suppression

LIST = "soft_prompts.json"
"""The file with all soft prompts: how each is selected, and its card."""
ALWAYS_TIED = ("cohere", "cohere2", "cohere2_moe", "gemma2", "gemma3n_text")
"""Model types whose output head vLLM (0.29) always ties to the input embedding."""


@dataclass(frozen=True)
class VllmExport:
    """Result of an export for vLLM."""

    folder: str
    soft_prompts: dict[str, int]
    """Virtual tokens by the name that selects the soft prompt."""
    chat: list[str]
    """Names that the chat template selects among."""
    vocabulary: int
    suppression: Suppression
    """What keeps virtual tokens from being generated."""

    @property
    def command(self) -> str:
        """The command that serves the folder."""
        words = ["vllm", "serve", self.folder, "--chat-template-content-format", "string"]
        if len(self.chat) > 1:
            words += ["--default-chat-template-kwargs", json.dumps({CHOICE: self.chat[0]})]
        return shlex.join(words)

    def facts(self) -> dict[str, Any]:
        return asdict(self) | {"command": self.command}

    def lines(self) -> list[str]:
        """The report as lines of text."""
        listed = ", ".join(f"{name} ({tokens} virtual tokens)" for name, tokens in self.soft_prompts.items())
        lines = [f"written to {self.folder}: {listed}, vocabulary {self.vocabulary}", f"serve it with: {self.command}"]
        if len(self.chat) > 1:
            lines.append(f'a request selects a soft prompt with "chat_template_kwargs": {{"{CHOICE}": "{self.chat[-1]}"}}')
        if without := [name for name in self.soft_prompts if name not in self.chat]:
            lines.append(
                f"not in the chat template: {', '.join(without)}, without a template that this tokenizer can render; "
                f"/v1/completions takes their prefix in {LIST} with add_special_tokens = false"
            )
        if not self.suppression.safe:
            lines.append(
                f"warning: vLLM ignores suppress_tokens of the generation config: {self.suppression.mean:.0e} of the tokens "
                "sampled at temperature 2 would be virtual tokens; greedy answers never contain one"
            )
        return lines


def export_for_vllm(registry: Registry, versions: Sequence[Version], folder: str, base_path: str | None = None) -> VllmExport:
    """Write versions and their base as one checkpoint into a new folder, atomically.

    A version is selected by its name or, if there are two of a name, by "name:3".

    Raises:
        UserError: a version is damaged or for another base, or the architecture cannot be merged or vLLM cannot load it.
    """
    check_free(folder)
    versions = list({str(version): version for version in versions}.values())
    many = Counter(version.name for version in versions)
    loaded: dict[str, SoftPrompt] = {}
    base: Base | None = None
    for version in versions:
        each, _ = retrieve(registry, version)
        base = base or base_of(each.card, str(version), base_path)
        check_base(each, str(version), base)
        loaded[version.name if many[version.name] == 1 else str(version)] = each
    assert base is not None, "no version was named"
    return write_for_vllm(loaded, base, Path(folder).expanduser().absolute())


def write_for_vllm(soft_prompts: Mapping[str, SoftPrompt], base: Base, folder: Path) -> VllmExport:
    """Like `export_for_vllm`, for loaded soft prompts of one base by the names that select them."""
    config = base.config.get_text_config()
    if config.model_type in ALWAYS_TIED:
        raise ExportError(
            f"{', '.join(soft_prompts)}: vLLM has no output head of its own for {config.model_type}, and could generate "
            f"virtual tokens; {OTHERWISE}"
        )
    chat: list[str] = []

    def finish(draft: Draft) -> Mapping[str, str]:
        templates = {name: each.card.template for name, each in soft_prompts.items()}
        draft.tokenizer.chat_template, names = write_choice(draft, templates)
        chat.extend(names)
        listed = {
            name: {
                "virtual_tokens": len(draft.ids[name]),
                "first_id": draft.ids[name][0],
                "prefix": "".join([*draft.tokens[name], *draft.front]),
                "card": json.loads(each.card.public().model_dump_json()),
            }
            for name, each in soft_prompts.items()
        }
        return {LIST: json.dumps(listed, indent=1, ensure_ascii=False)}

    written = write_checkpoint(soft_prompts, base, folder, finish)
    sizes = {name: len(ids) for name, ids in written.ids.items()}
    return VllmExport(str(folder), sizes, chat, written.vocabulary, written.suppression)
