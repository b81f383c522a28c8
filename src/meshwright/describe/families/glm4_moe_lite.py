"""GLM-4.7-Flash: latent attention, small experts and a shared one."""

from __future__ import annotations

from meshwright.describe.config import Config
from meshwright.describe.model import Model
from meshwright.describe.standard import latent_attention, sparse_decoder


def build(config: Config) -> Model:
    """Return the model of a ``glm4_moe_lite`` config."""
    config = config.with_defaults(
        hidden_size=2048,
        intermediate_size=10240,
        num_hidden_layers=47,
        num_attention_heads=20,
        vocab_size=154880,
        max_position_embeddings=202752,
        q_lora_rank=768,
        kv_lora_rank=512,
        qk_nope_head_dim=192,
        qk_rope_head_dim=64,
        v_head_dim=256,
        n_routed_experts=64,
        num_experts_per_tok=4,
        n_shared_experts=1,
        moe_intermediate_size=1536,
        tie_word_embeddings=False,
        attention_bias=False,
        first_k_dense_replace=1,
        num_nextn_predict_layers=0,
    )
    return sparse_decoder(config, latent_attention(config))
