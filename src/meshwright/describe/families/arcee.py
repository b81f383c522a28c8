"""Arcee AFM: Llama layers with squared ReLU."""

from __future__ import annotations

from meshwright.describe.config import Config
from meshwright.describe.facts import Layer
from meshwright.describe.model import Model
from meshwright.describe.standard import attention, decoder, mlp


def build(config: Config) -> Model:
    """Return the model of an ``arcee`` config."""
    config = config.with_defaults(
        hidden_size=2560,
        intermediate_size=18432,
        num_hidden_layers=32,
        num_attention_heads=32,
        vocab_size=32000,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        attention_bias=False,
        mlp_bias=False,
    )

    bias = config.flag("attention_bias")
    layer = Layer(
        mixer=attention(config, qkv_bias=bias, out_bias=bias),
        ffn=mlp(config, gated=False, bias=config.flag("mlp_bias")),
    )
    return decoder(config, (layer,) * config.layers())
