"""GLM-4 0414: biases on Q, K and V, and norms before and after each branch."""

from __future__ import annotations

from meshwright.describe.config import Config
from meshwright.describe.facts import Layer
from meshwright.describe.model import Model
from meshwright.describe.standard import attention, decoder, mlp


def build(config: Config) -> Model:
    """Return the model of a ``glm4`` config."""
    config = config.with_defaults(
        hidden_size=4096,
        intermediate_size=13696,
        num_hidden_layers=40,
        num_attention_heads=32,
        num_key_value_heads=2,
        head_dim=128,
        vocab_size=151552,
        max_position_embeddings=131072,
        tie_word_embeddings=False,
        attention_bias=True,
    )
    layer = Layer(
        mixer=attention(config, qkv_bias=config.flag("attention_bias")),
        ffn=mlp(config),
        norms="sandwich",
    )
    return decoder(config, (layer,) * config.layers())
