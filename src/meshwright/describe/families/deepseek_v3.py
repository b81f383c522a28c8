"""DeepSeek-V3 and R1 (arXiv:2412.19437): latent attention, small experts, MTP."""

from __future__ import annotations

from meshwright.describe.config import Config
from meshwright.describe.model import Model
from meshwright.describe.standard import latent_attention, sparse_decoder

DEFAULTS = {
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "vocab_size": 129280,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "n_shared_experts": 1,
    "moe_intermediate_size": 2048,
    "first_k_dense_replace": 3,
    "num_nextn_predict_layers": 1,
}
"""What a config leaves out, as DeepSeek-V3 has it."""


def build(config: Config) -> Model:
    """Return the model of a ``deepseek_v3`` config."""
    config = config.with_defaults(**DEFAULTS)
    return sparse_decoder(config, latent_attention(config))
