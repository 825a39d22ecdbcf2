"""From the default config of a model type to a tiny one with all its kinds of layers.

Sizes are replaced by name. Lists with one entry per layer keep the first layer of each kind, so that a hybrid has at least one
layer of every kind that its default config has.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

WIDTH, VOCABULARY, CONTEXT = 64, 320, 256
PAD, BEGIN, END = 0, 1, 2
LEAST, MOST = 3, 6
"""Number of layers."""

_LAYERS = (
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks"),
    *("decoder_layers", "encoder_layers", "num_decoder_layers", "num_encoder_layers"),
)

_NAMES: dict[int, tuple[str, ...]] = {
    WIDTH: (
        *("hidden_size", "d_model", "n_embd", "emb_dim", "embedding_dim", "embedding_size", "attention_hidden_size"),
        *("word_embed_proj_dim", "lru_width", "embed_dim", "out_hidden_size", "projection_dim", "projector_hidden_size"),
        *("input_embedding_size", "output_embedding_size", "pronunciation_embed_dim", "shape_embed_dim", "ple_embed_dim"),
        *("projection_hidden_size", "merged_hidden_size", "text_hidden_size", "vision_output_dim", "output_dim"),
        *("output_proj_dims", "projector_output_size", "adapter_out_dim", "pooler_hidden_size", "mm_embed_dim"),
        *("adapter_in_dim", "adapter_input_size"),
    ),
    128: ("mamba_d_ssm",),
    96: (
        *("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "dff", "dim_ff", "d_inner", "n_inner"),
        *("ffn_hidden_size", "intermediate_size_mlp", "dense_intermediate_size", "block_ff_dim", "feed_forward_size"),
        *("projector_intermediate_size", "alignment_intermediate_size"),
    ),
    32: (
        *("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size", "shared_intermediate_size"),
        *("moe_shared_expert_intermediate_size", "shared_experts_intermediate_size", "router_hidden_size", "rel_extent"),
        *("q_lora_rank", "image_size", "global_head_dim"),
    ),
    4: (
        *("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"),
        *("decoder_attention_heads", "encoder_attention_heads", "num_decoder_attention_heads", "num_encoder_attention_heads"),
        *("swa_num_attention_heads", "linear_num_value_heads", "linear_num_heads", "mamba_dt_rank", "time_step_rank"),
        *("index_topk_blocks", "num_blocks_ngram", "hc_lowrank"),
    ),
    16: (
        *("head_dim", "d_head", "dim_head", "attention_head_dim", "kv_channels", "swa_head_dim", "index_head_dim"),
        *("kv_lora_rank", "v_head_dim", "qk_nope_head_dim", "index_n_heads", "index_topk", "o_lora_rank", "mamba_head_dim"),
        *("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim", "mamba_d_head", "mamba_headdim"),
        *("hidden_size_per_layer_input", "attention_head_size", "local_attention", "adapter_rank", "gated_norm_rank"),
    ),
    8: (
        *("qk_rope_head_dim", "rotary_dim", "laurel_rank", "mamba_d_state", "ssm_state_size", "state_size", "mamba_n_heads"),
        *("mamba_num_heads", "mamba_chunk_size", "chunk_size", "index_block_size", "block_size", "prompt_length"),
        *("sliding_window", "sliding_window_size", "attention_window_size", "window_size", "attention_chunk_size"),
        *("keep_window_size", "floor_scale"),
    ),
    2: ("linear_num_key_heads", "o_groups", "n_groups", "depth", "heads_per_ngram"),
    CONTEXT: (
        *("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length", "max_target_positions"),
        "model_max_length",
    ),
    VOCABULARY: (
        *("vocab_size", "decoder_vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size", "text_vocab_size"),
        *("pronunciation_vocab_size", "shape_vocab_size", "ngram_vocab_size_base"),
        "encoder_hash_byte_group_vocab",
    ),
}
_EXACT: dict[str, Any] = {name: size for size, names in _NAMES.items() for name in names}
_EXACT |= {"initializer_range": 0.05, "qk_head_dim": 24, "bos_token_id": BEGIN, "eos_token_id": END, "pad_token_id": PAD}
_EXACT |= {"split_ngram_parts": 1, "make_ngram_vocab_size_divisible_by": 8, "block_multiple_of": 16, "pretraining_tp": 1}
_EXACT |= {"query_pre_attn_scalar": 16, "residual_in_fp32": False}

_CAPPED: dict[int, tuple[str, ...]] = {
    4: ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts", "zero_expert_num", "expert_ffn_groups"),
    2: (
        *("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k", "n_group", "num_expert_group"),
        *("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads", "mamba_n_groups", "mamba_ngroups", "num_groups"),
        *("kv_n_heads", "top_k_experts"),
    ),
    1: ("topk_group", "num_dense_layers", "first_k_dense_replace"),
}
_MOST = {name: size for size, names in _CAPPED.items() for name in names}

_DROPPED = (
    *("per_layer_config", "quantization_config", "transformers_version", "_name_or_path", "architectures", "id2label"),
    *("label2id", "dtype", "full_attn_idxs"),
)
"""Settings that the config class computes, or that do not matter."""

_CLEARED = (
    *("forced_eos_token_id", "forced_bos_token_id", "suppress_tokens", "begin_suppress_tokens"),
    *("encoder_no_repeat_ngram_size", "no_repeat_ngram_size"),
)
"""Settings of generation that transformers takes from the config: greedy text would not be the most likely tokens."""


def shrunk(default: Mapping[str, Any], layers: int | None = None) -> dict[str, Any]:
    """The arguments of a tiny config, from the settings of the default one. Nested configs become tiny, too."""
    changed: dict[str, Any] = {}
    depth = next((default[name] for name in _LAYERS if isinstance(default.get(name), int)), 0)
    kept = list(range(layers)) if layers else _kinds(default, depth)
    for name, value in default.items():
        if name in _DROPPED:
            continue
        if name in _CLEARED:
            changed[name] = 0 if name.endswith("_size") else None
        elif isinstance(value, Mapping) and ("model_type" in value or name.endswith("_config")):
            changed[name] = {**_identity(value), **shrunk(value)}
        elif name in _LAYERS:
            changed[name] = len(kept)
        elif isinstance(value, list) and depth and len(value) == depth and len(value) > 2:
            changed[name] = [_size(name, value[layer], default) for layer in kept]
        else:
            new = _size(name, value, default)
            if new != value:
                changed[name] = new
    return changed


def _identity(value: Mapping[str, Any]) -> dict[str, Any]:
    return {"model_type": value["model_type"]} if value.get("model_type") else {}


def _kinds(default: Mapping[str, Any], depth: int) -> list[int]:
    """The first layer of each kind, at least `LEAST` layers."""
    lists = [value for value in default.values() if isinstance(value, list) and len(value) == depth and depth > 2]
    seen: dict[str, int] = {}
    for layer in range(depth):
        seen.setdefault(repr([each[layer] for each in lists]), layer)
    chosen = sorted(seen.values())[:MOST]
    for layer in range(depth or LEAST):
        if len(chosen) >= LEAST:
            break
        if layer not in chosen:
            chosen.append(layer)
    return sorted(chosen) if depth else list(range(LEAST))


def _size(name: str, value: Any, default: Mapping[str, Any]) -> Any:
    if name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        return _EXACT[name]
    if name == "is_decoder":
        return True
    if name.endswith(("_token_id", "_token_index", "_index")) and isinstance(value, int) and value >= VOCABULARY:
        ids = sorted(key for key, each in default.items() if key.endswith(("_id", "_index")) and isinstance(each, int))
        return VOCABULARY - 1 - ids.index(name)
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return value
    if name == "head_dim" and value == default.get("qk_rope_head_dim"):
        return _EXACT["qk_rope_head_dim"]
    if name in _MOST:
        heads = next((default[key] for key in ("num_attention_heads", "n_heads") if isinstance(default.get(key), int)), None)
        if name in ("num_key_value_heads", "swa_num_key_value_heads") and value == heads:
            return 4
        return min(value, _MOST[name]) if value > 0 else value
    return _EXACT.get(name, value) if value else value
