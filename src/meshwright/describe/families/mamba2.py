"""Mamba-2 (arXiv:2405.21060): nothing but Mamba layers."""

from __future__ import annotations

from meshwright.describe.config import Config
from meshwright.describe.decoder import build_decoder
from meshwright.describe.facts import Decoder, Layer, Mamba
from meshwright.describe.model import Model


def build(config: Config) -> Model:
    """Return the model of a ``mamba2`` config."""
    layer = Layer(
        mixer=Mamba(
            num_heads=config.size("num_heads", 128),
            head_dim=config.size("head_dim", 64),
            state_size=config.size("state_size", 128),
            num_groups=config.size("n_groups", 8),
            conv_kernel=config.size("conv_kernel", 4),
            conv_bias=config.flag("use_conv_bias", True),
            bias=config.flag("use_bias", False),
        )
    )
    return build_decoder(
        Decoder(
            model_type="mamba2",
            hidden_size=config.size("hidden_size", 4096),
            vocab_size=config.size("vocab_size", 32768),
            layers=(layer,) * config.layers("num_hidden_layers", 64),
            tie_word_embeddings=config.flag("tie_word_embeddings", False),
        )
    )
