"""The frozen base: finding, checking and describing it without reading weights; loading; fingerprints."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from ptuning import environment
from ptuning.errors import BaseError, UserError
from ptuning.model.base_folder import check_folder, find_folder
from ptuning.model.decoder import TEXT_PART, check_decoder, has_text_part, is_multimodal, whole_class
from ptuning.model.eight_bits import store
from ptuning.model.fingerprint import Fingerprint, config_hash, tokenizer_fingerprint, weights_hash
from ptuning.model.integer_weights import METHODS, plain_tensors
from ptuning.model.quantization import WHOLE, dequantized, loading_settings, take_quantization
from ptuning.model.safetensors_files import StoredTensor, stored_tensors, weights_name
from ptuning.model.stored_names import check_stored
from ptuning.model.text_head import is_converted
from ptuning.settings.fields import EightBits
from ptuning.settings.model import ModelConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class NotFilled(BaseError):
    """transformers has left weights of the model empty."""


@dataclass(frozen=True)
class Base:
    """A base on disk."""

    name: str
    revision: str | None
    folder: Path
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    trust_remote_code: bool
    ends: tuple[int, ...]
    """Tokens that end an answer: the tokenizer's end token, which is trained as the end of a target, then the others that the
    config and generation_config.json name, sorted."""
    multimodal: bool = False
    """Whether the files hold a model that also reads images, audio or video. Only its text part is used."""
    renamed: dict[str, str] | None = None
    """Expressions that turn stored names into those of the model (`key_mapping`), if its text part is loaded alone."""
    quantization: dict[str, Any] | None = None
    """The settings by which transformers dequantises the files; None for plain weights."""
    stored_in: EightBits | None = None
    """How linear layers are stored in memory; None: in the dtype of the base."""

    @property
    def notes(self) -> list[str]:
        """How the base differs from its files, one phrase each."""
        method = self.quantization and self.quantization.get("quant_method")
        return [
            *(["the text part of a multimodal checkpoint"] if self.multimodal else []),
            *([f"dequantised from {method}"] if method else []),
            *([f"stored in {self.stored_in}"] if self.stored_in else []),
        ]

    @property
    def loaded_whole(self) -> bool:
        """Whether every worker has to load the whole base before it can be partitioned."""
        quantised = self.quantization is not None and self.quantization["quant_method"] in WHOLE
        return quantised or is_converted(self.config) or self.stored_in is not None

    @property
    def width(self) -> int:
        """Of the input embedding, which a few architectures project to that of their layers."""
        config = self.config.get_text_config()
        names = ("word_embed_proj_dim", "embedding_size", "input_embedding_size", "hidden_size")
        return next(int(wide) for name in names if (wide := getattr(config, name, None)))

    @property
    def context(self) -> int:
        """Maximum number of positions; practically unlimited if the base's config gives no limit.

        Where rotary frequencies depend on the longest row of a pass (Phi-3 with 128k positions, dynamic NTK), it is the length
        up to which they do not: beyond it, a row would be computed differently beside longer ones.
        """
        config = self.config.get_text_config()
        most = int(getattr(config, "max_position_embeddings", None) or 2**31)
        rope = getattr(config, "rope_parameters", None) or {}
        if rope.get("rope_type") in ("dynamic", "longrope"):
            most = min(most, int(rope.get("original_max_position_embeddings") or most))
        return most

    @property
    def vocabulary(self) -> int:
        return int(self.config.get_text_config().vocab_size)

    @cached_property
    def tensors(self) -> tuple[StoredTensor, ...]:
        """The tensors in the files, without their values."""
        return tuple(stored_tensors(self.folder))

    @cached_property
    def plain_tensors(self) -> Sequence[StoredTensor]:
        """The same, with the weights that packed integers mean in their place.

        Raises:
            BaseError: they are packed in a way that is not known.
        """
        if self.quantization and self.quantization["quant_method"] in METHODS:
            return plain_tensors(self.name, self.quantization, self.tensors)
        return self.tensors

    @cached_property
    def numbers(self) -> int:
        """Number of parameters in the files, tied ones counted once; of the model if it is not loaded as it is stored."""
        if self.notes:
            model = self._meta_model()
            if model is not None:
                return sum(parameter.numel() for parameter in model.parameters())
        return sum(math.prod(tensor.shape) for tensor in self.tensors)

    def bytes(self, dtype: torch.dtype) -> int:
        """Of all parameters, as they are in memory."""
        if not self.stored_in:
            return self.numbers * dtype.itemsize
        model = self._meta_model(dtype)
        if model is None:
            return self.numbers * dtype.itemsize
        store(model, self.stored_in, self.name)
        return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())

    @cached_property
    def fingerprint(self) -> Fingerprint:
        return Fingerprint(
            config=config_hash(self.folder),
            tokenizer=tokenizer_fingerprint(self.tokenizer),
            weights=weights_hash(self.folder),
            quantization=self.stored_in,
        )

    def dtype(self, wanted: str) -> torch.dtype:
        """The dtype to compute in. auto: bfloat16 for a base that is mostly stored in 16 bits or fewer if the hardware supports
        it, else float32."""
        if wanted != "auto":
            return cast(torch.dtype, getattr(torch, wanted))
        return torch.bfloat16 if self.stored_small and computes_in_bfloat16() else torch.float32

    @property
    def stored_small(self) -> bool:
        """True if the base is mostly stored in 16 bits or fewer."""
        sizes = {True: 0, False: 0}
        for tensor in self.tensors:
            sizes[tensor.dtype in ("F32", "F64")] += tensor.size
        return sizes[False] >= sizes[True] or self.quantization is not None

    def load(self, dtype: torch.dtype, device: torch.device | None = None) -> PreTrainedModel:
        """The model with its weights (partitioned inside `zero.partitioned`).

        `device`: where to; the CPU by default. A GPU gets each tensor as it is read, so the host never holds the whole model.

        Raises:
            BaseError: the files do not contain all weights, or in other shapes than the config describes.
        """
        model: PreTrainedModel
        report: dict[str, Any]
        environment.apply("torch")  # torch reads a part of it before its first allocation on a GPU
        disable_progress_bar()  # transformers shows one per process, even if stderr is not a terminal
        self.check_tensors()
        loading: Any = AutoModelForCausalLM.from_pretrained  # its type allows only a model as result
        model, report = loading(
            self.folder,
            config=self._loading_config(),
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=self.trust_remote_code,
            output_loading_info=True,
            key_mapping=self.renamed,
            device_map=None if self.stored_in else self._device_map(device),
        )
        if report["missing_keys"]:
            missing = ", ".join(sorted(report["missing_keys"])[:3])
            raise NotFilled(f"model.path: {self.name} has no weights for {missing}; use a complete checkpoint")
        if self.renamed or self.quantization:
            # A checkpoint that is written later would get the stored names, and quantised weights, but not their config.
            model._weight_conversions = None  # type: ignore[assignment]  # not a module
        if self.quantization:
            model = dequantized(model, self.quantization["quant_method"], dtype)
        if self.stored_in:
            store(model, self.stored_in, self.name)
        if self.quantization or self.stored_in:
            moving: Any = model  # what was done on the CPU
            model = moving if device is None else moving.to(device)
        return model

    def load_whole(self, dtype: torch.dtype) -> PreTrainedModel:
        """The model that the files hold: with the parts that read images, audio or video, if there are any. On the CPU."""
        described = AutoConfig.from_pretrained(self.folder, trust_remote_code=self.trust_remote_code, local_files_only=True)
        kind: Any = whole_class(described)
        model: PreTrainedModel = kind.from_pretrained(
            self.folder,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=self.trust_remote_code,
        )
        return model

    def _device_map(self, device: torch.device | None) -> dict[str, Any] | None:
        """Where transformers puts the weights while it loads; None: on the CPU."""
        if self.quantization and self.loaded_whole:
            return {"": "cpu"}
        return {"": device} if device is not None and device.type != "cpu" else None

    def check_tensors(self) -> None:
        """Compare the names and shapes of the stored tensors with the model. No weights are read.

        Raises:
            BaseError: tensors are missing, or have another shape.
        """
        _ = self._checked

    @cached_property
    def _checked(self) -> bool:
        """Checked once: inside `zero.Init`, a model without memory would have no shapes."""
        known = self.quantization is None or self.quantization["quant_method"] in METHODS
        model = self._meta_model() if known else None
        if model is not None:
            check_stored(self.name, model, self.plain_tensors, self.renamed)
        return model is not None

    def _meta_model(self, dtype: torch.dtype = torch.float32) -> PreTrainedModel | None:
        """The model without memory; None if it is the base's own code."""
        try:
            kind: Any = AutoModelForCausalLM._model_mapping[type(self.config)]
        except KeyError:
            return None
        config = self.config.get_text_config() if kind.config_class is not type(self.config) else self.config
        with torch.device("meta"):
            model: PreTrainedModel = kind(copy.deepcopy(config))
        loaded: Any = model
        return loaded.to(dtype)

    def _loading_config(self) -> PretrainedConfig:
        """The config with what transformers needs for these files."""
        config = copy.deepcopy(self.config)
        for each in (config, config.get_text_config()):
            each.transformers_weights = weights_name(self.folder)
            if self.quantization:
                each.quantization_config = loading_settings(self.quantization)
        return config


