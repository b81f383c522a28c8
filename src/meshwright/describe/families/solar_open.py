"""Solar Open (Upstage): experts with a shared one in every layer."""

from __future__ import annotations

from meshwright.describe.config import Config
from meshwright.describe.facts import Layer
from meshwright.describe.model import Model
from meshwright.describe.standard import attention, decoder, deepseek_experts


def build(config: Config) -> Model:
    """Return the model of a ``solar_open`` config."""
    config = config.with_defaults(
        hidden_size=4096,
        num_hidden_layers=48,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=196608,
        max_position_embeddings=131072,
        tie_word_embeddings=False,
        attention_bias=False,
        n_routed_experts=128,
        num_experts_per_tok=8,
        n_shared_experts=1,
        moe_intermediate_size=1280,
    )
    layer = Layer(
        mixer=attention(config, qkv_bias=config.flag("attention_bias")),
        ffn=deepseek_experts(config, correction_bias=True),
    )
    return decoder(config, (layer,) * config.layers())
