"""Exports a base with one soft prompt as a plain Hugging Face checkpoint, for servers without support for soft prompts.

The vocabulary is extended by the virtual tokens `<|NAME:0|>` ..., whose embeddings are the soft prompt's vectors. The tokenizer
prepends them to every text, before its own special tokens, as in ptuning's own pass. So does the chat template (`merged_chat`).
Of a multimodal base, the text part is exported if transformers can load it alone, else all of it. `token_suppression` prevents
the generation of virtual tokens. The export is loaded again and compared before it gets its name (`merged_check`).
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import AddedToken, processors
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ptuning.data.chat_encoder import make_encoder
from ptuning.data.encoder import Encoder
from ptuning.imports import load_deepspeed
from ptuning.model.base import Base, listed_ends
from ptuning.model.compatibility import base_of, check_base, next_logits
from ptuning.model.eight_bits import restored
from ptuning.model.input_embedding import InputEmbedding
from ptuning.model.safetensors_files import STORED_DTYPES, stored_tensors
from ptuning.model.self_check import find_input
from ptuning.model.soft_prompt import Card, SoftPrompt
from ptuning.model.text_head import is_listed
from ptuning.registry import token_suppression
from ptuning.registry.merged_chat import PROBES, set_chat_template
from ptuning.registry.merged_check import (
    OTHERWISE,
    ExportError,
    check_logits,
    check_suppressed,
    check_written,
    last_logits,
    merging,
)
from ptuning.registry.merged_rows import grow
from ptuning.registry.publish import check_free, retrieve
from ptuning.registry.registry import Registry, Version
from ptuning.registry.token_suppression import Suppression
from ptuning.settings.data import Template


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
    if loaded.card.kind == "kv":
        raise ExportError(f"{version}: is a key-value prefix, and a checkpoint has no place for keys and values; {OTHERWISE}")
    return write_merged(loaded, base, version.name, Path(folder).expanduser().absolute())


def write_merged(loaded: SoftPrompt, base: Base, name: str, folder: Path) -> Merged:
    """Like `export_merged`, for a loaded soft prompt."""
    dtype = _stored_dtype(base)
    vectors = loaded.vectors.to(dtype)
    if not bool(torch.isfinite(vectors).all()):
        raise ExportError(f"{name}: its vectors are not finite in {dtype}, in which its base is stored; it cannot be merged")
    plain = base.tokenizer
    front = _in_front(plain)
    tokens = [f"<|{name}:{place}|>" for place in range(len(vectors))]
    whole = not is_listed(base.config)
    model = _load_whole(base, dtype, name) if whole else base.load(dtype).eval()
    restored(model)
    texts = [list(plain(text)["input_ids"]) for text in PROBES]
    with merging(name, type(model).__name__):
        feeding = find_input(model)
        expected = torch.stack([next_logits(model, loaded.vectors, torch.tensor([text]), feeding).float() for text in texts])
        tokenizer = AutoTokenizer.from_pretrained(
            base.folder, trust_remote_code=base.trust_remote_code
        )  # a new copy, which is modified
        ids = _add_tokens(tokenizer, tokens, name)
        untied = grow(model, ids, vectors, feeding.needs_ids)
        rows = [[*ids, *text] for text in texts]
        check_logits(model, ids, last_logits(model, rows), expected, name)
        feeding = InputEmbedding(model, feeding.needs_ids)  # of the grown embedding
        first = cast(list[int], plain.convert_tokens_to_ids(front))
        states = token_suppression.hidden_states(model, feeding, loaded.vectors, first, min(len(plain), base.vocabulary))
        # A tokenizer may have tokens without a row, which get one here, too: they must stay impossible.
        never = sorted({*ids, *range(base.vocabulary, max(ids) + 1)})
        guarded = token_suppression.suppress(model, never, states)
        found = last_logits(model, rows)
        check_suppressed(model, ids, found, name)
    tokenizer.padding_side = "left"  # generation continues at the right end
    prepends = _prepend(tokenizer, tokens, ids)
    chat = set_chat_template(tokenizer, plain, loaded.card.template, [*tokens, *front], ids)
    model.generation_config = _generation(model, base, ids, loaded.card)
    with _new_folder(folder) as temporary, merging(name, type(model).__name__):
        _save(model, temporary, untied)
        tokenizer.save_pretrained(temporary)
        (temporary / "soft_prompt_card.json").write_text(loaded.card.public().model_dump_json(indent=1), encoding="utf-8")
        kind: Any = type(model) if whole else AutoModelForCausalLM
        del model  # only one of the two has to fit into memory
        if whole:
            _copy_processors(base.folder, temporary)
        check_written(kind, temporary, dtype, rows, found, ids, name, base.trust_remote_code)
        prepends = prepends and _prepends(AutoTokenizer.from_pretrained(temporary), plain, ids)
    return Merged(len(tokens), found.shape[1], untied, guarded, prepends, chat, base.stored_in)


def _load_whole(base: Base, dtype: torch.dtype, name: str) -> PreTrainedModel:
    """The whole multimodal model: transformers has no class that could load its text part alone."""
    if base.quantization or base.stored_in:
        raise ExportError(f"{name}: the text part of {base.name} is quantised and cannot be written alone; {OTHERWISE}")
    return base.load_whole(dtype).eval()


def _copy_processors(source: Path, folder: Path) -> None:
    """The settings by which images, audio and video become inputs."""
    for file in source.glob("*processor_config.json"):
        shutil.copyfile(file, folder / file.name)


def _stored_dtype(base: Base) -> torch.dtype:
    """The dtype of a base's files; float32 if they mix several."""
    stored = {tensor.dtype for tensor in stored_tensors(base.folder) if tensor.dtype in STORED_DTYPES}
    return STORED_DTYPES[stored.pop()] if len(stored) == 1 else torch.float32


