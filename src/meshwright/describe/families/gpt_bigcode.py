"""StarCoder and SantaCoder (arXiv:2305.06161): GPT-2 with one key-value head."""

from __future__ import annotations

from meshwright.describe.config import Config
from meshwright.describe.decoder import build_decoder
from meshwright.describe.facts import Decoder
from meshwright.describe.model import Model
from meshwright.describe.standard import gpt_layer


def build(config: Config) -> Model:
    """Return the model of a ``gpt_bigcode`` config."""
    hidden = config.size("n_embd", 768, also="hidden_size")
    heads = config.size("n_head", 12, also="num_attention_heads")
    positions = config.size("n_positions", 1024, also="max_position_embeddings")
    layer = gpt_layer(
        heads,
        config.head_dim(hidden, heads, ""),
        config.optional_size("n_inner") or 4 * hidden,
        kv_heads=1 if config.flag("multi_query", True) else heads,
    )
    return build_decoder(
        Decoder(
            model_type="gpt_bigcode",
            hidden_size=hidden,
            vocab_size=config.size("vocab_size", 50257),
            layers=(layer,) * config.layers("n_layer", 12, also="num_hidden_layers"),
            max_seq_len=positions,
            learned_positions=positions,
            norm_weights=2,
            hidden_dropout=config.fraction("resid_pdrop", 0.1),
            tie_word_embeddings=config.flag("tie_word_embeddings", True),
        )
    )
