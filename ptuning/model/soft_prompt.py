"""A soft prompt: `[P, H]` vectors and a card that describes them. Saving and loading.

The folder is a PEFT prompt-tuning adapter (`PeftModel.from_pretrained` reads it unchanged) with an additional card. Only
safetensors and JSON are opened.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, cast, get_args

import safetensors
import safetensors.torch
import torch
from pydantic import ValidationError, field_validator
from torch import Tensor

from ptuning import storage
from ptuning.errors import UserError
from ptuning.paths import SCHEME
from ptuning.redaction import last_name, redacted
from ptuning.settings.data import Template
from ptuning.settings.fields import EightBits, Kind, Table

CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "card.json"

TENSOR = "prompt_embeddings"

PEFT_TYPES: dict[Kind, str] = {"embedding": "PROMPT_TUNING", "kv": "PREFIX_TUNING"}
READABLE = (*PEFT_TYPES.values(), "CARTRIDGE")
"""PEFT's types that hold nothing but vectors; a cartridge is stored as a prefix."""

VERSIONS = ("ptuning", "torch", "transformers", "deepspeed", "ray")

LARGEST = 1 << 30
"""Maximum size of a weights file in bytes."""

PUBLIC_SETTINGS = {
    "prompt": ("kind", "length", "init", "init_text", "frozen"),
    "train": (
        *("learning_rate", "optimizer", "weight_decay", "schedule", "warmup", "clip", "seed"),
        *("batch_size", "steps", "evaluate_every", "patience", "metric"),
        *("objective", "text_weight", "class_weights", "average_decay", "starts"),
    ),
}
"""The settings in a card that every receiver of the soft prompt may know. An allow list: new settings are not public."""


class SoftPromptError(UserError):
    """A folder that is not a soft prompt, or a soft prompt that does not fit."""


class Card(Table):
    """The origin of a soft prompt, and the base it fits."""

    format: Literal[1] = 1
    name: str
    base: str
    """The base as named in the experiment."""
    revision: str | None = None
    base_fingerprint: dict[str, str] | None = None
    """SHA-256 of the base's config, tokenizer and weights, and `quantization` if it was stored in 8 bits; None if unknown (made
    by another tool)."""
    base_notes: tuple[str, ...] = ()
    """How the base differs from its files: only its text part is loaded, it is dequantised, or stored in 8 bits."""
    dtype: str | None = None
    """The dtype of the base in training."""
    training_pass: Literal["shared-prefix", "concatenated"] | None = None
    """shared-prefix: computed once for all rows of a step; concatenated: with every row, where the base allows nothing else."""
    kind: Kind = "embedding"
    kv_shape: tuple[int, int, int] | None = None
    """Layers, key heads and their width, of kind kv."""
    length: int
    width: int
    """Of the base's embeddings."""
    template: Template | None = None
    max_new_tokens: int | None = None
    """Tokens of the longest training target, end token included."""
    init: str | None = None
    metrics: dict[str, float] = {}
    data: dict[str, str] = {}
    """Fingerprint of each split."""
    experiment: dict[str, Any] | None = None
    parent: str | None = None
    """Content hash of the soft prompt that this one was initialised from."""
    versions: dict[str, str] = {}
    content_hash: str
    """SHA-256 of the vectors."""

    @field_validator("template", mode="before")
    @classmethod
    def _of_earlier_versions(cls, value: Any) -> Any:
        return Template.of_card(value)

    @field_validator("base", "experiment")
    @classmethod
    def _without_passwords(cls, value: Any) -> Any:
        """Also applied to cards that are read: cards of earlier versions may contain passwords."""
        return redacted(value)

    @property
    def quantization(self) -> EightBits | None:
        """How the base was stored."""
        known = (self.base_fingerprint or {}).get("quantization")
        return cast(EightBits, known) if known in get_args(EightBits) else None

    def public(self) -> Card:
        """The card for receivers of the soft prompt: no paths, and only the settings that determined the vectors."""
        tables = self.experiment or {}
        kept = {
            table: {key: tables[table][key] for key in keys if key in tables[table]}
            for table, keys in PUBLIC_SETTINGS.items()
            if isinstance(tables.get(table), dict)
        }
        return self.model_copy(update={"base": public_base(self.base), "experiment": kept or None})


