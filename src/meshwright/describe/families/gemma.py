"""Gemma (arXiv:2403.08295): GeGLU, heads of 256, tied embeddings."""

from __future__ import annotations

from meshwright.describe.config import Config
from meshwright.describe.facts import Layer
from meshwright.describe.model import Model
from meshwright.describe.standard import attention, decoder, mlp


def build(config: Config) -> Model:
    """Return the model of a ``gemma`` config."""
    config = config.with_defaults(
        hidden_size=3072,
        intermediate_size=24576,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=16,
        head_dim=256,
        vocab_size=256000,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        attention_bias=False,
    )
    bias = config.flag("attention_bias")
    layer = Layer(mixer=attention(config, qkv_bias=bias, out_bias=bias), ffn=mlp(config))
    return decoder(config, (layer,) * config.layers())
