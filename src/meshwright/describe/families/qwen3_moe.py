"""Qwen3 mixtures of experts (arXiv:2505.09388), without a shared expert."""

from __future__ import annotations

from meshwright.describe.config import Config
from meshwright.describe.facts import Layer, Moe
from meshwright.describe.model import Model
from meshwright.describe.standard import attention, decoder, mlp, sparse_layers


def build(config: Config) -> Model:
    """Return the model of a ``qwen3_moe`` config."""
    config = config.with_defaults(
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=24,
        num_attention_heads=32,
        num_key_value_heads=4,
        vocab_size=151936,
        max_position_embeddings=32768,
        tie_word_embeddings=False,
        attention_bias=False,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
        decoder_sparse_step=1,
    )
    experts = Moe(
        num_experts=config.size("num_experts", also="num_local_experts"),
        topk=config.size("num_experts_per_tok"),
        ffn_hidden_size=config.size("moe_intermediate_size"),
    )
    bias = config.flag("attention_bias")
    windowed = config.flag("use_sliding_window", False)
    mixer = attention(
        config,
        qkv_bias=bias,
        out_bias=bias,
        qk_norm="head",
        window=config.optional_size("sliding_window") if windowed else 0,
    )
    layers = tuple(
        Layer(mixer=mixer, ffn=experts if sparse else mlp(config))
        for sparse in sparse_layers(config)
    )
    return decoder(config, layers)
