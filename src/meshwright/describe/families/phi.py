"""Phi-1, 1.5 and 2: attention and MLP in parallel behind one norm, biases."""

from __future__ import annotations

from meshwright.describe.config import Config
from meshwright.describe.facts import Layer
from meshwright.describe.model import Model
from meshwright.describe.standard import attention, decoder, mlp
from meshwright.errors import ModelError


def build(config: Config) -> Model:
    """Return the model of a ``phi`` config."""
    config = config.with_defaults(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=24,
        num_attention_heads=32,
        vocab_size=51200,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        qk_layernorm=False,
        resid_pdrop=0.0,
    )

    if config.flag("qk_layernorm"):
        rule = "Norms with biases on Q and K are not described."
        raise ModelError(config.name("qk_layernorm"), True, rule, "Use false.")
    layer = Layer(
        mixer=attention(config, qkv_bias=True, out_bias=True),
        ffn=mlp(config, gated=False, bias=True),
        parallel=True,
        shared_norm=True,
    )
    return decoder(
        config,
        (layer,) * config.layers(),
        norm_weights=2,
        head_bias=True,
        hidden_dropout=config.fraction("resid_pdrop"),
    )
