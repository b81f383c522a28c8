"""Qwen2-MoE and Qwen1.5-MoE: many small experts beside a gated shared one."""

from __future__ import annotations

from meshwright.describe.config import Config
from meshwright.describe.facts import Layer
from meshwright.describe.model import Model
from meshwright.describe.standard import (
    attention,
    decoder,
    mlp,
    qwen_experts,
    sparse_layers,
    upper_windows,
)


def build(config: Config) -> Model:
    """Return the model of a ``qwen2_moe`` config."""
    config = config.with_defaults(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_key_value_heads=16,
        vocab_size=151936,
        max_position_embeddings=32768,
        tie_word_embeddings=False,
        qkv_bias=True,
        num_experts=60,
        num_experts_per_tok=4,
        moe_intermediate_size=1408,
        shared_expert_intermediate_size=5632,
        decoder_sparse_step=1,
    )
    experts = qwen_experts(config)
    bias = config.flag("qkv_bias")
    layers = tuple(
        Layer(
            mixer=attention(config, qkv_bias=bias, window=window),
            ffn=experts if sparse else mlp(config),
        )
        for window, sparse in zip(upper_windows(config), sparse_layers(config), strict=True)
    )
    return decoder(config, layers)
