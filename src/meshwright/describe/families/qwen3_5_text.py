"""Qwen3.5 dense (text decoder): gated delta nets and gated attention."""

from __future__ import annotations

from meshwright.describe.config import Config
from meshwright.describe.facts import Layer
from meshwright.describe.model import Model
from meshwright.describe.standard import attention, decoder, delta_net, linear_layers, mlp


def build(config: Config) -> Model:
    """Return the model of a ``qwen3_5_text`` config."""
    config = config.with_defaults(
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=32,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=256,
        vocab_size=248320,
        max_position_embeddings=32768,
        tie_word_embeddings=False,
        attention_bias=False,
        linear_conv_kernel_dim=4,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        linear_num_key_heads=16,
        linear_num_value_heads=32,
        full_attention_interval=4,
    )
    bias = config.flag("attention_bias")
    full = attention(config, qkv_bias=bias, out_bias=bias, qk_norm="head", output_gate=True)
    linear = delta_net(config)
    layers = tuple(
        Layer(mixer=linear if is_linear else full, ffn=mlp(config))
        for is_linear in linear_layers(config)
    )
    return decoder(config, layers)
