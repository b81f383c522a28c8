"""InternLM3: Llama layers with biases where its config asks for them."""

from __future__ import annotations

from meshwright.describe.config import Config
from meshwright.describe.facts import Layer
from meshwright.describe.model import Model
from meshwright.describe.standard import attention, decoder, mlp


def build(config: Config) -> Model:
    """Return the model of an ``internlm3`` config."""
    config = config.with_defaults(
        hidden_size=4096,
        intermediate_size=10240,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=2,
        head_dim=128,
        vocab_size=128512,
        max_position_embeddings=32768,
        tie_word_embeddings=False,
        attention_bias=False,
        mlp_bias=False,
    )
    bias = config.flag("mlp_bias")
    layer = Layer(
        mixer=attention(config, qkv_bias=config.flag("attention_bias"), out_bias=bias),
        ffn=mlp(config, bias=bias),
    )
    return decoder(config, (layer,) * config.layers())
