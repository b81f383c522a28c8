"""ERNIE 4.5 dense: Llama layers, tied embeddings."""

from __future__ import annotations

from meshwright.describe.config import Config
from meshwright.describe.facts import Layer
from meshwright.describe.model import Model
from meshwright.describe.standard import attention, decoder, mlp


def build(config: Config) -> Model:
    """Return the model of an ``ernie4_5`` config."""
    config = config.with_defaults(
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=18,
        num_attention_heads=16,
        vocab_size=103424,
        max_position_embeddings=131072,
        tie_word_embeddings=True,
        num_key_value_heads=2,
        head_dim=128,
        use_bias=False,
    )

    bias = config.flag("use_bias")
    layer = Layer(mixer=attention(config, qkv_bias=bias, out_bias=bias), ffn=mlp(config, bias=bias))
    return decoder(config, (layer,) * config.layers())
