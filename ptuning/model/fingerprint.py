"""Fingerprints, which tell whether two bases, tokenizers or data sets are the same."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ptuning.model.safetensors_files import stored_tensors
from ptuning.settings.fields import Table


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of everything that determines a tokenizer's ids; equal in every process and after saving and loading."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # a tokenizer written in Python
        rules: dict[str, Any] = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    else:
        rules = json.loads(backend.to_str())
        # State of the last call, not part of the tokenizer.
        del rules["truncation"], rules["padding"]
    return json_hash([rules, {name: str(token) for name, token in tokenizer.special_tokens_map.items()}])


def json_hash(value: object) -> str:
    """SHA-256 of a value as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


SAMPLE = 4096
"""Bytes that the fingerprint reads at the beginning, the middle and the end of every tensor."""


class Fingerprint(Table):
    """SHA-256 hashes that identify a base, and how it is stored in memory if that is in 8 bits. They do not depend on its dtype
    or partitioning."""

    config: str
    tokenizer: str
    weights: str
    quantization: str | None = None

    def parts(self) -> dict[str, str]:
        """As plain data."""
        return self.model_dump(exclude_none=True)


def weights_hash(folder: Path) -> str:
    """Hash of every tensor's name, dtype, shape and sampled bytes. How tensors are split into files does not matter."""
    digest = hashlib.sha256()
    for tensor in sorted(stored_tensors(folder), key=lambda tensor: tensor.name):
        digest.update(f"{tensor.name} {tensor.dtype} {tensor.shape}\n".encode())
        for offset in sorted({0, max(0, tensor.size // 2 - SAMPLE // 2), max(0, tensor.size - SAMPLE)}):
            digest.update(tensor.read(offset, min(SAMPLE, tensor.size - offset)))
    return digest.hexdigest()


def config_hash(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    volatile = {"transformers_version", "torch_dtype", "dtype", "_name_or_path", "use_cache", "_attn_implementation"}
    kept = {key: value for key, value in config.items() if key not in volatile}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
