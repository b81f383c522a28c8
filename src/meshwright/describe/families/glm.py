"""GLM-4 9B (2024): Llama layers with biases on Q, K and V."""

from __future__ import annotations

from meshwright.describe.config import Config
from meshwright.describe.facts import Layer
from meshwright.describe.model import Model
from meshwright.describe.standard import attention, decoder, mlp


def build(config: Config) -> Model:
    """Return the model of a ``glm`` config."""
    config = config.with_defaults(
        hidden_size=4096,
        intermediate_size=13696,
        num_hidden_layers=40,
        num_attention_heads=32,
        vocab_size=151552,
        max_position_embeddings=131072,
        tie_word_embeddings=False,
        num_key_value_heads=2,
        head_dim=128,
        attention_bias=True,
    )

    layer = Layer(mixer=attention(config, qkv_bias=config.flag("attention_bias")), ffn=mlp(config))
    return decoder(config, (layer,) * config.layers())
