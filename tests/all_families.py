"""Every family of transformers' causal language models, small: for the table in docs/families.md.

Sizes by the names that configurations give them, and what single families want besides.
"""

from transformers import CONFIG_MAPPING

SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "max_position_embeddings": 128,
    "sliding_window": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "v_head_dim"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim"), 8),
    # Multilayer perceptrons and mixtures
    "intermediate_size": 96,
    **dict.fromkeys(
        (
            *("moe_intermediate_size", "shared_expert_intermediate_size"),
            *("moe_shared_expert_intermediate_size", "expert_ffn_hidden_size"),
        ),
        32,
    ),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(
        (
            *("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k"),
            "top_k_experts",
        ),
        2,
    ),
    **dict.fromkeys(("n_shared_experts", "n_group", "topk_group"), 1),
    # State spaces, linear attention, sparse attention
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "mamba_d_ssm": 128,
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 8,
}

_BY_TURNS = ["linear_attention", "full_attention"] * 3
_DECODER = {"decoder_layers": 6, "decoder_attention_heads": 4, "encoder_attention_heads": 4}
OVERRIDES = {
    "bamba": {"attn_layer_indices": [1, 4]},
    "codegen": {"rotary_dim": 8},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}
    },
    "cpmant": {
        "dim_head": 16,
        "dim_ff": 96,
        "prompt_types": 4,
        "prompt_length": 4,
        "segment_types": 4,
    },
    "dbrx": {
        "d_model": 64,
        "attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "gemma3n_text": {"num_kv_shared_layers": 0, "vocab_size_per_layer_input": 128},
    "gemma4_text": {
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 128,
        "num_kv_shared_layers": 0,
    },
    "gemma4_unified_text": {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": {"layer_types": _BY_TURNS},
    "gpt_neo": {"attention_types": [[["global", "local"], 3]]},
    "kimi_linear": {"linear_head_dim": 16, "linear_num_heads": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 3},
    "longcat_flash": {"num_layers": 6, "ffn_hidden_size": 96, "zero_expert_num": 2},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1, "state_size": 8},
    "olmo_hybrid": {"layer_types": _BY_TURNS},
    "qwen3_5_moe_text": {"layer_types": _BY_TURNS},
    "qwen3_5_text": {"layer_types": _BY_TURNS},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "ple_embed_dim": 64,
        "ngram_vocab_size_base": 128,
    },
    "qwen3_next": {"layer_types": _BY_TURNS},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [32, 32], "axial_pos_shape": [8, 16]},
    "xlnet": {"d_head": 16, "d_inner": 96},
    "xlstm": {"num_heads": 4, "qk_dim_factor": 1.0},
    "zamba": {"num_hidden_layers": 8},
    "zamba2": {
        "hybrid_layer_ids": [2, 4],
        "layer_types": ["mamba", "mamba", "hybrid", "mamba", "hybrid", "mamba"],
    },
    "zaya": {"num_experts_per_tok": 1},
    **dict.fromkeys(("plbart", "whisper"), _DECODER),
}
"""What a family needs to be built, or to have layers of every kind on both sides of a cut."""


def small_config(family, **fields):
    """The configuration of a model of a few hundred thousand parameters.

    Raises whatever the family's own classes raise if these sizes do not suit it.
    """
    config_class = CONFIG_MAPPING[family]
    default = config_class()
    known = {*default.to_dict(), *default.attribute_map}
    sizes = {name: size for name, size in SIZES.items() if name in known}
    if "kv_lora_rank" in known:  # latent attention: every head has keys of its own
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
        sizes.pop("head_dim", None)
    return config_class(**{**sizes, **OVERRIDES.get(family, {}), **fields})
