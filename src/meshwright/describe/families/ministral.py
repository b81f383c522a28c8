"""Ministral 8B: Mistral with windows in some layers."""

from __future__ import annotations

from meshwright.describe.config import Config
from meshwright.describe.facts import Layer
from meshwright.describe.model import Model
from meshwright.describe.standard import attention, decoder, mlp, windows


def build(config: Config) -> Model:
    """Return the model of a ``ministral`` config."""
    config = config.with_defaults(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        vocab_size=32000,
        max_position_embeddings=131072,
        tie_word_embeddings=False,
        num_key_value_heads=8,
        sliding_window=4096,
    )

    layers = tuple(
        Layer(mixer=attention(config, window=window), ffn=mlp(config))
        for window in windows(config, [True] * config.layers())
    )
    return decoder(config, layers)
