"""Granite mixtures of experts with a shared expert of ``shared_intermediate_size``."""

from __future__ import annotations

from meshwright.describe.families.granitemoe import build as build
