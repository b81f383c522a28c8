"""Mixtral (arXiv:2401.04088): Mistral's attention with eight experts, two a token."""

from __future__ import annotations

from meshwright.describe.config import Config
from meshwright.describe.facts import Layer, Moe
from meshwright.describe.model import Model
from meshwright.describe.standard import attention, decoder


def build(config: Config) -> Model:
    """Return the model of a ``mixtral`` config."""
    config = config.with_defaults(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=32000,
        max_position_embeddings=131072,
        tie_word_embeddings=False,
        num_local_experts=8,
        num_experts_per_tok=2,
    )
    layer = Layer(
        mixer=attention(config, window=config.optional_size("sliding_window")),
        ffn=Moe(
            num_experts=config.size("num_local_experts", also="num_experts"),
            topk=config.size("num_experts_per_tok"),
            ffn_hidden_size=config.size("intermediate_size"),
        ),
    )
    return decoder(config, (layer,) * config.layers())
