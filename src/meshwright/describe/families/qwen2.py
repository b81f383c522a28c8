"""Qwen2 and Qwen2.5 (arXiv:2412.15115): Llama layers with biases on Q, K and V."""

from __future__ import annotations

from meshwright.describe.config import Config
from meshwright.describe.facts import Layer
from meshwright.describe.model import Model
from meshwright.describe.standard import attention, decoder, mlp, upper_windows


def build(config: Config) -> Model:
    """Return the model of a ``qwen2`` config."""
    config = config.with_defaults(
        hidden_size=4096,
        intermediate_size=22016,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        vocab_size=151936,
        max_position_embeddings=32768,
        tie_word_embeddings=False,
    )
    layers = tuple(
        Layer(mixer=attention(config, qkv_bias=True, window=window), ffn=mlp(config))
        for window in upper_windows(config)
    )
    return decoder(config, layers)
