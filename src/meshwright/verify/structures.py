"""Models of every structure that the runtime computes, to try layouts on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from meshwright.runtime.shape import MlaShape, ModelShape, MoeShape, Rope

STRUCTURES: dict[str, ModelShape] = {
    "qwen3": ModelShape(
        model_type="qwen3",
        hidden_size=64,
        num_layers=4,
        num_heads=8,
        num_kv_heads=4,
        head_dim=8,
        ffn_hidden_size=64,
        vocab_size=100,
        qkv_bias=True,
        qk_norm="head",
        tie_word_embeddings=True,
        rope=Rope(kind="yarn", factor=4.0),
    ),
    "olmo2": ModelShape(
        model_type="olmo2",
        hidden_size=64,
        num_layers=4,
        num_heads=8,
        num_kv_heads=8,
        head_dim=8,
        ffn_hidden_size=64,
        vocab_size=100,
        qk_norm="whole",
        norms="post",
        out_bias=True,
        mlp_bias=True,
        rope=Rope(kind="llama3", factor=8.0),
    ),
    "qwen2_moe": ModelShape(
        model_type="qwen2_moe",
        hidden_size=64,
        num_layers=4,
        num_heads=8,
        num_kv_heads=2,
        head_dim=8,
        ffn_hidden_size=64,
        vocab_size=100,
        moe=MoeShape(
            num_experts=8,
            topk=2,
            ffn_hidden_size=16,
            shared_ffn_hidden_size=32,
            shared_gate=True,
            normalise=False,
            z_loss_coef=0.001,
        ),
        moe_layers=(0, 1, 2, 3),
    ),
    "deepseek_v3": ModelShape(
        model_type="deepseek_v3",
        hidden_size=64,
        num_layers=4,
        num_heads=8,
        num_kv_heads=8,
        head_dim=8,
        ffn_hidden_size=64,
        vocab_size=100,
        mla=MlaShape(
            q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8
        ),
        moe=MoeShape(
            num_experts=8,
            topk=2,
            ffn_hidden_size=16,
            shared_ffn_hidden_size=32,
            scoring="sigmoid",
            num_groups=2,
            group_score="top2",
            correction_bias=True,
            routed_scaling_factor=2.5,
            names="deepseek",
        ),
        moe_layers=(1, 2, 3, 4),
        mtp_layers=1,
        rope=Rope(interleaved=True),
    ),
    "mistral": ModelShape(
        model_type="mistral",
        hidden_size=64,
        num_layers=4,
        num_heads=8,
        num_kv_heads=2,
        head_dim=8,
        ffn_hidden_size=64,
        vocab_size=100,
        window=16,
        window_layers=(0, 2),
    ),
    "lora": ModelShape(
        model_type="qwen2",
        hidden_size=64,
        num_layers=4,
        num_heads=8,
        num_kv_heads=2,
        head_dim=8,
        ffn_hidden_size=64,
        vocab_size=100,
        qkv_bias=True,
        lora_rank=4,
    ),
    "deepseek_v2_lora": ModelShape(
        model_type="deepseek_v2",
        hidden_size=64,
        num_layers=4,
        num_heads=8,
        num_kv_heads=8,
        head_dim=8,
        ffn_hidden_size=64,
        vocab_size=100,
        mla=MlaShape(
            q_lora_rank=0, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8
        ),
        moe=MoeShape(
            num_experts=8, topk=2, ffn_hidden_size=16, shared_ffn_hidden_size=32, names="deepseek"
        ),
        moe_layers=(1, 2, 3),
        rope=Rope(interleaved=True),
        lora_rank=4,
    ),
}


def _with_experts(name: str, **changed: Any) -> ModelShape:
    """Return a structure whose experts are balanced otherwise."""
    shape = STRUCTURES[name]
    assert shape.moe is not None
    return replace(shape, moe=replace(shape.moe, **changed))


STRUCTURES["gemma3"] = replace(
    STRUCTURES["mistral"],
    model_type="gemma3_text",
    qk_norm="head",
    norms="sandwich",
    norm_offset=True,
    activation="gelu_tanh",
    attention_softcap=2.0,
    logit_softcap=3.0,
    embedding_scale=8.0,
    window_rope=Rope(theta=100.0),
    tie_word_embeddings=True,
)
STRUCTURES["gpt_oss"] = replace(
    _with_experts(
        "qwen2_moe",
        shared_ffn_hidden_size=0,
        shared_gate=False,
        normalise=True,
        router_bias=True,
        expert_bias=True,
        names="gpt_oss",
    ),
    model_type="gpt_oss",
    sinks=True,
    qkv_bias=True,
    out_bias=True,
    activation="clamped_swish",
    window=16,
    window_layers=(0, 2),
)
STRUCTURES["glm4_moe"] = replace(
    STRUCTURES["deepseek_v3"],
    model_type="glm4_moe",
    mla=None,
    num_kv_heads=2,
    qk_norm="head",
    rope=Rope(partial_factor=0.5),
    unrotated_layers=(3,),
)
STRUCTURES["capacity"] = _with_experts("qwen2_moe", capacity_factor=1.0)
STRUCTURES["padded"] = _with_experts(
    "qwen2_moe", capacity_factor=1.0, drop_policy="position", pad_to_capacity=True
)
STRUCTURES["balanced"] = _with_experts(
    "deepseek_v3", capacity_factor=1.5, balance="seq_aux_loss", bias_update_rate=0.01
)
