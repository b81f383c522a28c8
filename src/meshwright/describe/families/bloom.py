"""BLOOM (arXiv:2211.05100): ALiBi, a norm after the embedding, biases everywhere."""

from __future__ import annotations

from meshwright.describe.config import Config
from meshwright.describe.decoder import build_decoder
from meshwright.describe.facts import Decoder
from meshwright.describe.model import Model
from meshwright.describe.standard import gpt_layer


def build(config: Config) -> Model:
    """Return the model of a ``bloom`` config."""
    hidden = config.size("hidden_size", 64, also="n_embed")
    heads = config.size("n_head", 8, also="num_attention_heads")
    layer = gpt_layer(heads, config.head_dim(hidden, heads), 4 * hidden)
    return build_decoder(
        Decoder(
            model_type="bloom",
            hidden_size=hidden,
            vocab_size=config.size("vocab_size", 250880),
            layers=(layer,) * config.layers("n_layer", 2, also="num_hidden_layers"),
            max_seq_len=config.optional_size("seq_length"),
            norm_weights=2,
            embedding_norm=True,
            hidden_dropout=config.fraction("hidden_dropout", 0.0),
            tie_word_embeddings=config.flag("tie_word_embeddings", True),
        )
    )
