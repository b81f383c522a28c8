"""Command R: attention and MLP in parallel behind one norm without bias."""

from __future__ import annotations

from meshwright.describe.config import Config
from meshwright.describe.facts import Layer
from meshwright.describe.model import Model
from meshwright.describe.standard import attention, decoder, mlp


def build(config: Config) -> Model:
    """Return the model of a ``cohere`` config."""
    config = config.with_defaults(
        hidden_size=8192,
        intermediate_size=22528,
        num_hidden_layers=40,
        num_attention_heads=64,
        vocab_size=256000,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        attention_bias=False,
        use_qk_norm=False,
    )
    bias = config.flag("attention_bias")
    layer = Layer(
        mixer=attention(
            config,
            qkv_bias=bias,
            out_bias=bias,
            qk_norm="whole" if config.flag("use_qk_norm") else "",
        ),
        ffn=mlp(config),
        parallel=True,
        shared_norm=True,
    )
    return decoder(config, (layer,) * config.layers())
