"""GLM-4.5 and GLM-4.5-Air (arXiv:2508.06471): experts with a shared one, MTP."""

from __future__ import annotations

from meshwright.describe.config import Config
from meshwright.describe.model import Model
from meshwright.describe.standard import attention, sparse_decoder


def build(config: Config) -> Model:
    """Return the model of a ``glm4_moe`` config."""
    config = config.with_defaults(
        hidden_size=4096,
        intermediate_size=10944,
        num_hidden_layers=46,
        num_attention_heads=96,
        num_key_value_heads=8,
        vocab_size=151552,
        max_position_embeddings=131072,
        tie_word_embeddings=False,
        attention_bias=False,
        use_qk_norm=False,
        n_routed_experts=128,
        num_experts_per_tok=8,
        n_shared_experts=1,
        moe_intermediate_size=1408,
        first_k_dense_replace=1,
        num_nextn_predict_layers=1,
    )
    mixer = attention(
        config,
        qkv_bias=config.flag("attention_bias"),
        qk_norm="head" if config.flag("use_qk_norm") else "",
    )
    return sparse_decoder(config, mixer)
