"""GLM-5: latent attention with an indexer, small experts and a shared one."""

from __future__ import annotations

from meshwright.describe.config import Config
from meshwright.describe.model import Model
from meshwright.describe.standard import latent_attention, sparse_decoder


def build(config: Config) -> Model:
    """Return the model of a ``glm_moe_dsa`` config."""
    config = config.with_defaults(
        hidden_size=6144,
        intermediate_size=12288,
        num_hidden_layers=78,
        num_attention_heads=64,
        vocab_size=154880,
        max_position_embeddings=202752,
        q_lora_rank=2048,
        kv_lora_rank=512,
        qk_nope_head_dim=192,
        qk_rope_head_dim=64,
        v_head_dim=256,
        n_routed_experts=256,
        num_experts_per_tok=8,
        n_shared_experts=1,
        moe_intermediate_size=2048,
        index_n_heads=32,
        index_head_dim=128,
        index_topk=2048,
        tie_word_embeddings=False,
        attention_bias=False,
        first_k_dense_replace=3,
        num_nextn_predict_layers=0,
    )
    return sparse_decoder(config, latent_attention(config))
