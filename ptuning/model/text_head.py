"""A causal language model for text configs of which transformers has the layers but no class of their own with a head.

The text parts of Qwen2-VL to Qwen3-VL, GLM-4V and others exist in transformers (5.23) only inside a class that also
reads images. Their layers are registered (`AutoModel`); here they get the head of that class: one linear layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, PretrainedConfig
from transformers.modeling_outputs import CausalLMOutputWithPast

from ptuning.errors import BaseError

SUFFIX = "WithHead"
CONVERTED = "_ptuning_converted"
CHANGING_LOGITS = {"final_logit_softcapping": None, "logit_scale": 1.0, "logits_scaling": 1.0, "logits_soft_cap": None}
"""Settings by which some architectures change the logits of their head -> the values that change nothing."""

_registered: set[type[PretrainedConfig]] = set()
"""Text configs whose causal language model is known by this process only."""


def has_layers(config: PretrainedConfig) -> bool:
    """Whether transformers has layers, but no causal language model, for a text config."""
    return type(config) not in AutoModelForCausalLM._model_mapping and type(config) in AutoModel._model_mapping


def is_listed(config: PretrainedConfig) -> bool:
    """Whether plain transformers knows a causal language model for a config, without what this module registers."""
    return type(config) not in _registered


def is_converted(config: PretrainedConfig) -> bool:
    """Whether stored tensors of a class of this module are joined or transposed. Under ZeRO-3, transformers (5.23) does not do
    that for every one of them (Qwen 3-VL's experts)."""
    known = AutoModelForCausalLM._model_mapping
    return type(config) in known and getattr(known[type(config)], CONVERTED, False)


def add_head(path: str, whole: PretrainedConfig) -> None:
    """Make a causal language model for the text config of `whole`, and register it with transformers. Every process that loads
    the base has to call it.

    Raises:
        BaseError: the architecture changes the logits of its head.
    """
    config = whole.get_text_config()
    for name, neutral in CHANGING_LOGITS.items():
        if getattr(config, name, None) not in (None, neutral):
            raise BaseError(
                f"model.path: {path} changes the logits of its head ({name}), and transformers has no class for its text part "
                "alone; choose a causal LM"
            )
    layers: Any = AutoModel._model_mapping[type(config)]
    made = _with_head(layers, type(config))
    # Without exist_ok, transformers (5.23) takes no class of another package for a config of its own.
    AutoModelForCausalLM.register(type(config), made, exist_ok=True)
    _registered.add(type(config))
    take_conversions(whole, config)


def register_text_class(whole: PretrainedConfig) -> None:
    """Some types (Emu 3, Mllama; transformers 5.23) have a causal language model whose config is their text config, which is
    listed under the whole config only. It is registered under its own. Every process that loads the base has to call it."""
    known = AutoModelForCausalLM._model_mapping
    kind: Any = known[type(whole)]
    text = whole.get_text_config()
    if type(text) not in known and kind.config_class is type(text):
        AutoModelForCausalLM.register(type(text), kind, exist_ok=True)
        _registered.add(type(text))


def take_conversions(whole: PretrainedConfig, text: PretrainedConfig) -> None:
    """Let the class of a text part convert stored tensors as the whole model does: its experts are stored one by one, say.

    transformers (5.23) lists this for some whole models only. Renamings of beginnings are left out: they lead to places in the
    whole model.
    """
    # Not above: these import scipy, torch's compiler and more, which few drivers need.
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    made: Any = AutoModelForCausalLM._model_mapping[type(text)]
    if get_checkpoint_conversion_mapping(text.model_type) or get_checkpoint_conversion_mapping(made.__name__):
        return
    conversions = [
        each
        for each in get_checkpoint_conversion_mapping(whole.model_type) or []
        if not (isinstance(each, WeightRenaming) and any(name.startswith("^") for name in each.source_patterns))
    ]
    if conversions:
        register_checkpoint_conversion_mapping(made.__name__, conversions, overwrite=True)
        setattr(made, CONVERTED, True)


def _with_head(layers: Any, kind: type[PretrainedConfig]) -> type:
    """The class: the layers as `model`, and `lm_head`."""
    from transformers import GenerationMixin

    def __init__(self: Any, config: PretrainedConfig) -> None:
        parent.__init__(self, config)
        self.model = layers(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self: Any,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits: torch.FloatTensor = self.lm_head(out.last_hidden_state[:, kept])
        return CausalLMOutputWithPast(logits=logits, past_key_values=out.past_key_values)

    parent: Any = next(each for each in layers.__mro__[1:] if each.__name__.endswith("PreTrainedModel"))
    return type(
        f"{layers.__name__}{SUFFIX}",
        (parent, GenerationMixin),
        {
            "__init__": __init__,
            "__module__": __name__,
            "forward": forward,
            "config_class": kind,
            "config": None,
            "base_model_prefix": "model",
            "_tied_weights_keys": {"lm_head.weight": "model.embed_tokens.weight"},
            "__annotations__": {"config": kind},
        },
    )
