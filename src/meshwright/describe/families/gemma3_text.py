"""Gemma 3 (arXiv:2503.19786): Gemma 2 with norms on Q and K, five windows to one full layer."""

from __future__ import annotations

from meshwright.describe.config import Config
from meshwright.describe.facts import Layer
from meshwright.describe.model import Model
from meshwright.describe.standard import attention, decoder, mlp, windows


def build(config: Config) -> Model:
    """Return the model of a ``gemma3_text`` config."""
    config = config.with_defaults(
        hidden_size=2304,
        intermediate_size=9216,
        num_hidden_layers=26,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=256,
        vocab_size=262208,
        max_position_embeddings=131072,
        tie_word_embeddings=True,
        attention_bias=False,
        sliding_window=4096,
        sliding_window_pattern=6,
    )
    bias = config.flag("attention_bias")
    every = config.size("sliding_window_pattern", also="_sliding_window_pattern")
    pattern = [(i + 1) % every != 0 for i in range(config.layers())]
    layers = tuple(
        Layer(
            mixer=attention(config, qkv_bias=bias, out_bias=bias, qk_norm="head", window=window),
            ffn=mlp(config),
            norms="sandwich",
        )
        for window in windows(config, pattern)
    )
    return decoder(config, layers)
