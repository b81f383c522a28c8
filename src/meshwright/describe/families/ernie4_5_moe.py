"""ERNIE 4.5 mixtures of experts, with shared experts."""

from __future__ import annotations

from meshwright.describe.config import Config
from meshwright.describe.facts import Layer, Moe
from meshwright.describe.model import Model
from meshwright.describe.standard import attention, decoder, mlp


def build(config: Config) -> Model:
    """Return the model of an ``ernie4_5_moe`` config."""
    config = config.with_defaults(
        hidden_size=2560,
        intermediate_size=12288,
        num_hidden_layers=28,
        num_attention_heads=20,
        vocab_size=103424,
        max_position_embeddings=131072,
        tie_word_embeddings=True,
        num_key_value_heads=4,
        use_bias=False,
        moe_intermediate_size=1536,
        moe_k=6,
        moe_num_experts=64,
        moe_num_shared_experts=2,
        moe_layer_start_index=1,
        moe_layer_interval=1,
    )

    bias = config.flag("use_bias")
    expert_ffn = config.size("moe_intermediate_size")
    experts = Moe(
        num_experts=config.size("moe_num_experts", also="num_experts"),
        topk=config.size("moe_k", also="num_experts_per_tok"),
        ffn_hidden_size=expert_ffn,
        shared_ffn_hidden_size=expert_ffn * config.optional_size("moe_num_shared_experts"),
        shared_bias=bias,
        expert_bias=bias,
        correction_bias=True,
    )
    count = config.layers()
    first = config.size("moe_layer_start_index", low=0)
    last = count - 1
    if config.given("moe_layer_end_index") and config.values["moe_layer_end_index"] != -1:
        last = config.size("moe_layer_end_index", low=0)
    every = config.size("moe_layer_interval")
    mixer = attention(config, qkv_bias=bias, out_bias=bias)
    layers = tuple(
        Layer(
            mixer=mixer,
            ffn=experts if first <= i <= last and (i + 1) % every == 0 else mlp(config, bias=bias),
        )
        for i in range(count)
    )
    return decoder(config, layers)
