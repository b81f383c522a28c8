"""Phi-3.5-MoE: sixteen experts, two a token, LayerNorm."""

from __future__ import annotations

from meshwright.describe.config import Config
from meshwright.describe.facts import Layer, Moe
from meshwright.describe.model import Model
from meshwright.describe.standard import attention, decoder


def build(config: Config) -> Model:
    """Return the model of a ``phimoe`` config."""
    config = config.with_defaults(
        hidden_size=4096,
        intermediate_size=6400,
        num_hidden_layers=32,
        num_attention_heads=32,
        vocab_size=32064,
        max_position_embeddings=131072,
        tie_word_embeddings=False,
        num_key_value_heads=8,
        attention_bias=False,
        lm_head_bias=False,
        num_local_experts=16,
        num_experts_per_tok=2,
    )

    bias = config.flag("attention_bias")
    layer = Layer(
        mixer=attention(
            config, qkv_bias=bias, out_bias=bias, window=config.optional_size("sliding_window")
        ),
        ffn=Moe(
            num_experts=config.size("num_local_experts", also="num_experts"),
            topk=config.size("num_experts_per_tok"),
            ffn_hidden_size=config.size("intermediate_size"),
        ),
    )
    return decoder(
        config,
        (layer,) * config.layers(),
        norm_weights=2,
        head_bias=config.flag("lm_head_bias"),
    )
