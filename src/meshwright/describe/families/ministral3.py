"""Ministral 3: the layers of Mistral without a window."""

from __future__ import annotations

from meshwright.describe.config import Config
from meshwright.describe.facts import Layer
from meshwright.describe.model import Model
from meshwright.describe.standard import attention, decoder, mlp


def build(config: Config) -> Model:
    """Return the model of a ``ministral3`` config."""
    config = config.with_defaults(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=34,
        num_attention_heads=32,
        vocab_size=131072,
        max_position_embeddings=262144,
        tie_word_embeddings=False,
        num_key_value_heads=8,
        head_dim=128,
    )

    layer = Layer(
        mixer=attention(config, window=config.optional_size("sliding_window")), ffn=mlp(config)
    )
    return decoder(config, (layer,) * config.layers())
