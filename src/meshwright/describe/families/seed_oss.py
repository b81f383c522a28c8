"""Seed-OSS: Llama layers with biases on Q, K and V and dropout."""

from __future__ import annotations

from meshwright.describe.config import Config
from meshwright.describe.facts import Layer
from meshwright.describe.model import Model
from meshwright.describe.standard import attention, decoder, mlp


def build(config: Config) -> Model:
    """Return the model of a ``seed_oss`` config."""
    config = config.with_defaults(
        hidden_size=4096,
        intermediate_size=27648,
        num_hidden_layers=64,
        num_attention_heads=80,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=155136,
        max_position_embeddings=524288,
        tie_word_embeddings=False,
        attention_bias=True,
        attention_out_bias=False,
        mlp_bias=False,
        residual_dropout=0.1,
    )
    layer = Layer(
        mixer=attention(
            config,
            qkv_bias=config.flag("attention_bias"),
            out_bias=config.flag("attention_out_bias"),
        ),
        ffn=mlp(config, bias=config.flag("mlp_bias")),
    )
    return decoder(
        config, (layer,) * config.layers(), hidden_dropout=config.fraction("residual_dropout")
    )
