"""[model] and [prompt]: the frozen base, and the soft prompt's length and initialisation."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from ptuning.settings.fields import Count, EightBits, Init, Kind, NonBlank, Positive, Table


class ModelConfig(Table):
    """The frozen base."""

    path: NonBlank = "builtin"
    """"builtin", a Hugging Face id, or a folder."""
    revision: NonBlank | None = None
    """Commit, tag or branch of a Hugging Face id."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: bfloat16 for a base mostly stored in 16 bits or fewer if the hardware computes in bfloat16, else float32. float16:
    for GPUs without bfloat16 (V100, T4, RTX 20). Its range is small: a base whose activations exceed it is refused, and losses
    are scaled in training. Soft prompts and optimizers are float32 in any case."""
    quantization: EightBits | None = None
    """Store the weights of linear layers in 8 bits, with one scale per output: int8, or fp8 (e4m3, less accurate). They take
    half the memory of bfloat16, and ZeRO-3 gathers half; activations keep model.dtype. The input embedding, the output head and
    experts that are one tensor stay as they are. Every worker loads the base in model.dtype before it is stored so. A soft
    prompt fits the base only as it was stored in training."""
    trust_remote_code: bool = False
    """Run Python code that ships with the base. Only for bases whose authors you trust with this machine."""


class PromptConfig(Table):
    """The soft prompt's kind, length and initialisation."""

    kind: Kind = "embedding"
    """embedding: vectors in front of the text's embeddings (prompt tuning, Lester et al. 2021); kv: keys and values of every
    layer (prefix tuning, Li and Liang 2021), which act in more places, take more memory, and cost less compute."""
    length: Positive = 20
    """Virtual tokens (P)."""
    init: Init = "vocabulary"
    """random: normal, with the standard deviation of the base's embeddings; vocabulary: embeddings of frequent tokens; text:
    embeddings of init_text; labels: embeddings of the label words (Lester et al. 2021, section 3.2); soft-prompt: copied from
    init_from (SPoT, Vu et al. 2022). kind = "kv" takes the keys and values that these embeddings have in the base; from a
    kept soft prompt of kind embedding it begins as that soft prompt."""
    init_text: NonBlank | None = None
    """Text for init = "text"; repeated or truncated to the length."""
    init_from: NonBlank | None = None
    """For init = "soft-prompt": the folder of a soft prompt, or name@alias in the registry."""
    frozen: Count = 0
    """Leading virtual tokens that are not trained. Many bases attend to their first position in every text, and cartridges keep
    it as it was (Eyuboglu et al. 2025)."""

    @model_validator(mode="after")
    def _something_is_trained(self) -> PromptConfig:
        if self.frozen >= self.length:
            raise ValueError(f"frozen: {self.frozen} of {self.length} virtual tokens leave nothing to train; lower it")
        return self

    @model_validator(mode="after")
    def _init_has_its_source(self) -> PromptConfig:
        for init, key in (("text", "init_text"), ("soft-prompt", "init_from")):
            value = getattr(self, key)
            if self.init == init and not value:
                raise ValueError(f'{key}: init = "{init}" needs it; set prompt.{key}')
            if self.init != init and value is not None:
                raise ValueError(f'{key}: is only used with init = "{init}"; set prompt.init = "{init}" or remove it')
        return self
