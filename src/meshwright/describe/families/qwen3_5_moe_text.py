"""Qwen3.5 mixtures of experts (text decoder): gated delta nets and gated attention."""

from __future__ import annotations

from meshwright.describe.config import Config
from meshwright.describe.model import Model
from meshwright.describe.standard import QWEN_HYBRID, qwen_experts, qwen_hybrid


def build(config: Config) -> Model:
    """Return the model of a ``qwen3_5_moe_text`` config."""
    config = config.with_defaults(
        **QWEN_HYBRID,
        hidden_size=2048,
        num_hidden_layers=40,
        num_key_value_heads=2,
        vocab_size=248320,
        num_experts=256,
        num_experts_per_tok=8,
        moe_intermediate_size=512,
        shared_expert_intermediate_size=512,
    )
    return qwen_hybrid(config, [qwen_experts(config)] * config.layers())
