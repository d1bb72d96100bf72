"""Tiny random models that are mixtures of experts already: four experts a layer, of which each token takes two."""

from __future__ import annotations

from typing import Any

import transformers as tf

from tiny_base import NEURONS, VOCAB, More, decoder

EXPERTS = 4
# Attributes that the families call differently; a config ignores, or only keeps, those that are not its own.
_COUNTS = {
    "num_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "n_routed_experts": EXPERTS,
    "moe_num_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "moe_intermediate_size": NEURONS // 2,
    "shared_expert_intermediate_size": NEURONS,
    "shared_intermediate_size": NEURONS,
    "num_shared_experts": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
_MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
_ATTENTION_ONLY = {"layer_types": ["full_attention", "full_attention"]}


def _mixture(name: str, sites: int = 2 * EXPERTS, **changes: Any) -> More:
    """`sites` is the count of FFNs: in each of two layers the experts, or one FFN, and what every token runs."""

    def make() -> Any:
        config = getattr(tf, f"{name}Config")
        return decoder(config, getattr(tf, f"{name}ForCausalLM"), **{**_COUNTS, **changes})

    return More(make, sites=sites)


# One FFN, then experts and one that every token runs.
_ONE, _BESIDE = 1 + EXPERTS, 2 + EXPERTS
MIXTURES = {
    "mixtral": _mixture("Mixtral"),
    "qwen2_moe": _mixture("Qwen2Moe", 2 * (EXPERTS + 1)),
    "qwen3_moe": _mixture("Qwen3Moe", head_dim=8),
    "qwen3_next": _mixture("Qwen3Next", 2 * (EXPERTS + 1), head_dim=8, **_ATTENTION_ONLY),
    "olmoe": _mixture("Olmoe"),
    "flex_olmo": _mixture("FlexOlmo"),
    "deepseek_v2": _mixture("DeepseekV2", _BESIDE, **_MLA),
    "deepseek_v3": _mixture("DeepseekV3", _BESIDE, **_MLA),
    "glm4_moe": _mixture("Glm4Moe", _BESIDE, head_dim=8),
    "glm4_moe_lite": _mixture("Glm4MoeLite", _BESIDE, **_MLA),
    "granitemoe": _mixture("GraniteMoe"),
    "granitemoeshared": _mixture("GraniteMoeShared", 2 * (EXPERTS + 1)),
    "granitemoehybrid": _mixture(
        "GraniteMoeHybrid",
        2 * (EXPERTS + 1),
        layer_types=["attention", "attention"],
        mamba_n_heads=8,
        mamba_expand=1,
        mamba_d_head=4,
    ),
    "phimoe": _mixture("Phimoe"),
    "jamba": _mixture(
        "Jamba",
        _ONE,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        use_mamba_kernels=False,
        mamba_dt_rank=4,
    ),
    "hunyuan_v1_moe": _mixture("HunYuanMoEV1", 2 * (EXPERTS + 1), head_dim=8),
    "ernie4_5_moe": _mixture("Ernie4_5_Moe", _BESIDE, moe_num_shared_experts=1),
    "dots1": _mixture("Dots1", _BESIDE, head_dim=8),
    "minimax": _mixture("MiniMax", head_dim=8, **_ATTENTION_ONLY),
    "minimax_m2": _mixture("MiniMaxM2", head_dim=8),
    "afmoe": _mixture("Afmoe", _BESIDE, num_dense_layers=1, head_dim=8),
    "exaone_moe": _mixture("ExaoneMoe", _BESIDE, head_dim=8),
    "solar_open": _mixture("SolarOpen", 2 * (EXPERTS + 1), head_dim=8),
    "mimo_v2_flash": _mixture("MiMoV2Flash", _ONE, head_dim=8),
    "mellum": _mixture("Mellum", head_dim=8),
    "cohere2_moe": _mixture("Cohere2Moe", _BESIDE, head_dim=8),
    "laguna": _mixture("Laguna", _BESIDE, head_dim=8),
    "hy_v3": _mixture("HYV3", _BESIDE, head_dim=8),
    "mistral4": _mixture("Mistral4", _BESIDE, **_MLA),  # tried, as it has no row
    "lfm2_moe": _mixture("Lfm2Moe", _ONE, num_dense_layers=1, **_ATTENTION_ONLY),
    "nemotron_h": _mixture(
        "NemotronH",
        _BESIDE,
        head_dim=8,
        num_hidden_layers=3,
        layers_block_type=["moe", "full_attention", "mlp"],
        moe_shared_expert_intermediate_size=NEURONS,
    ),
}
# Gemma 4 has its experts beside the FFN of each layer.
_GEMMA4 = {"enable_moe_block": True, "top_k_experts": 2, "head_dim": 8, "global_head_dim": 8}


def _gemma4() -> Any:
    changes = {"vocab_size_per_layer_input": VOCAB, **_GEMMA4}
    return decoder(tf.Gemma4TextConfig, tf.Gemma4ForCausalLM, **{**_COUNTS, **changes})


MIXTURES["gemma4_text"] = More(_gemma4, sites=2 * (EXPERTS + 1))
# One of each layout, for what is tested on every dense family too.
WHOLE = ("mixtral", "qwen2_moe", "deepseek_v3", "granitemoeshared", "lfm2_moe", "nemotron_h", "mistral4")
