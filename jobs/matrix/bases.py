"""Tiny bases with random weights, and a tokenizer beside them, as `save_pretrained` writes them."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from matrix.shrink import BEGIN, CONTEXT, END, PAD, VOCABULARY, shrunk
from matrix.variants import Case

SPREAD = 1.2
"""Standard deviation of random weights times the square root of their inputs: attention is then far from uniform."""
SPECIAL = ("A_log", "dt_", "time_", "lambda", "rotary", "inv_freq", "conv1d", "decay", "slopes")
"""Parts of the names of parameters whose values have a meaning, which are kept as the architecture initialises them."""


def tiny_config(case: Case) -> PretrainedConfig:
    """The tiny config of a case."""
    config_class = CONFIG_MAPPING[case.type]
    default = copy.deepcopy(config_class())
    found = shrunk(default.to_dict(), case.layers)
    return config_class(**_merged(found, case.changes))


def _merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(values)
    for name, value in changes.items():
        below = merged.get(name)
        if name.endswith("_config") and isinstance(value, Mapping) and isinstance(below, Mapping):
            value = _merged(below, value)
        merged[name] = value
    return merged


def write_base(case: Case, folder: Path) -> PreTrainedModel:
    """Build a base and write it with its tokenizer."""
    config = tiny_config(case)
    with torch.random.fork_rng():
        torch.manual_seed(zlib.crc32(case.name.encode()))
        model = _class_of(config).from_config(config).eval()
        _widen(model)
    model.generation_config.eos_token_id = END
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return model


def _class_of(config: PretrainedConfig) -> Any:
    """The class that published checkpoints of this config have: the whole model where the config has a text config."""
    whole = type(config) in AutoModelForImageTextToText._model_mapping and getattr(config, "text_config", None) is not None
    if whole or type(config) not in AutoModelForCausalLM._model_mapping:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def load_plain(folder: Path, attention: str | None = None) -> PreTrainedModel:
    """A base as plain transformers loads it.

    Raises:
        ValueError: weights are missing in its files.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    loader = getattr(transformers, (config.architectures or [""])[0], None) or _class_of(config)
    model, report = loader.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, output_loading_info=True, attn_implementation=attention
    )
    if report["missing_keys"]:
        raise ValueError(f"weights are missing: {', '.join(sorted(report['missing_keys'])[:3])}")
    return model.requires_grad_(False).eval()


@torch.no_grad()
def _widen(model: PreTrainedModel) -> None:
    """Make the weights wide enough that every token depends visibly on the tokens before it."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for name, parameter in model.named_parameters():
        if any(part in name for part in SPECIAL) or not parameter.is_floating_point() or not parameter.numel():
            continue
        if id(parameter) in tables:
            _spread(parameter, 0.3)
            empty = (parameter == 0).all(-1)  # padding: states of zeros tie wherever the largest of some scores are chosen
            parameter[empty] = torch.randn_like(parameter[empty]) * parameter.std()
        elif parameter.dim() >= 2:
            _spread(parameter, SPREAD * parameter.shape[-1] ** -0.5)
        elif bool((parameter == parameter[:1]).all()):  # scales and biases, which are 1 or 0 in a new model
            parameter.add_(torch.randn_like(parameter), alpha=0.1)


def _spread(parameter: Tensor, wanted: float) -> None:
    found = float(parameter.std()) if parameter.numel() > 1 else 0.0
    if not found or not torch.isfinite(torch.tensor(found)):
        parameter.copy_(torch.randn_like(parameter) * wanted / 2)
    elif found < wanted:
        parameter.mul_(wanted / found)


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 320 pieces; texts begin with BOS."""
    found = Tokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = "the old man has one more of them here today apple pear plum grape hammer saw drill wrench Text Kind fruit tool"
    found.train_from_iterator([f"Text: {word} {other}" for word in words.split() for other in words.split()], trainer)
    found.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BEGIN)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=found, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=CONTEXT
    )
    if (len(made), made.pad_token_id, made.eos_token_id) != (VOCABULARY, PAD, END):
        raise RuntimeError(f"the tokenizer has {len(made)} pieces")
    return made
