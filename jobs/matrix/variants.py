"""What is checked: every type of transformers' mapping for causal language models, and variants as published models use them.

A variant changes settings of the tiny config of its type. `CORRECTIONS` are settings of types whose sizes depend on each other.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from matrix.shrink import CONTEXT


@dataclass(frozen=True)
class Case:
    """A base to build."""

    name: str
    type: str
    changes: dict[str, Any] = field(default_factory=dict)
    """Settings of the tiny config; those of a nested config as a mapping."""
    layers: int | None = None


_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
_LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 64,
}
_LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [3.0] * 8}

_SPARE = {"vocab_size": 328}
"""Rows for the tokens that the tokenizers of these types add to any vocabulary."""

_ALTERNATING = {
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    "num_hidden_layers": 4,
}

_QWEN4 = {
    **{"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 16, "indexer_compress_ratio": 4},
    **{"ple_layer_ids": [1], "ple_embed_dim": 64},
}

_DOTS3 = {
    **{"swa_num_attention_heads": 2, "swa_num_key_value_heads": 2, "swa_q_lora_rank": 32, "swa_kv_lora_rank": 32},
    **{"swa_head_dim": 24, "swa_qk_nope_head_dim": 16, "swa_v_head_dim": 16},
}


def _mrope(*sections: int, **settings: Any) -> dict[str, Any]:
    """Rotary positions in three directions, as multimodal bases have them."""
    return {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(sections), **settings}


CORRECTIONS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "big_bird": {"block_size": 64},
    "bigbird_pegasus": {"block_size": 64},
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e4},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        }
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}},
    # Its whole model forgets the scale that its text model (and Cohere's own code) applies to logits (transformers 5.23).
    "cohere2_vision": {"text_config": {"logit_scale": 1.0}},
    "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 1, "n_shared_experts": 1},
    "deepseek_v3": {"num_experts_per_tok": 2},
    # Above this length the keys of equal tokens tie, and which of them are kept depends on the length of the row.
    "doge": {"keep_window_size": CONTEXT},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dots3_note": {"text_config": _DOTS3},
    "dots3_note_text": _DOTS3,
    "emu3": {"vq_config": {"base_channels": 32}, "vocabulary_map": {"<image>": 316, "<|extra_200|>": 317}},
    "gemma3n_text": {**_ALTERNATING, "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0], "num_kv_shared_layers": 2},
    "glm46v": {"text_config": {"rope_parameters": _mrope(2, 3, 3)}},
    "glm4v": {"text_config": {"rope_parameters": _mrope(2, 3, 3)}},
    "glm_ocr": {"text_config": {"rope_parameters": _mrope(2, 3, 3)}},
    "glm4v_moe": {"text_config": {"rope_parameters": _mrope(1, 1, 2, partial_rotary_factor=0.5)}},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16, "num_experts": 4, "moe_topk": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"full_attn_idxs": [1], "layer_types": None},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "paligemma": {"text_config": {"num_key_value_heads": 1}},
    "qwen2_5_vl": {"text_config": {"rope_parameters": _mrope(2, 3, 3)}},
    "qwen2": _SPARE,
    "qwen3_5_moe_text": _SPARE,
    "qwen2_vl": {"text_config": {"rope_parameters": _mrope(2, 3, 3)}},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "reformer": {"axial_pos_embds_dim": [16, 48], "axial_pos_shape": [16, 16]},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        **{"layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"], "num_hidden_layers": 4},
        **{"attention_hidden_size": 128, "attention_head_dim": 32},
    },
    "zamba2": {
        **{"layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"], "num_hidden_layers": 4},
        **{"hybrid_layer_ids": [1, 3], "attention_hidden_size": 128, "attention_head_dim": 32, "n_mamba_heads": 8},
        **{"mamba_headdim": 16, "num_query_groups": 4},
    },
}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert plain": ("bert", {"is_decoder": False}),
    "roberta plain": ("roberta", {"is_decoder": False}),
    "xlm causal": ("xlm", {"causal": True}),
    "cohere2 pattern": ("cohere2", {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}),
    "deepseek_v2 lite": ("deepseek_v2", {"q_lora_rank": None}),
    "deepseek_v3 groups": ("deepseek_v3", {"n_routed_experts": 8, "n_group": 4, "topk_group": 2}),
    "exaone4 full": ("exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 3}),
    "falcon 7b": ("falcon", {"multi_query": True, "parallel_attn": True, "new_decoder_architecture": False}),
    "falcon 40b": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "multi_query": False}),
    "falcon rw": ("falcon", {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True, "num_kv_heads": 4}),
    "gemma3 1b": ("gemma3_text", {"num_key_value_heads": 1}),
    "gemma3n not shared": ("gemma3n_text", {"num_kv_shared_layers": 0}),
    "gemma4 e2b": ("gemma4_text", {**_ALTERNATING, "num_kv_shared_layers": 2, "use_double_wide_mlp": True}),
    "gemma4 26b": (
        "gemma4_text",
        {
            **{"hidden_size_per_layer_input": 0, "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2},
            **{"moe_intermediate_size": 32, "attention_k_eq_v": True, "num_global_key_value_heads": 1},
        },
    ),
    "gemma4 31b": (
        "gemma4_text",
        {"hidden_size_per_layer_input": 0, "attention_k_eq_v": True, "num_global_key_value_heads": 1},
    ),
    "gpt2 scaled": ("gpt2", {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True}),
    "granite4 dense": (
        "granitemoehybrid",
        {"layer_types": ["full_attention"] * 3, "num_local_experts": 0, "num_experts_per_tok": 0},
    ),
    "granite4 h": ("granitemoehybrid", {"num_local_experts": 0, "num_experts_per_tok": 0}),
    "internlm3 dynamic": ("internlm3", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 6.0}}),
    "llama3 rope": ("llama", {"rope_parameters": _LLAMA3}),
    "llama yarn": ("llama", {"rope_parameters": _YARN}),
    "llama dynamic rope": (
        "llama",
        {
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
            "max_position_embeddings": CONTEXT,
        },
    ),
    "minimax full": ("minimax", {"layer_types": ["full_attention"] * 3}),
    "mistral no window": ("mistral", {"sliding_window": None}),
    "mpt no alibi": ("mpt", {"attn_config": {"alibi": False}}),
    "olmo clip": ("olmo", {"clip_qkv": 0.5}),
    "opt 350m": ("opt", {"word_embed_proj_dim": 32, "do_layer_norm_before": False}),
    "phi3 longrope": (
        "phi3",
        {"rope_parameters": _LONG, "original_max_position_embeddings": 128, "max_position_embeddings": CONTEXT},
    ),
    "phi3 window": ("phi3", {"sliding_window": 8}),
    "phi4 mini": (
        "phi3",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}},
    ),
    "qwen2 window": (
        "qwen2",
        {
            **{"use_sliding_window": True, "sliding_window": 8},
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        },
    ),
    "qwen3 tied": ("qwen3", {"tie_word_embeddings": True}),
    "qwen3_moe some dense": ("qwen3_moe", {"mlp_only_layers": [0]}),
    "stablelm2": ("stablelm", {"use_parallel_residual": True, "qk_layernorm": True}),
    "starcoder multi-head": ("gpt_bigcode", {"multi_query": False}),
}

WRAPPERS = (
    *("mistral3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "glm4v", "glm4v_moe", "internvl", "llava"),
    *("idefics3", "smolvlm", "paligemma", "lfm2_vl", "aria", "cohere2_vision", "minimax_m3_vl"),
    *("glm46v", "glm_ocr", "glm5_next", "mistral_large4", "granite_docling"),
)
"""Multimodal types outside the mapping, whose text model is a causal language model."""


def cases() -> list[Case]:
    """Everything that is checked, in the order of the table."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    types = [*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *WRAPPERS]
    plain = [Case(name, name, CORRECTIONS.get(name, {})) for name in sorted(types)]
    changed = [Case(name, kind, {**CORRECTIONS.get(kind, {}), **changes}) for name, (kind, changes) in VARIANTS.items()]
    return [*plain, *changed]


def find_cases(names: list[str]) -> list[Case]:
    """The cases of these names; all without names.

    Raises:
        ValueError: a name is not known.
    """
    known = {case.name: case for case in cases()}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"unknown types: {', '.join(unknown)}; give names of transformers' causal mapping or of its variants")
    return [known[name] for name in names] if names else list(known.values())
