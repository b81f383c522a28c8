"""MiniMax-M2: many small experts, norms over whole Q and K."""

from __future__ import annotations

from meshwright.describe.config import Config
from meshwright.describe.facts import Layer, Moe
from meshwright.describe.model import Model
from meshwright.describe.standard import attention, decoder


def build(config: Config) -> Model:
    """Return the model of a ``minimax_m2`` config."""
    config = config.with_defaults(
        hidden_size=3072,
        intermediate_size=1536,
        num_hidden_layers=62,
        num_attention_heads=48,
        vocab_size=200064,
        max_position_embeddings=196608,
        tie_word_embeddings=False,
        num_key_value_heads=8,
        head_dim=128,
        num_local_experts=256,
        num_experts_per_tok=8,
    )

    layer = Layer(
        mixer=attention(config, qk_norm="whole"),
        ffn=Moe(
            num_experts=config.size("num_local_experts", also="num_experts"),
            topk=config.size("num_experts_per_tok"),
            ffn_hidden_size=config.size("intermediate_size"),
            correction_bias=True,
        ),
    )
    return decoder(config, (layer,) * config.layers())
