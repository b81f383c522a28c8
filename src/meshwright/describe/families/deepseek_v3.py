"""DeepSeek-V3 and R1 (arXiv:2412.19437): latent attention, many small experts, one shared, MTP."""

from __future__ import annotations

from meshwright.describe.config import Config
from meshwright.describe.decoder import build_decoder
from meshwright.describe.facts import Decoder, LatentAttention, Layer, Mlp, Moe
from meshwright.describe.model import Model


def build(config: Config) -> Model:
    """Return the model of a ``deepseek_v3`` config."""
    expert_ffn = config.size("moe_intermediate_size", 2048)
    attention = LatentAttention(
        num_heads=config.size("num_attention_heads", 128),
        q_lora_rank=config.nullable_size("q_lora_rank", 1536),
        kv_lora_rank=config.size("kv_lora_rank", 512),
        qk_nope_head_dim=config.size("qk_nope_head_dim", 128),
        qk_rope_head_dim=config.size("qk_rope_head_dim", 64),
        v_head_dim=config.size("v_head_dim", 128),
        bias=config.flag("attention_bias", False),
    )
    dense = Layer(mixer=attention, ffn=Mlp(ffn_hidden_size=config.size("intermediate_size", 18432)))
    moe = Layer(
        mixer=attention,
        ffn=Moe(
            num_experts=config.size("n_routed_experts", 256),
            topk=config.size("num_experts_per_tok", 8),
            ffn_hidden_size=expert_ffn,
            shared_ffn_hidden_size=expert_ffn * config.size("n_shared_experts", 1, low=0),
            correction_bias=True,
        ),
    )
    num_layers = config.layers("num_hidden_layers", 61)
    num_dense = min(config.size("first_k_dense_replace", 3, low=0), num_layers)
    return build_decoder(
        Decoder(
            model_type="deepseek_v3",
            hidden_size=config.size("hidden_size", 7168),
            vocab_size=config.size("vocab_size", 129280),
            layers=(dense,) * num_dense + (moe,) * (num_layers - num_dense),
            max_seq_len=config.size("max_position_embeddings", 4096),
            tie_word_embeddings=config.flag("tie_word_embeddings", False),
            mtp=((moe,),) * config.size("num_nextn_predict_layers", 1, low=0),
        )
    )
