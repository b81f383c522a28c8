"""Granite mixtures of experts (IBM)."""

from __future__ import annotations

from meshwright.describe.config import Config
from meshwright.describe.facts import Layer, Moe
from meshwright.describe.model import Model
from meshwright.describe.standard import attention, decoder


def build(config: Config) -> Model:
    """Return the model of a ``granitemoe`` config."""
    config = config.with_defaults(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        vocab_size=32000,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        attention_bias=False,
        num_local_experts=8,
        num_experts_per_tok=2,
    )

    bias = config.flag("attention_bias")
    layer = Layer(
        mixer=attention(config, qkv_bias=bias, out_bias=bias),
        ffn=Moe(
            num_experts=config.size("num_local_experts", also="num_experts"),
            topk=config.size("num_experts_per_tok"),
            ffn_hidden_size=config.size("intermediate_size"),
            shared_ffn_hidden_size=config.optional_size("shared_intermediate_size"),
        ),
    )
    return decoder(config, (layer,) * config.layers())
