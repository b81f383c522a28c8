"""Nemotron-3 and Nemotron-4 (arXiv:2402.16819): squared ReLU, LayerNorm, no biases."""

from __future__ import annotations

from meshwright.describe.config import Config
from meshwright.describe.facts import Layer
from meshwright.describe.model import Model
from meshwright.describe.standard import attention, decoder, mlp


def build(config: Config) -> Model:
    """Return the model of a ``nemotron`` config."""
    config = config.with_defaults(
        hidden_size=6144,
        intermediate_size=24576,
        num_hidden_layers=32,
        num_attention_heads=48,
        vocab_size=256000,
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
    return decoder(config, (layer,) * config.layers(), norm_weights=2)
