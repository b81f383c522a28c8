"""Phi-3 and Phi-4 (arXiv:2404.14219): Llama layers with fused projections."""

from __future__ import annotations

from meshwright.describe.config import Config
from meshwright.describe.facts import Layer
from meshwright.describe.model import Model
from meshwright.describe.standard import attention, decoder, mlp


def build(config: Config) -> Model:
    """Return the model of a ``phi3`` config."""
    config = config.with_defaults(
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=32,
        num_attention_heads=32,
        vocab_size=32064,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        resid_pdrop=0.0,
    )
    layer = Layer(
        mixer=attention(config, window=config.optional_size("sliding_window")), ffn=mlp(config)
    )
    return decoder(
        config, (layer,) * config.layers(), hidden_dropout=config.fraction("resid_pdrop")
    )