def find_base(config: ModelConfig) -> Base:
    """Find a base and read everything but its weights.

    Raises:
        BaseError: unknown, incomplete, without safetensors, quantised in an unsupported way, or not a decoder-only model.
    """
    folder = find_folder(config)
    check_folder(config, folder)
    try:
        described = AutoConfig.from_pretrained(folder, trust_remote_code=config.trust_remote_code, local_files_only=True)
        quantization = take_quantization(config.path, described)
        decoder = check_decoder(config.path, described)
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
    base = Base(
        config.path,
        config.revision,
        folder,
        decoder,
        tokenizer,
        config.trust_remote_code,
        ends=end_tokens(config.path, folder, decoder, tokenizer),
        multimodal=is_multimodal(described),
        renamed=dict(TEXT_PART) if has_text_part(described) else None,
        quantization=quantization,
        stored_in=config.quantization,
    )
    _ = base.plain_tensors
    return base


def listed_ends(*values: Any) -> list[int]:
    """The token ids in values of `eos_token_id`, which a config gives as one, as a list or not at all; without duplicates."""
    listed = [each for value in values for each in (value if isinstance(value, list) else [value])]
    return list(dict.fromkeys(each for each in listed if type(each) is int))


def end_tokens(path: str, folder: Path, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens that end an answer: the tokenizer's, then the others that the config and generation_config.json name, sorted.

    A tokenizer without an end token gets the first one of these files.

    Raises:
        BaseError: there is no end token, or the embedding has no row for it.
    """
    rows = int(config.get_text_config().vocab_size)
    try:
        generation = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        generation = {}
    named = listed_ends(
        generation.get("eos_token_id") if isinstance(generation, dict) else None,
        getattr(config, "eos_token_id", None),
        getattr(config.get_text_config(), "eos_token_id", None),
    )
    others = [each for each in named if 0 <= each < rows]
    first = tokenizer.eos_token_id
    if first is None:
        token = next((tokenizer.convert_ids_to_tokens(each) for each in others if each < len(tokenizer)), None)
        if token is None:
            raise BaseError(f"model.path: the tokenizer of {path} has no end token; set eos_token in its files")
        tokenizer.add_special_tokens({"eos_token": token})
        first = tokenizer.eos_token_id
    if first >= rows:
        raise BaseError(
            f"model.path: the end token {first} of the tokenizer of {path} has no row in its embedding of {rows} rows; "
            "use the tokenizer that belongs to the model"
        )
    return (first, *sorted({*others} - {first}))


def computes_in_bfloat16() -> bool:
    """Whether this machine has instructions for bfloat16. GPUs before Ampere emulate it, tens of times slower."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