@dataclass(frozen=True, eq=False)
class SoftPrompt:
    """Vectors fp32 and their card: `[P, H]`, or of kind kv `[P, layers, 2, heads, d]`."""

    vectors: Tensor
    card: Card

    def save(self, folder: str, *, layers: int = 0, heads: int = 0) -> None:
        """Write the folder atomically. `layers` and `heads` of the base are only needed for PEFT's config."""
        adapter: dict[str, Any] = {
            "peft_type": PEFT_TYPES[self.card.kind],
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self.card.base,
            "revision": self.card.revision,
            "inference_mode": True,
            "num_virtual_tokens": self.card.length,
            "token_dim": self.card.width,
            "num_transformer_submodules": 1,
            "num_attention_heads": heads,
            "num_layers": layers,
        }
        if self.card.kv_shape:
            layers, heads, width = self.card.kv_shape
            adapter |= {
                "num_layers": layers,
                "num_attention_heads": heads,
                "token_dim": heads * width,
                "encoder_hidden_size": None,
                "prefix_projection": False,
            }
        else:
            adapter["prompt_tuning_init"] = "RANDOM"
        vectors = self.vectors.detach().float().cpu().flatten(1).contiguous()
        storage.write_folder(
            folder,
            {
                CONFIG: json.dumps(adapter, indent=1).encode(),
                WEIGHTS: safetensors.torch.save({TENSOR: vectors}, {"format": "pt"}),
                CARD: self.card.model_dump_json(indent=1).encode(),
            },
        )


def content_hash(vectors: Tensor) -> str:
    """SHA-256 of the vectors' shape and fp32 bytes."""
    whole = vectors.detach().float().cpu().contiguous()
    return hashlib.sha256(str(tuple(whole.shape)).encode() + whole.numpy().tobytes()).hexdigest()


def versions() -> dict[str, str]:
    """Versions of the libraries that a soft prompt is made with, as far as they are installed."""
    found = {}
    for name in VERSIONS:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def load(folder: str) -> SoftPrompt:
    """Read a soft prompt, or a PEFT adapter of prompt or prefix tuning made by another tool (its card is then mostly empty).

    Raises:
        SoftPromptError, StorageError: the folder is not a soft prompt, is damaged, or its vectors are not finite.
    """
    _check_size(folder)
    if storage.exists(folder, storage.MANIFEST):
        files = storage.read_folder(folder)
        config, weights, card = (files.get(name) for name in (CONFIG, WEIGHTS, CARD))
        if config is None or weights is None:
            raise SoftPromptError(
                f"{folder}: is not a soft prompt (no {CONFIG} or {WEIGHTS} in its manifest); choose another folder"
            )
    else:
        config, weights = storage.read_file(folder, CONFIG), _read_weights(folder)
        card = storage.read_file(folder, CARD) if storage.exists(folder, CARD) else None
    adapter = _parse_adapter(folder, config)
    vectors = _parse_weights(folder, weights, adapter)
    if card is None:
        name = Path(folder.rstrip("/")).name
        base = str(adapter.get("base_model_name_or_path") or "unknown")
        own = Card(
            name=name,
            base=base,
            kind="kv" if vectors.ndim > 2 else "embedding",
            kv_shape=_kv_shape(vectors),
            length=len(vectors),
            width=vectors.shape[1] if vectors.ndim == 2 else 0,
            content_hash=content_hash(vectors),
        )
        return SoftPrompt(vectors, own)
    try:
        known = Card.model_validate_json(card)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise SoftPromptError(f"{folder}: {CARD} is not valid ({where}: {problem['msg']}); use another copy") from None
    shape = (known.length,) if known.kind == "kv" else (known.length, known.width)
    matches = tuple(vectors.shape[: len(shape)]) == shape and _kv_shape(vectors) == known.kv_shape
    if not matches or known.content_hash != content_hash(vectors):
        raise SoftPromptError(f"{folder}: the vectors do not match the card; use another copy of this folder")
    return SoftPrompt(vectors, known)


def public_base(name: str) -> str:
    """The public name of a base: its id or, for a folder, the last name of its path."""
    local = name.startswith(("/", "~", ".", SCHEME)) or name.count("/") > 1 or "\\" in name
    return last_name(name.removeprefix(SCHEME).replace("\\", "/")) if local else name


