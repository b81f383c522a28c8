"""EXAONE 4 (arXiv:2507.11407): norms after each branch and on Q and K, mixed windows."""

from __future__ import annotations

from meshwright.describe.config import Config
from meshwright.describe.facts import Layer
from meshwright.describe.model import Model
from meshwright.describe.standard import attention, decoder, mlp, windows


def build(config: Config) -> Model:
    """Return the model of an ``exaone4`` config."""
    config = config.with_defaults(
        hidden_size=4096,
        intermediate_size=16384,
        num_hidden_layers=32,
        num_attention_heads=32,
        vocab_size=102400,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        sliding_window=4096,
        sliding_window_pattern=4,
    )

    every = 0
    if not isinstance(config.values.get("sliding_window_pattern"), str):
        every = config.optional_size("sliding_window_pattern")
    pattern = [bool(every) and (i + 1) % every != 0 for i in range(config.layers())]
    layers = tuple(
        Layer(mixer=attention(config, qk_norm="head", window=window), ffn=mlp(config), norms="post")
        for window in windows(config, pattern)
    )
    return decoder(config, layers)
