"""GPT-NeoX and Pythia (arXiv:2204.06745): attention and MLP in parallel, biases."""

from __future__ import annotations

from meshwright.describe.config import Config
from meshwright.describe.facts import Layer
from meshwright.describe.model import Model
from meshwright.describe.standard import attention, decoder, mlp


def build(config: Config) -> Model:
    """Return the model of a ``gpt_neox`` config."""
    config = config.with_defaults(
        hidden_size=6144,
        intermediate_size=24576,
        num_hidden_layers=44,
        num_attention_heads=64,
        vocab_size=50432,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        attention_bias=True,
        use_parallel_residual=True,
        hidden_dropout=0.0,
    )
    bias = config.flag("attention_bias")
    layer = Layer(
        mixer=attention(
            config, num_kv_heads=config.size("num_attention_heads"), qkv_bias=bias, out_bias=bias
        ),
        ffn=mlp(config, gated=False, bias=True),
        parallel=config.flag("use_parallel_residual"),
    )
    return decoder(
        config,
        (layer,) * config.layers(),
        norm_weights=2,
        hidden_dropout=config.fraction("hidden_dropout"),
    )
