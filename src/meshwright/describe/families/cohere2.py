"""Command R7B and Command A: parallel branches, a window in three of four layers."""

from __future__ import annotations

from meshwright.describe.config import Config
from meshwright.describe.facts import Layer
from meshwright.describe.model import Model
from meshwright.describe.standard import attention, decoder, mlp, windows


def build(config: Config) -> Model:
    """Return the model of a ``cohere2`` config."""
    config = config.with_defaults(
        hidden_size=8192,
        intermediate_size=22528,
        num_hidden_layers=40,
        num_attention_heads=64,
        vocab_size=256000,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        attention_bias=False,
        sliding_window=4096,
        sliding_window_pattern=4,
    )

    bias, every = config.flag("attention_bias"), config.size("sliding_window_pattern")
    pattern = [(i + 1) % every != 0 for i in range(config.layers())]
    layers = tuple(
        Layer(
            mixer=attention(config, qkv_bias=bias, out_bias=bias, window=window, rope=window > 0),
            ffn=mlp(config),
            parallel=True,
            shared_norm=True,
        )
        for window in windows(config, pattern)
    )
    return decoder(config, layers)
