"""The frozen base: finding, checking and describing it without reading weights; loading; fingerprints."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from ptuning.config import ModelConfig, quoted
from ptuning.errors import BaseError, UserError, suggest
from ptuning.model.fingerprint import Fingerprint, config_hash, tokenizer_fingerprint, weights_hash
from ptuning.model.safetensors_files import stored_tensors
from ptuning.paths import locate

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BUILTIN = Path(__file__).parent.parent / "builtin" / "base"


@dataclass(frozen=True)
class Base:
    """A base on disk."""

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
        """Maximum number of positions; practically unlimited if the base's config gives no limit."""
        return int(getattr(self.config.get_text_config(), "max_position_embeddings", None) or 2**31)

    @property
    def vocabulary(self) -> int:
        return int(self.config.get_text_config().vocab_size)

    @cached_property
    def numbers(self) -> int:
        """Number of parameters in the files; tied ones count once."""
        return sum(math.prod(tensor.shape) for tensor in stored_tensors(self.folder))

    @cached_property
    def fingerprint(self) -> Fingerprint:
        return Fingerprint(
            config=config_hash(self.folder),
            tokenizer=tokenizer_fingerprint(self.tokenizer),
            weights=weights_hash(self.folder),
        )

    def dtype(self, wanted: str) -> torch.dtype:
        """The dtype to compute in. auto: bfloat16 for 16-bit weights if the hardware supports it, else float32."""
        if wanted != "auto":
            return cast(torch.dtype, getattr(torch, wanted))
        stored = {tensor.dtype for tensor in stored_tensors(self.folder)}
        return torch.bfloat16 if stored <= {"BF16", "F16"} and computes_in_bfloat16() else torch.float32

    def load(self, dtype: torch.dtype) -> PreTrainedModel:
        """The model with its weights, on the CPU (partitioned inside `zero.partitioned`).

        Raises:
            BaseError: the files do not contain all weights.
        """
        model: PreTrainedModel
        report: dict[str, Any]
        disable_progress_bar()  # transformers shows one per process, even if stderr is not a terminal
        loading: Any = AutoModelForCausalLM.from_pretrained  # its type allows only a model as result
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
    """Find a base and read everything but its weights.

    Raises:
        BaseError: unknown, without safetensors, or not a decoder-only model.
    """
    folder = _folder(config)
    if not (folder / "config.json").is_file():
        raise BaseError(f"model.path: {config.path} has no config.json; give a Hugging Face id or a folder with a model")
    _check_code(config, folder)
    if not any(folder.glob("*.safetensors")):
        raise BaseError(f"model.path: {config.path} has no .safetensors file, the only format that is opened; convert it")
    try:
        described = AutoConfig.from_pretrained(folder, trust_remote_code=config.trust_remote_code, local_files_only=True)
        check_decoder(config.path, described)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=config.trust_remote_code, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        if "custom code" in str(error):
            raise BaseError(
                f"model.path: {config.path} contains its own code, which is not run; choose a base that transformers supports, "
                "or set model.trust_remote_code = true if you trust it"
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
    """Refuse a folder whose config loads code from elsewhere, unless the experiment allows it.

    `auto_map` alone is harmless: transformers uses its own class if it knows the model type, and refuses otherwise. But the
    name of an attention implementation may be a Hub repository, from which transformers downloads and runs code without asking
    if the package `kernels` is installed (5.23, modeling_utils.py).
    """
    if config.trust_remote_code:
        return
    described = _read_json(config, folder)
    for place in (described, *(each for each in described.values() if isinstance(each, dict))):  # such as a nested text_config
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
        raise BaseError(f"model.path: {config.path} has a config.json that is not a JSON object; use another copy")
    return described


def _folder(config: ModelConfig) -> Path:
    if config.path == "builtin":
        return BUILTIN
    folder = locate(config.path)
    if folder.is_dir():
        return folder.absolute()
    if config.path.count("/") != 1 or config.path.startswith((".", "/", "~")):
        fix = suggest(config.path, ["builtin"], "correct the path", shown=quoted)
        raise BaseError(f"model.path: {config.path} is neither an existing folder nor a Hugging Face id; {fix}")
    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    if config.trust_remote_code:
        patterns.append("*.py")
    try:
        return Path(snapshot_download(config.path, revision=config.revision, allow_patterns=patterns))
    except Exception as error:  # the hub client raises many types (offline, unknown, gated); the fix is the same
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
