"""Fitted numbers: how much of a datasheet's speed is reached, and what software adds.

Kept apart from hardware facts. Few, each with a physical meaning, none tied to a model, a source or
a run. ``factors.toml`` holds the values in force with how and when they were fitted.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from importlib.resources import files
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Factors:
    """Fractions of peak, latencies in seconds and bytes that software holds.

    ``matmul_fraction`` and ``attention_fraction``: share of the datasheet's dense peak that a large
    matmul, or flash attention, reaches; keys are ``architecture`` or ``architecture.dtype``.
    ``hbm_fraction``: share of HBM bandwidth of streaming kernels. ``half_rows``: rows of a matmul
    at which it reaches half its speed (tile and wave quantisation). ``link_fraction`` and
    ``network_fraction``: share of NVLink and of network bandwidth that collectives reach.
    ``*_hidden_fraction``: share of a communication that its overlap switch hides behind compute.
    ``kernel_s``: time to launch and drain one kernel; ``host_op_s``: host time per op without CUDA
    graphs. ``framework_bytes``: context, libraries and communicators outside the allocator.
    ``fragmentation_fraction``: allocator blocks that are held but unused.
    """

    matmul_fraction: Mapping[str, float] = field(default_factory=dict[str, float])
    attention_fraction: Mapping[str, float] = field(default_factory=dict[str, float])
    grouped_matmul_fraction: float = 0.85
    attention_backward_ratio: float = 2.5
    scan_fraction: float = 0.25
    hbm_fraction: float = 0.75
    half_rows: float = 96.0
    link_fraction: float = 0.75
    network_fraction: float = 0.8
    all_to_all_fraction: float = 0.6
    collective_s: float = 12e-6
    tp_hidden_fraction: float = 0.6
    cp_hidden_fraction: float = 0.8
    ep_hidden_fraction: float = 0.7
    dp_hidden_fraction: float = 0.9
    pp_hidden_fraction: float = 0.8
    kernel_s: float = 3e-6
    host_op_s: float = 9e-6
    step_overhead_s: float = 0.02
    framework_bytes: float = 1.6e9
    communicator_bytes: float = 2.5e8
    fragmentation_fraction: float = 0.02

    def matmul(self, architecture: str, dtype: str) -> float:
        """Return the share of peak of a large matmul."""
        return _most_specific(self.matmul_fraction, architecture, dtype, 0.7)

    def attention(self, architecture: str, dtype: str) -> float:
        """Return the share of peak of flash attention, forward."""
        return _most_specific(self.attention_fraction, architecture, dtype, 0.5)


def _most_specific(
    table: Mapping[str, float], architecture: str, dtype: str, default: float
) -> float:
    for key in (f"{architecture}.{dtype}", architecture, dtype):
        if key in table:
            return table[key]
    return default


@cache
def fitted() -> Factors:
    """Return the factors in force, from ``factors.toml``."""
    text = files("meshwright.cost").joinpath("factors.toml").read_text(encoding="utf-8")
    document: dict[str, Any] = tomllib.loads(text)
    known = {f.name for f in fields(Factors)}
    return Factors(**{k: v for k, v in document.items() if k in known})
