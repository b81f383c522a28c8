"""DeepSeek-V2 (arXiv:2405.04434): latent attention, small experts and shared ones."""

from __future__ import annotations

from meshwright.describe.config import Config
from meshwright.describe.facts import Layer
from meshwright.describe.model import Model
from meshwright.describe.standard import decoder, deepseek_experts, latent_attention, mlp


def build(config: Config) -> Model:
    """Return the model of a ``deepseek_v2`` config."""
    config = config.with_defaults(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        vocab_size=102400,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        attention_bias=False,
        mlp_bias=False,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        n_routed_experts=64,
        n_shared_experts=2,
        moe_intermediate_size=1407,
        first_k_dense_replace=0,
        moe_layer_freq=1,
    )
    attention = latent_attention(config)
    bias = config.flag("mlp_bias")
    experts = deepseek_experts(config, shared_bias=bias)
    dense = mlp(config, bias=bias)
    first, every = config.size("first_k_dense_replace", low=0), config.size("moe_layer_freq")
    layers = tuple(
        Layer(mixer=attention, ffn=experts if i >= first and i % every == 0 else dense)
        for i in range(config.layers())
    )
    return decoder(config, layers)
