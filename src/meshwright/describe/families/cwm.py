"""Code World Model (arXiv:2510.02387): Llama layers, three windows to one full attention."""

from __future__ import annotations

from meshwright.describe.config import Config
from meshwright.describe.facts import Layer
from meshwright.describe.model import Model
from meshwright.describe.standard import attention, decoder, mlp, windows


def build(config: Config) -> Model:
    """Return the model of a ``cwm`` config."""
    config = config.with_defaults(
        hidden_size=6144,
        intermediate_size=21504,
        num_hidden_layers=64,
        num_attention_heads=48,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=128256,
        max_position_embeddings=131072,
        tie_word_embeddings=False,
        mlp_bias=False,
        sliding_window=8192,
    )
    ffn = mlp(config, bias=config.flag("mlp_bias"))
    pattern = [i % 4 != 0 for i in range(config.layers())]
    layers = (Layer(mixer=attention(config, window=w), ffn=ffn) for w in windows(config, pattern))
    return decoder(config, tuple(layers))
