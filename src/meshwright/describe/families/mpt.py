"""MPT (MosaicML): no biases, ALiBi or learned positions."""

from __future__ import annotations

from meshwright.describe.config import Config
from meshwright.describe.decoder import build_decoder
from meshwright.describe.facts import Decoder
from meshwright.describe.model import Model
from meshwright.describe.standard import gpt_layer


def build(config: Config) -> Model:
    """Return the model of an ``mpt`` config; learned positions count where ALiBi is off."""
    hidden = config.size("d_model", 2048, also="hidden_size")
    heads = config.size("n_heads", 16, also="num_attention_heads")
    positions = config.size("max_seq_len", 2048)
    alibi = True
    if config.given("attn_config"):
        alibi = config.nested("attn_config").flag("alibi", True)
    ffn = config.size("expansion_ratio", 4) * hidden
    layer = gpt_layer(heads, config.head_dim(hidden, heads), ffn, bias=False)
    learned = not alibi and config.flag("learned_pos_emb", True)
    return build_decoder(
        Decoder(
            model_type="mpt",
            hidden_size=hidden,
            vocab_size=config.size("vocab_size", 50368),
            layers=(layer,) * config.layers("n_layers", 24),
            max_seq_len=positions,
            learned_positions=positions if learned else 0,
            hidden_dropout=config.fraction("resid_pdrop", 0.0),
            tie_word_embeddings=config.flag("tie_word_embeddings", True),
        )
    )
