"""Qwen3-Next: three gated delta nets to one gated attention, many small experts."""

from __future__ import annotations

from meshwright.describe.config import Config
from meshwright.describe.model import Model
from meshwright.describe.standard import (
    QWEN_HYBRID,
    mlp,
    qwen_experts,
    qwen_hybrid,
    sparse_layers,
)


def build(config: Config) -> Model:
    """Return the model of a ``qwen3_next`` config."""
    config = config.with_defaults(
        **QWEN_HYBRID,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=48,
        num_key_value_heads=2,
        vocab_size=151936,
        num_experts=512,
        num_experts_per_tok=10,
        moe_intermediate_size=512,
        shared_expert_intermediate_size=512,
        decoder_sparse_step=1,
    )
    experts = qwen_experts(config)
    return qwen_hybrid(
        config, [experts if sparse else mlp(config) for sparse in sparse_layers(config)]
    )
