"""Families against transformers itself (oracle), on shapes drawn at random."""

from __future__ import annotations

import random
import warnings
from typing import Any

import pytest

from meshwright import registry
from meshwright.describe.models import FAMILIES, build_model

SHAPES: dict[str, list[Any]] = {
    "hidden_size": [96, 192],
    "intermediate_size": [160, 224],
    "num_hidden_layers": [1, 2, 5],
    "num_attention_heads": [4, 8, 12],
    "num_key_value_heads": [1, 2, 4],
    "vocab_size": [320, 451],
    "max_position_embeddings": [64],
    "tie_word_embeddings": [True, False],
    "attention_bias": [True, False],
    "mlp_bias": [True, False],
    "pad_token_id": [0],
}
EXPERTS: dict[str, list[Any]] = {"moe_intermediate_size": [24, 40], "num_experts_per_tok": [1, 2]}
LATENT: dict[str, list[Any]] = {
    "q_lora_rank": [None, 24, 40],
    "kv_lora_rank": [16, 32],
    "qk_nope_head_dim": [8, 16],
    "qk_rope_head_dim": [4, 8],
    "v_head_dim": [8, 12],
    "n_routed_experts": [4, 8],
    "n_group": [1],
    "topk_group": [1],
    "n_shared_experts": [1, 2],
    "first_k_dense_replace": [0, 1, 3],
    "num_key_value_heads": [None],
}
INDEXER: dict[str, list[Any]] = {
    "index_n_heads": [2, 4],
    "index_head_dim": [16, 32],
    "index_topk": [8],
    "q_lora_rank": [24, 40],
}
QWEN_MOE: dict[str, list[Any]] = {
    **EXPERTS,
    "num_experts": [4, 8],
    "decoder_sparse_step": [1, 2],
    "mlp_only_layers": [[], [0]],
}
LINEAR: dict[str, list[Any]] = {
    "linear_num_value_heads": [4, 8],
    "linear_num_key_heads": [2, 4],
    "linear_key_head_dim": [8, 16],
    "linear_value_head_dim": [8, 24],
    "linear_conv_kernel_dim": [2, 4],
    "head_dim": [16, 32],
}
HEAD_DIM: dict[str, list[Any]] = {"head_dim": [8, 32]}
GPT2_NAMES: dict[str, list[Any]] = {
    "hidden_size": [96, 192],
    "n_head": [4, 8],
    "n_layer": [1, 3],
    "vocab_size": [320],
    "tie_word_embeddings": [True],
}
OWN: dict[str, dict[str, list[Any]]] = {
    "bloom": GPT2_NAMES,
    "cohere": {"use_qk_norm": [True, False], "tie_word_embeddings": [True]},
    "dbrx": {
        "d_model": [96, 192],
        "n_heads": [4, 8],
        "n_layers": [1, 3],
        "vocab_size": [320],
        "attn_config": [{"kv_n_heads": n, "rope_theta": 10000.0} for n in (2, 4)],
        "ffn_config": [
            {"hidden_size": 96, "ffn_hidden_size": 40, "moe_num_experts": 4, "moe_top_k": 2},
            {"hidden_size": 96, "ffn_hidden_size": 56, "moe_num_experts": 8, "moe_top_k": 1},
        ],
    },
    "cwm": HEAD_DIM,
    "deepseek_v2": {**LATENT, **EXPERTS},
    "deepseek_v3": {**LATENT, **EXPERTS},
    "deepseek_v32": {**LATENT, **EXPERTS, **INDEXER, "num_key_value_heads": [4]},
    "deepseek_v4": {
        **EXPERTS,
        **INDEXER,
        "num_hidden_layers": [3, 6],
        "num_attention_heads": [4, 8],
        "head_dim": [32, 64],
        "q_lora_rank": [24, 40],
        "o_lora_rank": [16, 24],
        "o_groups": [2, 4],
        "n_routed_experts": [4, 8],
        "hc_mult": [2, 4],
        "intermediate_size": [24],
        "moe_intermediate_size": [24],
        "attention_bias": [False],
    },
    "cohere2": {"tie_word_embeddings": [True], "head_dim": [8, 32]},
    "dots1": {
        **EXPERTS,
        **HEAD_DIM,
        "n_routed_experts": [4, 8],
        "n_shared_experts": [1, 2],
        "first_k_dense_replace": [0, 1],
    },
    "ernie4_5": {**HEAD_DIM, "use_bias": [True, False]},
    "ernie4_5_moe": {
        "moe_intermediate_size": [24],
        "moe_k": [2],
        "moe_num_experts": [4, 8],
        "moe_num_shared_experts": [1, 2],
        "moe_layer_start_index": [0, 1],
        "moe_layer_interval": [1, 2],
    },
    "exaone4": HEAD_DIM,
    "falcon": {
        "new_decoder_architecture": [True, False],
        "multi_query": [True, False],
        "parallel_attn": [True, False],
        "bias": [True, False],
        "num_kv_heads": [2, 4],
        "ffn_hidden_size": [200, 300],
        "tie_word_embeddings": [True],
    },
    "flex_olmo": {"num_experts": [4, 8], "num_experts_per_tok": [1, 2]},
    "gemma": HEAD_DIM,
    "gemma2": HEAD_DIM,
    "gemma3_text": HEAD_DIM,
    "glm4": HEAD_DIM,
    "glm4_moe": {
        **EXPERTS,
        "n_routed_experts": [4, 8],
        "n_shared_experts": [1, 2],
        "first_k_dense_replace": [0, 1],
        "use_qk_norm": [True, False],
        "head_dim": [8, 32],
    },
    "glm4_moe_lite": {
        **LATENT,
        **EXPERTS,
        "q_lora_rank": [24],
        "first_k_dense_replace": [1],
        "num_key_value_heads": [4],
    },
    "glm_moe_dsa": {**LATENT, **EXPERTS, **INDEXER, "num_key_value_heads": [4]},
    "glm": HEAD_DIM,
    "gpt_bigcode": {**GPT2_NAMES, "multi_query": [True, False], "n_inner": [None, 100]},
    "gptj": {**GPT2_NAMES, "tie_word_embeddings": [False], "rotary_dim": [8]},
    "granitemoe": {"num_local_experts": [4, 8], "num_experts_per_tok": [1, 2]},
    "granitemoeshared": {
        "num_local_experts": [4, 8],
        "num_experts_per_tok": [1, 2],
        "shared_intermediate_size": [0, 48],
    },
    "gpt2": {
        "n_embd": [96, 192],
        "n_head": [4, 8],
        "n_layer": [1, 3],
        "n_positions": [32, 64],
        "n_inner": [None, 100],
        "vocab_size": [320],
    },
    "gpt_neox": {"use_parallel_residual": [True, False]},
    "gpt_oss": {"num_local_experts": [4, 8], "num_experts_per_tok": [2], "head_dim": [8, 16]},
    "hunyuan_v1_dense": HEAD_DIM,
    "internlm3": {**HEAD_DIM, "attention_bias": [False], "mlp_bias": [False]},
    "ministral": HEAD_DIM,
    "llama": {"head_dim": [None, 8, 32]},
    "llama4_text": {
        "num_local_experts": [2, 4],
        "intermediate_size_mlp": [100],
        "interleave_moe_layer_step": [1, 2],
        "head_dim": [8, 16],
    },
    "mamba2": {
        "num_heads": [12],
        "head_dim": [16],
        "hidden_size": [96],
        "state_size": [16, 32],
        "n_groups": [2, 4],
        "conv_kernel": [2, 4],
        "use_bias": [True, False],
        "use_conv_bias": [True, False],
    },
    "minimax_m2": {"num_local_experts": [4, 8], "num_experts_per_tok": [2], "head_dim": [8, 32]},
    "mistral": {"head_dim": [None, 8]},
    "mixtral": {"num_local_experts": [4, 8], "head_dim": [None, 8]},
    "mpt": {
        "d_model": [96, 192],
        "n_heads": [4, 8],
        "n_layers": [1, 3],
        "expansion_ratio": [4],
        "vocab_size": [320],
    },
    "nemotron": {"head_dim": [None, 16]},
    "nemotron_h": {
        "tie_word_embeddings": [False],
        "attention_bias": [False],
        "layers_block_type": [
            ["mamba", "moe", "attention", "mlp", "mamba"],
            ["mamba", "attention"],
        ],
        "mamba_num_heads": [8, 16],
        "mamba_head_dim": [8, 16],
        "ssm_state_size": [16, 32],
        "n_groups": [2, 4],
        "conv_kernel": [2, 4],
        "use_conv_bias": [True, False],
        "use_bias": [True, False],
        "n_routed_experts": [4, 8],
        "moe_intermediate_size": [24],
        "moe_shared_expert_intermediate_size": [40],
        "moe_latent_size": [None, 32],
        "head_dim": [8, 16],
    },
    "olmoe": {"num_experts": [4, 8], "num_experts_per_tok": [1, 2]},
    "opt": {
        "hidden_size": [96],
        "word_embed_proj_dim": [96],
        "ffn_dim": [100, 200],
        "enable_bias": [True, False],
    },
    "phi": {"tie_word_embeddings": [False]},
    "phimoe": {
        "num_local_experts": [4, 8],
        "lm_head_bias": [True, False],
        "tie_word_embeddings": [False],
    },
    "qwen2_moe": {**QWEN_MOE, "shared_expert_intermediate_size": [48], "qkv_bias": [True, False]},
    "qwen3": HEAD_DIM,
    "qwen3_moe": {**QWEN_MOE, "head_dim": [8, 32]},
    "qwen3_next": {**QWEN_MOE, **LINEAR, "shared_expert_intermediate_size": [48]},
    "qwen3_5_moe_text": {
        **EXPERTS,
        **LINEAR,
        "num_experts": [4, 8],
        "shared_expert_intermediate_size": [48],
    },
    "qwen3_5_text": LINEAR,
    "seed_oss": {**HEAD_DIM, "attention_out_bias": [True, False]},
    "solar_open": {
        **EXPERTS,
        **HEAD_DIM,
        "n_routed_experts": [4, 8],
        "n_shared_experts": [1, 2],
    },
    "stablelm": {"use_qkv_bias": [True, False], "use_parallel_residual": [True, False]},
    "starcoder2": {"use_bias": [True, False]},
}
WITHOUT_COMMON_SHAPES = ("bloom", "dbrx", "gpt2", "gpt_bigcode", "gptj", "mpt")
NOT_IN_TRANSFORMERS = ("kimi_k2",)
"""Published with code of its own; it reads the keys of deepseek_v3."""


