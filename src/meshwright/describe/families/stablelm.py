"""StableLM: Llama layers with LayerNorm."""

from __future__ import annotations

from meshwright.describe.config import Config
from meshwright.describe.facts import Layer
from meshwright.describe.model import Model
from meshwright.describe.standard import attention, decoder, mlp
from meshwright.errors import ModelError


def build(config: Config) -> Model:
    """Return the model of a ``stablelm`` config."""
    config = config.with_defaults(
        hidden_size=2560,
        intermediate_size=6912,
        num_hidden_layers=32,
        num_attention_heads=32,
        vocab_size=50304,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        use_qkv_bias=False,
        use_parallel_residual=False,
        qk_layernorm=False,
        hidden_dropout=0.0,
    )

    if config.flag("qk_layernorm"):
        rule = "A norm for every head is not described."
        raise ModelError(config.name("qk_layernorm"), True, rule, "Use false.")
    parallel = config.flag("use_parallel_residual")
    layer = Layer(
        mixer=attention(config, qkv_bias=config.flag("use_qkv_bias")),
        ffn=mlp(config),
        parallel=parallel,
        shared_norm=parallel,
    )
    return decoder(
        config,
        (layer,) * config.layers(),
        norm_weights=2,
        hidden_dropout=config.fraction("hidden_dropout"),
    )
