"""Exports a base with one soft prompt as a plain checkpoint, for servers without support for soft prompts.

The tokenizer prepends the virtual tokens to every text, before its own special tokens, as in ptuning's own pass. So does the
chat template (`merged_chat`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tokenizers import processors
from transformers import AutoTokenizer
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ptuning.model.base import Base
from ptuning.model.compatibility import base_of, check_base
from ptuning.model.soft_prompt import SoftPrompt
from ptuning.registry.merged_chat import PROBES, Draft, write_chat_template
from ptuning.registry.merged_checkpoint import write_checkpoint
from ptuning.registry.publish import check_free, retrieve
from ptuning.registry.registry import Registry, Version
from ptuning.registry.token_suppression import Suppression


@dataclass(frozen=True)
class Merged:
    """Result of a merged export."""

    tokens: int
    """Virtual tokens."""
    vocabulary: int
    untied: bool
    """The base ties input embedding and output head; the export has two matrices."""
    suppression: Suppression
    """What keeps virtual tokens from being generated."""
    prepends: bool
    """The tokenizer puts the virtual tokens in front of every text."""
    chat: bool
    """There is a chat template."""
    quantization: str | None = None
    """The base was stored in 8 bits: the weights are those that it means."""

    def facts(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self, name: str, folder: str) -> list[str]:
        """The report as lines of text."""
        lines = [f"{name} merged into {folder}: {self.tokens} virtual tokens, vocabulary {self.vocabulary}"]
        if self.quantization:
            lines.append(f"its weights are those that the base stored in {self.quantization} means, in the dtype of its files")
        if self.untied:
            lines.append("the output head is no longer tied to the embedding; engines that always tie them cannot load it")
        if not self.suppression.safe:
            lines.append(
                f"warning: with an engine that ignores suppress_tokens of the generation config, {self.suppression.mean:.0e} "
                "of the tokens sampled at temperature 2 would be virtual tokens (transformers honours it); suppress them there"
            )
        if not self.prepends:
            lines.append("warning: this tokenizer cannot prepend the virtual tokens; begin every text with all of them")
        if not self.chat:
            lines.append("no chat template: the card has no template, or this tokenizer would split its text differently")
        return lines


def export_merged(registry: Registry, version: Version, folder: str, base_path: str | None = None) -> Merged:
    """Write a version and its base as one checkpoint into a new folder, atomically.

    Raises:
        UserError: the version is damaged or for another base, or the architecture cannot be merged.
    """
    check_free(folder)
    loaded, _ = retrieve(registry, version)
    base = base_of(loaded.card, str(version), base_path)
    check_base(loaded, str(version), base)
    return write_merged(loaded, base, version.name, Path(folder).expanduser().absolute())


def write_merged(loaded: SoftPrompt, base: Base, name: str, folder: Path) -> Merged:
    """Like `export_merged`, for a loaded soft prompt."""
    prepends = chat = False

    def finish(draft: Draft) -> Mapping[str, str]:
        nonlocal prepends, chat
        prepends = _prepend(draft.tokenizer, draft.tokens[name], draft.ids[name])
        draft.tokenizer.chat_template = write_chat_template(draft, name, loaded.card.template)
        chat = draft.tokenizer.chat_template is not None
        return {"soft_prompt_card.json": loaded.card.public().model_dump_json(indent=1)}

    written = write_checkpoint({name: loaded}, base, folder, finish)
    ids = written.ids[name]
    prepends = prepends and _prepends(AutoTokenizer.from_pretrained(folder), base.tokenizer, ids)
    return Merged(len(ids), written.vocabulary, written.untied, written.suppression, prepends, chat, base.stored_in)


def _prepend(tokenizer: PreTrainedTokenizerBase, tokens: list[str], ids: list[int]) -> bool:
    """Make the tokenizer prepend the virtual tokens to every text; False if it is a Python tokenizer, which cannot."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return False
    # One special token of the template stands for all of them; its name must not contain a colon.
    front: Any = {"id": "soft_prompt", "ids": ids, "tokens": tokens}
    virtual = processors.TemplateProcessing(
        single=["soft_prompt", "$A"], pair=["soft_prompt", "$A", "$B:1"], special_tokens=[front]
    )
    own = backend.post_processor
    backend.post_processor = processors.Sequence([own, virtual]) if own is not None else virtual
    return True


def _prepends(tokenizer: PreTrainedTokenizerBase, plain: PreTrainedTokenizerBase, ids: list[int]) -> bool:
    return all(tokenizer(text)["input_ids"] == [*ids, *plain(text)["input_ids"]] for text in PROBES)
