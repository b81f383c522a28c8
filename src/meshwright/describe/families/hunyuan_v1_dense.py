"""Hunyuan dense: Llama layers with norms on Q and K."""

from __future__ import annotations

from meshwright.describe.config import Config
from meshwright.describe.facts import Layer
from meshwright.describe.model import Model
from meshwright.describe.standard import attention, decoder, mlp


def build(config: Config) -> Model:
    """Return the model of a ``hunyuan_v1_dense`` config."""
    config = config.with_defaults(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        vocab_size=290943,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        attention_bias=False,
    )

    bias = config.flag("attention_bias")
    layer = Layer(
        mixer=attention(config, qkv_bias=bias, out_bias=bias, qk_norm="head"), ffn=mlp(config)
    )
    return decoder(config, (layer,) * config.layers())
