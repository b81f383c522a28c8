"""Mistral 7B (arXiv:2310.06825): grouped queries and a sliding window."""

from __future__ import annotations

from meshwright.describe.config import Config
from meshwright.describe.facts import Layer
from meshwright.describe.model import Model
from meshwright.describe.standard import attention, decoder, mlp


def build(config: Config) -> Model:
    """Return the model of a ``mistral`` config."""
    config = config.with_defaults(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=32000,
        max_position_embeddings=131072,
        tie_word_embeddings=False,
        sliding_window=4096,
    )
    layer = Layer(
        mixer=attention(config, window=config.nullable_size("sliding_window")), ffn=mlp(config)
    )
    return decoder(config, (layer,) * config.layers())
