"""dots.llm1 (arXiv:2506.05767): small experts and shared ones, norms on Q and K."""

from __future__ import annotations

from meshwright.describe.config import Config
from meshwright.describe.facts import Layer
from meshwright.describe.model import Model
from meshwright.describe.standard import attention, decoder, deepseek_experts, mlp, windows


def build(config: Config) -> Model:
    """Return the model of a ``dots1`` config."""
    config = config.with_defaults(
        hidden_size=4608,
        intermediate_size=10944,
        num_hidden_layers=62,
        num_attention_heads=32,
        vocab_size=152064,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        attention_bias=False,
        moe_intermediate_size=1408,
        first_k_dense_replace=0,
        sliding_window=4096,
    )
    bias = config.flag("attention_bias")
    experts = deepseek_experts(config, correction_bias=True)
    first = config.size("first_k_dense_replace", low=0)
    layers = tuple(
        Layer(
            mixer=attention(config, qkv_bias=bias, out_bias=bias, qk_norm="head", window=window),
            ffn=experts if i >= first else mlp(config),
        )
        for i, window in enumerate(windows(config, [False] * config.layers()))
    )
    return decoder(config, layers)
