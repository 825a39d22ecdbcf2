"""The frozen base: found, checked and described before a weight is read; loaded; fingerprinted."""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from huggingface_hub import snapshot_download
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from ptuning.config import ModelConfig, Table, UserError, quoted, suggest
from ptuning.data.dataset import tokenizer_fingerprint
from ptuning.paths import locate

if TYPE_CHECKING:  # importing it imports scipy, torch's compiler and more: a driver needs none of them
    from transformers import PreTrainedModel

BUILTIN = Path(__file__).parent.parent / "builtin" / "base"
SAMPLE = 4096
"""Bytes read at the beginning, in the middle and at the end of every tensor for the fingerprint."""


class BaseError(UserError):
    """The base is unknown, incomplete, or no decoder-only language model."""


class Fingerprint(Table):
    """SHA-256 of what makes a base this base. Loading it in another dtype or in shares does not change it."""

    config: str
    tokenizer: str
    weights: str


@dataclass(frozen=True)
class Base:
    """A base as it lies on disk."""

    name: str
    revision: str | None
    folder: Path
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    trust_remote_code: bool

    @property
    def width(self) -> int:
        return int(self.config.get_text_config().hidden_size)

    @property
    def context(self) -> int:
        """Most positions; a base that names no limit has none."""
        return int(getattr(self.config.get_text_config(), "max_position_embeddings", None) or 2**31)

    @property
    def vocabulary(self) -> int:
        return int(self.config.get_text_config().vocab_size)

    @cached_property
    def numbers(self) -> int:
        """Parameters in the files, tied ones once."""
        return sum(math.prod(tensor.shape) for tensor in stored_tensors(self.folder))

    @cached_property
    def fingerprint(self) -> Fingerprint:
        return Fingerprint(
            config=_config_hash(self.folder),
            tokenizer=tokenizer_fingerprint(self.tokenizer),
            weights=_weights_hash(self.folder),
        )

    def dtype(self, wanted: str) -> torch.dtype:
        """The dtype to compute in. auto: bfloat16 for 16-bit weights where the hardware computes in it, else float32."""
        if wanted != "auto":
            return cast(torch.dtype, getattr(torch, wanted))
        stored = {tensor.dtype for tensor in stored_tensors(self.folder)}
        return torch.bfloat16 if stored <= {"BF16", "F16"} and computes_in_bfloat16() else torch.float32

    def load(self, dtype: torch.dtype) -> PreTrainedModel:
        """The weights, on the CPU (or partitioned, inside `zero.partitioned`).

        Raises:
            BaseError: the files do not hold all weights.
        """
        model: PreTrainedModel
        report: dict[str, Any]
        disable_progress_bar()  # transformers draws one per process on stderr, whatever it is connected to
        loading: Any = AutoModelForCausalLM.from_pretrained  # typed as if it could only return a model
        model, report = loading(
            self.folder,
            config=self.config,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=self.trust_remote_code,
            output_loading_info=True,
        )
        if report["missing_keys"]:
            missing = ", ".join(sorted(report["missing_keys"])[:3])
            raise BaseError(f"model.path: {self.name} has no weights for {missing}; use a complete checkpoint")
        return model


def find_base(config: ModelConfig) -> Base:
    """Find a base and read all but its weights.

    Raises:
        BaseError: unknown, without safetensors, or no decoder-only model.
    """
    folder = _folder(config)
    if not (folder / "config.json").is_file():
        raise BaseError(f"model.path: {config.path} has no config.json; give a Hugging Face id or a folder with a model")
    _check_code(config, folder)
    if not any(folder.glob("*.safetensors")):
        raise BaseError(f"model.path: {config.path} has no .safetensors file, and nothing else is opened; convert it")
    try:
        described = AutoConfig.from_pretrained(folder, trust_remote_code=config.trust_remote_code, local_files_only=True)
        check_decoder(config.path, described)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=config.trust_remote_code, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        if "custom code" in str(error):
            raise BaseError(
                f"model.path: {config.path} brings its own code, which is not run; choose a base that transformers knows, or "
                "set model.trust_remote_code = true if you trust it"
            ) from None
        reason = str(error).splitlines()[0]
        raise BaseError(f"model.path: {config.path} cannot be used ({reason}); choose another base") from None
    base = Base(config.path, config.revision, folder, described, tokenizer, config.trust_remote_code)
    if tokenizer.eos_token_id is None:
        raise BaseError(f"model.path: the tokenizer of {config.path} has no end token; set eos_token in its files")
    if len(tokenizer) > base.vocabulary:
        raise BaseError(
            f"model.path: the tokenizer of {config.path} has {len(tokenizer)} tokens, its model {base.vocabulary}; "
            "use the tokenizer that belongs to the model"
        )
    return base


