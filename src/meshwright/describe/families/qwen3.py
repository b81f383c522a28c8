"""Qwen3 dense (arXiv:2505.09388): norms on Q and K instead of biases."""

from __future__ import annotations

from meshwright.describe.config import Config
from meshwright.describe.facts import Layer
from meshwright.describe.model import Model
from meshwright.describe.standard import attention, decoder, mlp, upper_windows


def build(config: Config) -> Model:
    """Return the model of a ``qwen3`` config."""
    config = config.with_defaults(
        hidden_size=4096,
        intermediate_size=22016,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        head_dim=128,
        vocab_size=151936,
        max_position_embeddings=32768,
        tie_word_embeddings=False,
        attention_bias=False,
    )
    bias = config.flag("attention_bias")
    layers = tuple(
        Layer(
            mixer=attention(config, qkv_bias=bias, out_bias=bias, qk_norm="head", window=window),
            ffn=mlp(config),
        )
        for window in upper_windows(config)
    )
    return decoder(config, layers)
