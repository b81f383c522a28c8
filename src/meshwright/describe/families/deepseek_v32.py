"""DeepSeek-V3.2 (arXiv:2512.02556): DeepSeek-V3 with an indexer that picks what to attend to."""

from __future__ import annotations

from meshwright.describe.config import Config
from meshwright.describe.model import Model
from meshwright.describe.standard import latent_decoder


def build(config: Config) -> Model:
    """Return the model of a ``deepseek_v32`` config."""
    config = config.with_defaults(
        hidden_size=7168,
        intermediate_size=18432,
        num_hidden_layers=61,
        num_attention_heads=128,
        vocab_size=129280,
        max_position_embeddings=163840,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        n_routed_experts=256,
        num_experts_per_tok=8,
        n_shared_experts=1,
        moe_intermediate_size=2048,
        index_n_heads=64,
        index_head_dim=128,
        index_topk=2048,
        tie_word_embeddings=False,
        attention_bias=False,
        first_k_dense_replace=3,
        num_nextn_predict_layers=0,
    )
    return latent_decoder(config)
