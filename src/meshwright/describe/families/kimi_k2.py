"""Kimi K2 (arXiv:2507.20534): the layers and the config keys of DeepSeek-V3."""

from __future__ import annotations

from meshwright.describe.config import Config
from meshwright.describe.families import deepseek_v3
from meshwright.describe.model import Model


def build(config: Config) -> Model:
    """Return the model of a ``kimi_k2`` config."""
    return deepseek_v3.build(config)
