"""Qwen3.5 dense (text decoder): gated delta nets and gated attention."""

from __future__ import annotations

from meshwright.describe.config import Config
from meshwright.describe.model import Model
from meshwright.describe.standard import QWEN_HYBRID, mlp, qwen_hybrid


def build(config: Config) -> Model:
    """Return the model of a ``qwen3_5_text`` config."""
    config = config.with_defaults(
        **QWEN_HYBRID,
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=32,
        num_key_value_heads=4,
        vocab_size=248320,
    )
    return qwen_hybrid(config, [mlp(config)] * config.layers())
