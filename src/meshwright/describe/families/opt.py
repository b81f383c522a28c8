"""OPT (arXiv:2205.01068): learned positions (two more than the length), biases, dropout."""

from __future__ import annotations

from meshwright.describe.config import Config
from meshwright.describe.decoder import build_decoder
from meshwright.describe.facts import Decoder
from meshwright.describe.model import Model
from meshwright.describe.standard import gpt_layer
from meshwright.errors import ModelError


def build(config: Config) -> Model:
    """Return the model of an ``opt`` config; the 350M variant has projections not described."""
    hidden = config.size("hidden_size", 768)
    if config.size("word_embed_proj_dim", hidden) != hidden:
        rule = "An embedding of another size than the layers is not described."
        value = config.values["word_embed_proj_dim"]
        raise ModelError(config.name("word_embed_proj_dim"), value, rule, f"Use {hidden}.")
    heads = config.size("num_attention_heads", 12)
    bias = config.flag("enable_bias", True)
    positions = config.size("max_position_embeddings", 2048)
    ffn = config.size("ffn_dim", 3072)
    layer = gpt_layer(heads, config.head_dim(hidden, heads, ""), ffn, bias=bias)
    return build_decoder(
        Decoder(
            model_type="opt",
            hidden_size=hidden,
            vocab_size=config.size("vocab_size", 50272),
            layers=(layer,) * config.layers("num_hidden_layers", 12),
            max_seq_len=positions,
            learned_positions=positions + 2,
            norm_weights=2,
            hidden_dropout=config.fraction("dropout", 0.1),
            tie_word_embeddings=config.flag("tie_word_embeddings", True),
        )
    )
