"""Qwen3-Next: three gated delta nets to one gated attention, many small experts."""

from __future__ import annotations

from meshwright.describe.config import Config
from meshwright.describe.facts import Layer, Moe
from meshwright.describe.model import Model
from meshwright.describe.standard import (
    attention,
    decoder,
    delta_net,
    linear_layers,
    mlp,
    sparse_layers,
)


def build(config: Config) -> Model:
    """Return the model of a ``qwen3_next`` config."""
    config = config.with_defaults(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=48,
        num_attention_heads=16,
        num_key_value_heads=2,
        head_dim=256,
        vocab_size=151936,
        max_position_embeddings=32768,
        tie_word_embeddings=False,
        attention_bias=False,
        linear_conv_kernel_dim=4,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        linear_num_key_heads=16,
        linear_num_value_heads=32,
        num_experts=512,
        num_experts_per_tok=10,
        moe_intermediate_size=512,
        shared_expert_intermediate_size=512,
        decoder_sparse_step=1,
        full_attention_interval=4,
    )
    bias = config.flag("attention_bias")
    full = attention(config, qkv_bias=bias, out_bias=bias, qk_norm="head", output_gate=True)
    linear = delta_net(config)
    experts = Moe(
        num_experts=config.size("num_experts", also="num_local_experts"),
        topk=config.size("num_experts_per_tok"),
        ffn_hidden_size=config.size("moe_intermediate_size"),
        shared_ffn_hidden_size=config.size("shared_expert_intermediate_size"),
        shared_gate=True,
    )
    layers = tuple(
        Layer(mixer=linear if is_linear else full, ffn=experts if sparse else mlp(config))
        for is_linear, sparse in zip(linear_layers(config), sparse_layers(config), strict=True)
    )
    return decoder(config, layers)
