"""GPT-J: attention and MLP in parallel behind one norm, rotary positions."""

from __future__ import annotations

from meshwright.describe.config import Config
from meshwright.describe.decoder import build_decoder
from meshwright.describe.facts import Attention, Decoder, Layer, Mlp
from meshwright.describe.model import Model


def build(config: Config) -> Model:
    """Return the model of a ``gptj`` config."""
    hidden = config.size("n_embd", 4096, also="hidden_size")
    heads = config.size("n_head", 16, also="num_attention_heads")
    layer = Layer(
        mixer=Attention(
            num_heads=heads, num_kv_heads=heads, head_dim=config.head_dim(hidden, heads, "")
        ),
        ffn=Mlp(
            ffn_hidden_size=config.optional_size("n_inner") or 4 * hidden, gated=False, bias=True
        ),
        parallel=True,
        shared_norm=True,
    )
    return build_decoder(
        Decoder(
            model_type="gptj",
            hidden_size=hidden,
            vocab_size=config.size("vocab_size", 50400),
            layers=(layer,) * config.layers("n_layer", 28, also="num_hidden_layers"),
            max_seq_len=config.size("n_positions", 2048, also="max_position_embeddings"),
            norm_weights=2,
            head_bias=True,
            hidden_dropout=config.fraction("resid_pdrop", 0.0),
            tie_word_embeddings=config.flag("tie_word_embeddings", False),
        )
    )
