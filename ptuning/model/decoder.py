"""Which causal language model a config describes: itself, or the text part of a multimodal model."""

from __future__ import annotations

from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM, PretrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from ptuning.errors import BaseError
from ptuning.model.text_head import add_head, has_layers, register_text_class, take_conversions

TEXT_PART = {r"^(?:model\.)?(?:language_model|text_model|llm)\.": ""}
"""The prefixes of the text part's tensors in a multimodal checkpoint, and what replaces them (`key_mapping`)."""

_CAUSAL_WITHOUT_FLAG = {"gpt_neox", "gpt_neox_japanese", "trocr"}
"""Types that have `is_decoder` but do not read it. All others attend in both directions unless it is true."""


def check_decoder(path: str, config: PretrainedConfig) -> PretrainedConfig:
    """The config of the causal language model: `config`, or the text config of a multimodal one that holds one.

    transformers' own mapping of causal models decides. Parts that read images or audio are not loaded: they would only take
    memory, and some cannot be initialised under ZeRO-3 (5.23).

    Raises:
        BaseError: there is none, for example an encoder, an encoder with a decoder, or a classifier.
    """
    causal = AutoModelForCausalLM._model_mapping
    names = config.architectures or []
    kind = names[0] if names else config.model_type
    refused = f"model.path: {path} is a {kind}, not a decoder-only language model"
    if config.is_encoder_decoder:
        raise BaseError(f"{refused} (it has an encoder); choose a causal LM")
    if names and not any(map(_is_language_model, names)):
        raise BaseError(f"{refused}; choose a causal LM")
    if type(config) in causal:
        register_text_class(config)
    elif not is_multimodal(config):
        raise BaseError(f"{refused}; choose a causal LM")
    elif has_layers(config.get_text_config()):
        add_head(path, config)
    text = text_part(config)
    if type(text) not in causal:
        raise BaseError(f"{refused}, and transformers has no layers for its text part alone; choose a causal LM")
    if text is not config:
        take_conversions(config, text)
    _check_attention(refused, text)
    return text


def _check_attention(refused: str, text: PretrainedConfig) -> None:
    """Refuse attention that is not causal, or another function every time.

    Raises:
        BaseError: begins with `refused`.
    """
    if text.model_type == "reformer":
        raise BaseError(f"{refused} (its attention hashes tokens at random, so no number is repeatable); choose another base")
    if text.model_type == "xlnet" or (text.model_type == "xlm" and not getattr(text, "causal", False)):
        raise BaseError(f"{refused} (its attention is not causal); choose a causal LM")
    if getattr(text, "is_decoder", True) is False and text.model_type not in _CAUSAL_WITHOUT_FLAG:
        raise BaseError(
            f"{refused} (is_decoder is not set, so its attention is not causal); set is_decoder in its config.json if it was "
            "trained as a decoder, or choose a causal LM"
        )


def is_multimodal(config: PretrainedConfig) -> bool:
    """Whether a config describes a model that reads text together with images, audio or video."""
    generating = type(config) in AutoModelForImageTextToText._model_mapping
    generating = generating or type(config) in AutoModelForMultimodalLM._model_mapping
    return generating and "text_config" in config.sub_configs


def whole_class(config: PretrainedConfig) -> type:
    """The auto class that loads a whole multimodal model."""
    known = type(config) in AutoModelForImageTextToText._model_mapping
    return AutoModelForImageTextToText if known else AutoModelForMultimodalLM


def has_text_part(config: PretrainedConfig) -> bool:
    """Whether the text part of a multimodal model is loaded alone: transformers has a causal language model for it."""
    return is_multimodal(config) and type(config.get_text_config()) in AutoModelForCausalLM._model_mapping


def text_part(config: PretrainedConfig) -> PretrainedConfig:
    """The text config of a multimodal config whose text part is loaded alone; else `config` itself."""
    if not has_text_part(config):
        return config
    text: PretrainedConfig = config.get_text_config()
    # The whole model's own setting decides, as in its class.
    text.tie_word_embeddings = bool(getattr(config, "tie_word_embeddings", False))
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(text, name, None) is None:
            setattr(text, name, getattr(config, name, None))
    return text


def _is_language_model(name: str) -> bool:
    """Whether a class of transformers, or of a base's own code, generates text."""
    known = (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    )
    return "CausalLM" in name or "LMHeadModel" in name or any(name in names.values() for names in known)
