"""OLMo 3: OLMo 2 with a window in three of four layers."""

from __future__ import annotations

from meshwright.describe.config import Config
from meshwright.describe.facts import Layer
from meshwright.describe.model import Model
from meshwright.describe.standard import attention, decoder, mlp, windows


def build(config: Config) -> Model:
    """Return the model of an ``olmo3`` config."""
    config = config.with_defaults(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        vocab_size=50304,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        attention_bias=False,
        sliding_window=4096,
    )
    bias = config.flag("attention_bias")
    pattern = [(i + 1) % 4 != 0 for i in range(config.layers())]
    layers = tuple(
        Layer(
            mixer=attention(config, qkv_bias=bias, out_bias=bias, qk_norm="whole", window=window),
            ffn=mlp(config),
            norms="post",
        )
        for window in windows(config, pattern)
    )
    return decoder(config, layers)