def _check_code(config: ModelConfig, folder: Path) -> None:
    """Refuse a folder that asks for code from elsewhere, unless the experiment says that it may.

    `auto_map` alone is no reason: where transformers knows the type it uses its own class, and otherwise it refuses. But the
    name of an attention may be that of a repository of the Hub, from which code is fetched and run, trusted or not, if the
    package `kernels` is installed (5.23, modeling_utils.py).
    """
    if config.trust_remote_code:
        return
    described = _read_json(config, folder)
    for place in (described, *(each for each in described.values() if isinstance(each, dict))):  # a text_config inside, say
        for key, value in place.items():
            if key.strip("_").startswith(("attn_implementation", "experts_implementation")) and _is_foreign(value):
                raise BaseError(
                    f"model.path: {config.path} has {key} = {str(value)[:80]!r} in its config.json, which is code from "
                    "elsewhere; remove it, or set model.trust_remote_code = true if you trust it"
                )


def _is_foreign(value: Any) -> bool:
    return any(map(_is_foreign, value.values())) if isinstance(value, dict) else "/" in str(value)


def _read_json(config: ModelConfig, folder: Path) -> dict[str, Any]:
    try:
        described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        described = None
    if not isinstance(described, dict):
        raise BaseError(f"model.path: {config.path} has a config.json that is no JSON object; take another copy")
    return described


def _folder(config: ModelConfig) -> Path:
    if config.path == "builtin":
        return BUILTIN
    folder = locate(config.path)
    if folder.is_dir():
        return folder.absolute()
    if config.path.count("/") != 1 or config.path.startswith((".", "/", "~")):
        fix = suggest(config.path, ["builtin"], "correct the path", shown=quoted)
        raise BaseError(f"model.path: {config.path} is no folder here and no Hugging Face id; {fix}")
    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    if config.trust_remote_code:
        patterns.append("*.py")
    try:
        return Path(snapshot_download(config.path, revision=config.revision, allow_patterns=patterns))
    except Exception as error:  # the hub client raises many kinds: offline, unknown, gated; the user's fix is the same
        reason = str(error).splitlines()[0]
        raise BaseError(
            f"model.path: {config.path} was not found on the Hugging Face Hub or in its cache ({reason}); "
            "check the id, log in, or give a folder"
        ) from None


def check_decoder(path: str, config: PretrainedConfig) -> None:
    names = config.architectures or []
    decoder = any("CausalLM" in name or "LMHeadModel" in name for name in names) or not names
    if config.is_encoder_decoder or not decoder or type(config) not in AutoModelForCausalLM._model_mapping:
        kind = names[0] if names else config.model_type
        raise BaseError(f"model.path: {path} is a {kind}, not a decoder-only language model; choose a causal LM")


def computes_in_bfloat16() -> bool:
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a safetensors file: where its bytes lie."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int

    def read(self, offset: int, size: int) -> bytes:
        with self.file.open("rb") as stream:
            stream.seek(self.start + offset)
            return stream.read(size)


def stored_tensors(folder: Path) -> Iterator[StoredTensor]:
    """All tensors of a folder's safetensors files, by file and place; only the headers are read.

    Format: https://huggingface.co/docs/safetensors (8 bytes of header length, JSON header, data).
    """
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            prefix = stream.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= length <= min(os.path.getsize(file) - 8, 100_000_000):
                raise BaseError(f"{file}: is no safetensors file (header of {length} bytes); take another copy")
            header: dict[str, Any] = json.loads(stream.read(length))
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                yield StoredTensor(name, file, entry["dtype"], tuple(entry["shape"]), 8 + length + begin, end - begin)


def _weights_hash(folder: Path) -> str:
    """Hash of every tensor's name, dtype, shape and sampled bytes, whatever files they are spread over."""
    digest = hashlib.sha256()
    for tensor in sorted(stored_tensors(folder), key=lambda tensor: tensor.name):
        digest.update(f"{tensor.name} {tensor.dtype} {tensor.shape}\n".encode())
        for offset in sorted({0, max(0, tensor.size // 2 - SAMPLE // 2), max(0, tensor.size - SAMPLE)}):
            digest.update(tensor.read(offset, min(SAMPLE, tensor.size - offset)))
    return digest.hexdigest()


def _config_hash(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    volatile = {"transformers_version", "torch_dtype", "dtype", "_name_or_path", "use_cache", "_attn_implementation"}
    kept = {key: value for key, value in config.items() if key not in volatile}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


STORED_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def stored_values(tensor: StoredTensor, first: int, count: int) -> Tensor:
    """Numbers `first .. first + count` of a stored tensor, flattened, `[count]` fp32."""
    dtype = STORED_DTYPES[tensor.dtype]
    width = torch.finfo(dtype).bits // 8
    return torch.frombuffer(bytearray(tensor.read(first * width, count * width)), dtype=dtype).float()