def _in_front(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The special tokens that the tokenizer prepends to a text."""
    ids = Encoder(Template(input="{text}", target="{text}"), tokenizer, 2**31).input_ids({"text": "a"})
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    return [str(token) for token in tokenizer.convert_ids_to_tokens(ids[: len(ids) - len(bare)])]


def _add_tokens(tokenizer: PreTrainedTokenizerBase, tokens: list[str], name: str) -> list[int]:
    """Add the virtual tokens as special tokens: they are never split, and skipped in decoded text."""
    known = tokenizer.get_vocab()
    if any(token in known for token in tokens):
        raise ExportError(f"{name}: its base already has a token {tokens[0]}; publish the soft prompt under another name")
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in tokens], special_tokens=True)
    numbers = tokenizer.get_vocab()
    return [numbers[token] for token in tokens]


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


def _generation(model: PreTrainedModel, base: Base, ids: list[int], card: Card) -> GenerationConfig:
    """The generation config: the base's settings, all its end tokens, and `suppress_tokens` with the virtual tokens."""
    settings = model.generation_config or GenerationConfig()
    own = make_encoder(card.template, base.tokenizer, 2**31).end if card.template else None  # a conversation's end of turn
    ends = listed_ends(base.tokenizer.eos_token_id, settings.eos_token_id, getattr(model.config, "eos_token_id", None), own)
    settings.eos_token_id = ends if len(ends) > 1 else ends[0]
    settings.pad_token_id = base.tokenizer.eos_token_id if settings.pad_token_id is None else settings.pad_token_id
    settings.suppress_tokens = [*(settings.suppress_tokens or []), *ids]
    if card.max_new_tokens:
        settings.max_new_tokens = card.max_new_tokens
    return settings


def _save(model: PreTrainedModel, folder: Path, untied: bool) -> None:
    # save_pretrained imports DeepSpeed if it is installed, which then searches for an accelerator and warns of what it finds,
    # unless it was imported before with the accelerator set.
    load_deepspeed()
    weights: dict[str, Tensor] | None = None
    if untied:
        # What a config unties, it unties everywhere, such as the shared blocks of Zamba: every name is saved.
        weights, known = {}, set()
        for name, tensor in model.state_dict().items():
            weights[name] = tensor.clone() if tensor.data_ptr() in known else tensor
            known.add(tensor.data_ptr())
    model.save_pretrained(folder, state_dict=weights)


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder`, which is renamed to it if everything in it is right, and removed otherwise."""
    temporary = folder.parent / f".{folder.name}.{uuid.uuid4().hex}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        if folder.exists():
            folder.rmdir()  # empty
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