def without_passwords(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """The files of a soft prompt, with the card as `load` reads it: the stored card of an earlier version may hold
    passwords."""
    if CARD not in files:
        return dict(files)
    written = json.loads(files[CARD])
    clean = {**written, **{key: redacted(written[key]) for key in ("base", "experiment") if key in written}}
    return {**files, CARD: json.dumps(clean, indent=1).encode()} if clean != written else dict(files)


def public_files(soft_prompt: SoftPrompt, files: Mapping[str, bytes]) -> dict[str, bytes]:
    """The files of a soft prompt for others, with the public card."""
    adapter = json.loads(files[CONFIG])
    paths = {key: public_base(value) for key, value in adapter.items() if key.endswith("_path") and isinstance(value, str)}
    public = {**adapter, **paths}
    return {
        CONFIG: json.dumps(public, indent=1).encode() if public != adapter else files[CONFIG],
        WEIGHTS: files[WEIGHTS],
        CARD: soft_prompt.card.public().model_dump_json(indent=1).encode(),
    }


def _check_size(folder: str) -> None:
    """Check the size before anything is read into memory."""
    system, path = storage.resolve(folder)
    size = system.get_file_info(f"{path}/{WEIGHTS}").size or 0
    if size > LARGEST:
        raise SoftPromptError(f"{folder}: {WEIGHTS} has {size} bytes, too many for a soft prompt; choose another folder")


def _read_weights(folder: str) -> bytes:
    if not storage.exists(folder, WEIGHTS):
        raise SoftPromptError(f"{folder}: has no {WEIGHTS}, the only format that is opened; save the adapter as safetensors")
    return storage.read_file(folder, WEIGHTS)


def _parse_adapter(folder: str, content: bytes) -> dict[str, Any]:
    try:
        adapter: dict[str, Any] = json.loads(content)
        kind = adapter["peft_type"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise SoftPromptError(
            f"{folder}: is not a soft prompt ({CONFIG} is not a PEFT config); choose another folder"
        ) from None
    if kind not in READABLE:
        raise SoftPromptError(
            f"{folder}: is a PEFT adapter of type {kind}, not {' or '.join(READABLE)}; train a soft prompt instead"
        )
    if adapter.get("prefix_projection"):
        raise SoftPromptError(
            f"{folder}: is prefix tuning with a projection (prefix_projection), whose network is not stored; "
            "train it without one"
        )
    return adapter


def _parse_weights(folder: str, content: bytes, adapter: dict[str, Any]) -> Tensor:
    try:
        # With a duplicate key, two readers could see different tensors.
        json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")], object_pairs_hook=_each_once)
        tensors = safetensors.torch.load(content)
    except (safetensors.SafetensorError, ValueError, KeyError, RecursionError) as error:
        raise SoftPromptError(f"{folder}: {WEIGHTS} is not a safetensors file ({error}); use another copy") from None
    if set(tensors) != {TENSOR}:
        raise SoftPromptError(
            f"{folder}: {WEIGHTS} must contain the single tensor {TENSOR}, not {sorted(tensors)}; use another copy"
        )
    vectors = tensors[TENSOR]
    names = ("num_virtual_tokens", "token_dim", "num_layers", "num_attention_heads")
    sizes: list[Any] = [adapter.get(name) for name in names]
    length, width, layers, heads = sizes
    prefix = adapter["peft_type"] != PEFT_TYPES["embedding"]
    if prefix:
        if not all(isinstance(each, int) and each > 0 for each in sizes) or width % heads:
            raise SoftPromptError(
                f"{folder}: {CONFIG} has no sizes of a key-value prefix (num_layers, num_attention_heads, token_dim); "
                "use another copy"
            )
        width = layers * 2 * width
    expected = (length, width)
    if vectors.ndim != 2 or tuple(vectors.shape) != expected or not vectors.is_floating_point() or not len(vectors):
        raise SoftPromptError(
            f"{folder}: {TENSOR} is {vectors.dtype} {tuple(vectors.shape)}, but {CONFIG} says {expected}; use another copy"
        )
    vectors = vectors.float()
    if not bool(torch.isfinite(vectors).all()):
        raise SoftPromptError(f"{folder}: {TENSOR} is not finite; train it again with a lower learning rate")
    return vectors.unflatten(1, (layers, 2, heads, -1)) if prefix else vectors


def _kv_shape(vectors: Tensor) -> tuple[int, int, int] | None:
    """Layers, key heads and their width of a key-value prefix."""
    return (vectors.shape[1], vectors.shape[3], vectors.shape[4]) if vectors.ndim > 2 else None


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key is given twice")
    return dict(pairs)
