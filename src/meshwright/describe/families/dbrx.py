"""DBRX (Databricks): sixteen experts a layer, weights-only LayerNorm, nested configs."""

from __future__ import annotations

from meshwright.describe.config import Config
from meshwright.describe.decoder import build_decoder
from meshwright.describe.facts import Attention, Decoder, Layer, Moe
from meshwright.describe.model import Model


def build(config: Config) -> Model:
    """Return the model of a ``dbrx`` config."""
    hidden = config.size("d_model", 2048, also="hidden_size")
    heads = config.size("n_heads", 16, also="num_attention_heads")
    attention = config.nested("attn_config") if config.given("attn_config") else Config({})
    experts = config.nested("ffn_config") if config.given("ffn_config") else Config({})
    layer = Layer(
        mixer=Attention(
            num_heads=heads,
            num_kv_heads=attention.size("kv_n_heads", 1),
            head_dim=config.head_dim(hidden, heads, ""),
        ),
        ffn=Moe(
            num_experts=experts.size("moe_num_experts", 4),
            topk=experts.size("moe_top_k", 1),
            ffn_hidden_size=experts.size("ffn_hidden_size", 3584),
        ),
    )
    return build_decoder(
        Decoder(
            model_type="dbrx",
            hidden_size=hidden,
            vocab_size=config.size("vocab_size", 32000),
            layers=(layer,) * config.layers("n_layers", 24),
            max_seq_len=config.size("max_seq_len", 2048),
            hidden_dropout=config.fraction("resid_pdrop", 0.0),
            tie_word_embeddings=config.flag("tie_word_embeddings", False),
        )
    )
