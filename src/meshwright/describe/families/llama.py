"""Llama 1 to 3 (arXiv:2407.21783): grouped queries, RMSNorm, SwiGLU, rotary positions."""

from __future__ import annotations

from meshwright.describe.config import Config
from meshwright.describe.facts import Layer
from meshwright.describe.model import Model
from meshwright.describe.standard import attention, decoder, mlp


def build(config: Config) -> Model:
    """Return the model of a ``llama`` config."""
    config = config.with_defaults(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        vocab_size=32000,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        attention_bias=False,
        mlp_bias=False,
    )
    bias = config.flag("attention_bias")
    layer = Layer(
        mixer=attention(config, qkv_bias=bias, out_bias=bias),
        ffn=mlp(config, bias=config.flag("mlp_bias")),
    )
    return decoder(config, (layer,) * config.layers())
