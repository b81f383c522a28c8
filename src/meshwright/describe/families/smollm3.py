"""SmolLM3: Llama layers, every fourth without rotary positions."""

from __future__ import annotations

from meshwright.describe.config import Config
from meshwright.describe.facts import Layer
from meshwright.describe.model import Model
from meshwright.describe.standard import attention, decoder, mlp


def build(config: Config) -> Model:
    """Return the model of a ``smollm3`` config."""
    config = config.with_defaults(
        hidden_size=2048,
        intermediate_size=11008,
        num_hidden_layers=36,
        num_attention_heads=16,
        num_key_value_heads=4,
        vocab_size=128256,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
        attention_bias=False,
        mlp_bias=False,
        no_rope_layer_interval=4,
    )
    bias, every = config.flag("attention_bias"), config.size("no_rope_layer_interval")
    layers = tuple(
        Layer(
            mixer=attention(config, qkv_bias=bias, out_bias=bias, rope=bool((i + 1) % every)),
            ffn=mlp(config, bias=config.flag("mlp_bias")),
        )
        for i in range(config.layers())
    )
    return decoder(config, layers)
