"""Writes a base with soft prompts as one plain Hugging Face checkpoint.

The vocabulary is extended by the virtual tokens `<|NAME:0|>` ..., whose embeddings are the vectors of the soft prompts. Of a
multimodal base, the text part is written if transformers can load it alone, else all of it. `token_suppression` prevents the
generation of virtual tokens. The checkpoint is loaded again and compared before it gets its name (`merged_check`).
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import AddedToken
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ptuning.data.chat_encoder import make_encoder
from ptuning.data.encoder import Encoder
from ptuning.imports import load_deepspeed
from ptuning.model.base import Base, listed_ends
from ptuning.model.compatibility import next_logits
from ptuning.model.eight_bits import restored
from ptuning.model.input_embedding import InputEmbedding
from ptuning.model.safetensors_files import STORED_DTYPES, stored_tensors
from ptuning.model.self_check import find_input
from ptuning.model.soft_prompt import SoftPrompt
from ptuning.model.text_head import is_listed
from ptuning.registry import token_suppression
from ptuning.registry.merged_chat import PROBES, Draft
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
from ptuning.registry.token_suppression import Suppression
from ptuning.settings.data import Template

STATES_OF = 4
"""Of this many soft prompts the states are computed that virtual tokens are suppressed at."""


@dataclass(frozen=True)
class Checkpoint:
    """What was written."""

    vocabulary: int
    untied: bool
    """The base ties input embedding and output head; the checkpoint has two matrices."""
    suppression: Suppression
    """What keeps virtual tokens from being generated."""
    ids: Mapping[str, list[int]]


def write_checkpoint(
    soft_prompts: Mapping[str, SoftPrompt], base: Base, folder: Path, finish: Callable[[Draft], Mapping[str, str]]
) -> Checkpoint:
    """Write soft prompts and their base as one checkpoint into a new folder, atomically. `finish` sets the chat template, and
    returns further files: name -> text.

    Raises:
        ExportError: the architecture cannot be merged.
    """
    names = ", ".join(soft_prompts)
    dtype = _stored_dtype(base)
    for name, each in soft_prompts.items():
        _check_vectors(name, each, dtype)
    vectors = torch.cat([each.vectors.to(dtype) for each in soft_prompts.values()])
    plain = base.tokenizer
    front = _in_front(plain)
    tokens = {name: [f"<|{name}:{place}|>" for place in range(len(each.vectors))] for name, each in soft_prompts.items()}
    whole = not is_listed(base.config)
    model = _load_whole(base, dtype, names) if whole else base.load(dtype).eval()
    restored(model)
    texts = [list(plain(text)["input_ids"]) for text in PROBES]
    with merging(names, type(model).__name__):
        feeding = find_input(model)
        expected = torch.stack(
            [
                next_logits(model, each.vectors, torch.tensor([text]), feeding).float()
                for each in soft_prompts.values()
                for text in texts
            ]
        )
        tokenizer = AutoTokenizer.from_pretrained(
            base.folder, trust_remote_code=base.trust_remote_code
        )  # a new copy, which is modified
        ids = {name: _add_tokens(tokenizer, tokens[name], name) for name in soft_prompts}
        virtual = [token for each in ids.values() for token in each]
        untied = grow(model, virtual, vectors, feeding.needs_ids)
        rows = [[*each, *text] for each in ids.values() for text in texts]
        check_logits(model, virtual, last_logits(model, rows), expected, names)
        feeding = InputEmbedding(model, feeding.needs_ids)  # of the grown embedding
        first = cast(list[int], plain.convert_tokens_to_ids(front))
        sampled = [each.vectors for each in soft_prompts.values()][:STATES_OF]
        states = token_suppression.hidden_states(model, feeding, sampled, first, min(len(plain), base.vocabulary))
        # A tokenizer may have tokens without a row, which get one here, too: they must stay impossible.
        never = sorted({*virtual, *range(base.vocabulary, max(virtual) + 1)})
        guarded = token_suppression.suppress(model, never, states)
        found = last_logits(model, rows)
        check_suppressed(model, virtual, found, names)
    tokenizer.padding_side = "left"  # generation continues at the right end
    files = finish(Draft(tokenizer, plain, tokens, ids, front))
    model.generation_config = _generation(model, base, virtual, soft_prompts)
    with _new_folder(folder) as temporary, merging(names, type(model).__name__):
        _save(model, temporary, untied)
        tokenizer.save_pretrained(temporary)
        for file, text in files.items():
            (temporary / file).write_text(text, encoding="utf-8")
        kind: Any = type(model) if whole else AutoModelForCausalLM
        del model  # only one of the two has to fit into memory
        if whole:
            _copy_processors(base.folder, temporary)
        check_written(kind, temporary, dtype, rows, found, virtual, names, base.trust_remote_code)
    return Checkpoint(found.shape[1], untied, guarded, ids)


def _check_vectors(name: str, loaded: SoftPrompt, dtype: torch.dtype) -> None:
    if loaded.card.kind == "kv":
        raise ExportError(f"{name}: is a key-value prefix, and a checkpoint has no place for keys and values; {OTHERWISE}")
    if not bool(torch.isfinite(loaded.vectors.to(dtype)).all()):
        raise ExportError(f"{name}: its vectors are not finite in {dtype}, in which its base is stored; it cannot be merged")


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


def _generation(
    model: PreTrainedModel, base: Base, virtual: list[int], soft_prompts: Mapping[str, SoftPrompt]
) -> GenerationConfig:
    """The generation config: the base's settings, all its end tokens, and `suppress_tokens` with the virtual tokens."""
    settings = model.generation_config or GenerationConfig()
    cards = [each.card for each in soft_prompts.values()]
    own = [make_encoder(card.template, base.tokenizer, 2**31).end for card in cards if card.template]  # ends of turns
    ends = listed_ends(base.tokenizer.eos_token_id, settings.eos_token_id, getattr(model.config, "eos_token_id", None), own)
    settings.eos_token_id = ends if len(ends) > 1 else ends[0]
    settings.pad_token_id = base.tokenizer.eos_token_id if settings.pad_token_id is None else settings.pad_token_id
    settings.suppress_tokens = [*(settings.suppress_tokens or []), *virtual]
    longest = [card.max_new_tokens for card in cards if card.max_new_tokens]
    if len(longest) == len(cards):
        settings.max_new_tokens = max(longest)
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
