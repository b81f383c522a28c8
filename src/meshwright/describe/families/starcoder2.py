"""StarCoder2 (arXiv:2402.19173): LayerNorm and biases with grouped queries."""

from __future__ import annotations

from meshwright.describe.config import Config
from meshwright.describe.facts import Layer
from meshwright.describe.model import Model
from meshwright.describe.standard import attention, decoder, mlp


def build(config: Config) -> Model:
    """Return the model of a ``starcoder2`` config."""
    config = config.with_defaults(
        hidden_size=3072,
        intermediate_size=12288,
        num_hidden_layers=30,
        num_attention_heads=24,
        num_key_value_heads=2,
        vocab_size=49152,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        use_bias=True,
        residual_dropout=0.0,
    )
    bias = config.flag("use_bias")
    layer = Layer(
        mixer=attention(
            config, qkv_bias=bias, out_bias=bias, window=config.optional_size("sliding_window")
        ),
        ffn=mlp(config, gated=False, bias=bias),
    )
    return decoder(
        config,
        (layer,) * config.layers(),
        norm_weights=2,
        hidden_dropout=config.fraction("residual_dropout"),
    )