def draw(family: str, seed: int) -> dict[str, Any]:
    """Return a config of small random shapes."""
    rng = random.Random(f"{family} {seed}")
    common = {} if family in WITHOUT_COMMON_SHAPES else SHAPES
    keys = {**common, **OWN.get(family, {})}
    return {key: rng.choice(values) for key, values in keys.items()}


def count_by_transformers(family: str, config: dict[str, Any]) -> int:
    """Return the number of weights of transformers' own model, correction biases included."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers", minversion="5.0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = transformers.CONFIG_MAPPING[family](**config)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(made)
    biases = (b for name, b in model.named_buffers() if name.endswith("e_score_correction_bias"))
    return sum(p.numel() for p in (*model.parameters(), *biases))


def described(family: str) -> bool:
    return family not in NOT_IN_TRANSFORMERS


@pytest.mark.parametrize("family", [f for f in registry.names(FAMILIES) if described(f)])
@pytest.mark.parametrize("seed", range(4))
def test_a_family_counts_the_weights_that_transformers_builds(family: str, seed: int) -> None:
    config = draw(family, seed)
    model = build_model({"model_type": family, **config})
    assert model.num_params == count_by_transformers(family, config)


REFUSED_DEFAULTS = ("glm4_moe", "nemotron", "dots1", "hunyuan_v1_dense", "ministral", "dbrx")
"""transformers itself fails on its defaults, or floors a head size that does not divide."""


@pytest.mark.parametrize(
    "family", [f for f in registry.names(FAMILIES) if described(f) and f not in REFUSED_DEFAULTS]
)
def test_keys_left_out_take_the_defaults_of_transformers(family: str) -> None:
    config: dict[str, Any] = {"pad_token_id": 0}
    if family == "deepseek_v2":
        config["num_experts_per_tok"] = 6
    if family == "deepseek_v4":
        config["num_hidden_layers"] = 4
    model = build_model({"model_type": family, **config})
    assert any("left out" in note for note in model.assumed)
    assert model.num_params == count_by_transformers(family, config)
