"""OLMoE (arXiv:2409.02060): 64 small experts, eight a token, norms over whole Q and K."""

from __future__ import annotations

from meshwright.describe.config import Config
from meshwright.describe.facts import Layer, Moe
from meshwright.describe.model import Model
from meshwright.describe.standard import attention, decoder


def build(config: Config) -> Model:
    """Return the model of an ``olmoe`` config."""
    config = config.with_defaults(
        hidden_size=2048,
        intermediate_size=2048,
        num_hidden_layers=16,
        num_attention_heads=16,
        vocab_size=50304,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        attention_bias=False,
        num_experts=64,
        num_experts_per_tok=8,
    )
    bias = config.flag("attention_bias")
    layer = Layer(
        mixer=attention(config, qkv_bias=bias, out_bias=bias, qk_norm="whole"),
        ffn=Moe(
            num_experts=config.size("num_experts", also="num_local_experts"),
            topk=config.size("num_experts_per_tok"),
            ffn_hidden_size=config.size("intermediate_size"),
        ),
    )
    return decoder(config, (layer,) * config.layers())
