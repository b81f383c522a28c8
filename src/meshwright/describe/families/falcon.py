"""Falcon (arXiv:2311.16867): attention and MLP in parallel, one or few key-value heads."""

from __future__ import annotations

from meshwright.describe.config import Config
from meshwright.describe.decoder import build_decoder
from meshwright.describe.facts import Attention, Decoder, Layer, Mlp
from meshwright.describe.model import Model


def build(config: Config) -> Model:
    """Return the model of a ``falcon`` config."""
    hidden = config.size("hidden_size", 4544, also="n_embed")
    heads = config.size("num_attention_heads", 71, also="n_head")
    new = config.flag("new_decoder_architecture", False)
    if new:
        kv_heads = config.size("num_kv_heads", heads, also="n_head_kv")
    else:
        kv_heads = 1 if config.flag("multi_query", True) else heads
    bias = config.flag("bias", False)
    parallel = new or config.flag("parallel_attn", True)
    norms = config.optional_size("num_ln_in_parallel_attn") or (2 if new else 1)
    layer = Layer(
        mixer=Attention(
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=config.head_dim(hidden, heads),
            qkv_bias=bias,
            out_bias=bias,
            rope=not config.flag("alibi", False),
        ),
        ffn=Mlp(ffn_hidden_size=config.size("ffn_hidden_size", 4 * hidden), gated=False, bias=bias),
        parallel=parallel,
        shared_norm=parallel and norms == 1,
    )
    return build_decoder(
        Decoder(
            model_type="falcon",
            hidden_size=hidden,
            vocab_size=config.size("vocab_size", 65024),
            layers=(layer,) * config.layers("num_hidden_layers", 32, also="n_layer"),
            max_seq_len=config.size("max_position_embeddings", 2048),
            norm_weights=2,
            hidden_dropout=config.fraction("hidden_dropout", 0.0),
            tie_word_embeddings=config.flag("tie_word_embeddings", True),
        )
    )
