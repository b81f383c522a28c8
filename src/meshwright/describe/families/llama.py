"""Llama 1 to 3 (arXiv:2407.21783): grouped queries, RMSNorm, SwiGLU, rotary positions."""

from __future__ import annotations

from meshwright.describe.config import Config
from meshwright.describe.decoder import build_decoder
from meshwright.describe.facts import Attention, Decoder, Layer, Mlp
from meshwright.describe.model import Model


def build(config: Config) -> Model:
    """Return the model of a ``llama`` config."""
    hidden = config.size("hidden_size", 4096)
    heads = config.size("num_attention_heads", 32)
    bias = config.flag("attention_bias", False)
    layer = Layer(
        mixer=Attention(
            num_heads=heads,
            num_kv_heads=config.size("num_key_value_heads", heads),
            head_dim=config.head_dim(hidden, heads),
            qkv_bias=bias,
            out_bias=bias,
        ),
        ffn=Mlp(
            ffn_hidden_size=config.size("intermediate_size", 11008),
            bias=config.flag("mlp_bias", False),
        ),
    )
    return build_decoder(
        Decoder(
            model_type="llama",
            hidden_size=hidden,
            vocab_size=config.size("vocab_size", 32000),
            layers=(layer,) * config.layers("num_hidden_layers", 32),
            max_seq_len=config.size("max_position_embeddings", 2048),
            tie_word_embeddings=config.flag("tie_word_embeddings", False),
        )
    )
