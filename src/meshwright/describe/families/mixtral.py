"""Mixtral (arXiv:2401.04088): Mistral's attention with eight experts, two a token."""

from __future__ import annotations

from meshwright.describe.config import Config
from meshwright.describe.decoder import build_decoder
from meshwright.describe.facts import Attention, Decoder, Layer, Moe
from meshwright.describe.model import Model


def build(config: Config) -> Model:
    """Return the model of a ``mixtral`` config."""
    hidden = config.size("hidden_size", 4096)
    heads = config.size("num_attention_heads", 32)
    layer = Layer(
        mixer=Attention(
            num_heads=heads,
            num_kv_heads=config.size("num_key_value_heads", 8),
            head_dim=config.head_dim(hidden, heads),
            window=config.optional_size("sliding_window"),
        ),
        ffn=Moe(
            num_experts=config.size("num_local_experts", 8, also="num_experts"),
            topk=config.size("num_experts_per_tok", 2),
            ffn_hidden_size=config.size("intermediate_size", 14336),
        ),
    )
    return build_decoder(
        Decoder(
            model_type="mixtral",
            hidden_size=hidden,
            vocab_size=config.size("vocab_size", 32000),
            layers=(layer,) * config.layers("num_hidden_layers", 32),
            max_seq_len=config.size("max_position_embeddings", 131072),
            tie_word_embeddings=config.flag("tie_word_embeddings", False),
        )
    )
