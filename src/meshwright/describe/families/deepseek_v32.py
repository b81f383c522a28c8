"""DeepSeek-V3.2 (arXiv:2512.02556): DeepSeek-V3 with an indexer that picks what to attend to."""

from __future__ import annotations

from meshwright.describe.config import Config
from meshwright.describe.families import deepseek_v3
from meshwright.describe.model import Model
from meshwright.describe.standard import latent_attention, sparse_decoder

DEFAULTS = deepseek_v3.DEFAULTS | {
    "max_position_embeddings": 163840,
    "index_n_heads": 64,
    "index_head_dim": 128,
    "index_topk": 2048,
    "num_nextn_predict_layers": 0,
}
"""What a config leaves out, as DeepSeek-V3.2 has it."""


def build(config: Config) -> Model:
    """Return the model of a ``deepseek_v32`` config."""
    config = config.with_defaults(**DEFAULTS)
    return sparse_decoder(config, latent_attention(config))
