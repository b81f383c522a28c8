"""Gemma 2 (arXiv:2408.00118): four norms a layer, a window in every second one."""

from __future__ import annotations

from meshwright.describe.config import Config
from meshwright.describe.facts import Layer
from meshwright.describe.model import Model
from meshwright.describe.standard import attention, decoder, mlp, windows


def build(config: Config) -> Model:
    """Return the model of a ``gemma2`` config."""
    config = config.with_defaults(
        hidden_size=2304,
        intermediate_size=9216,
        num_hidden_layers=26,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=256,
        vocab_size=256000,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        attention_bias=False,
        sliding_window=4096,
    )
    bias = config.flag("attention_bias")
    pattern = [i % 2 == 0 for i in range(config.layers())]
    layers = tuple(
        Layer(
            mixer=attention(config, qkv_bias=bias, out_bias=bias, window=window),
            ffn=mlp(config),
            norms="sandwich",
        )
        for window in windows(config, pattern)
    )
    return decoder(config, layers)
