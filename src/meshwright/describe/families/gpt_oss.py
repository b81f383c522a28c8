"""gpt-oss (arXiv:2508.10925): attention sinks, windows in every second layer, biases."""

from __future__ import annotations

from meshwright.describe.config import Config
from meshwright.describe.facts import Layer, Moe
from meshwright.describe.model import Model
from meshwright.describe.standard import attention, decoder, windows


def build(config: Config) -> Model:
    """Return the model of a ``gpt_oss`` config."""
    config = config.with_defaults(
        hidden_size=2880,
        intermediate_size=2880,
        num_hidden_layers=36,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=64,
        vocab_size=201088,
        max_position_embeddings=131072,
        tie_word_embeddings=False,
        attention_bias=True,
        sliding_window=128,
        num_local_experts=128,
        num_experts_per_tok=4,
    )
    experts = Moe(
        num_experts=config.size("num_local_experts"),
        topk=config.size("num_experts_per_tok", also="experts_per_token"),
        ffn_hidden_size=config.size("intermediate_size"),
        router_bias=True,
        expert_bias=True,
    )
    bias = config.flag("attention_bias")
    pattern = [i % 2 == 0 for i in range(config.layers())]
    layers = tuple(
        Layer(
            mixer=attention(config, qkv_bias=bias, out_bias=bias, sinks=True, window=window),
            ffn=experts,
        )
        for window in windows(config, pattern)
    )
    return decoder(config, layers)
