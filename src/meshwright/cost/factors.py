"""Fitted numbers: how much of a datasheet's speed is reached, and what software adds.

Kept apart from hardware facts. Few, each with a physical meaning, none tied to a model, a source or
a run. ``factors.toml`` holds the values in force with how and when they were fitted.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from importlib.resources import files
from typing import Any, cast

from meshwright.describe.cluster import Cluster
from meshwright.errors import ClusterError, did_you_mean


@dataclass(frozen=True, kw_only=True)
class Factors:
    """Fractions of peak, latencies in seconds and bytes that software holds.

    The defaults are where a fit starts and what it pulls back to, never what is in force.

    Kernels. ``matmul_fraction``, ``attention_fraction`` and ``attention_backward_fraction``:
    share of the datasheet's dense peak that a large matmul, or the matmuls of flash attention,
    reach; keys are ``architecture`` or ``architecture.dtype`` (matmuls), ``architecture`` or
    ``architecture.flash2`` (attention outside the vendor's library). ``half_rows``: rows of a
    matmul at which it reaches half its speed (tile and wave quantisation),
    ``grouped_half_rows`` those of one expert. ``softmax_share``: exponentials that attention
    does not hide behind its matmuls. ``hbm_fraction``: share of HBM bandwidth of streaming
    kernels; ``unfused_traffic``: times the traffic of fused kernels that separate ones need.
    ``grouped_matmul_fraction``: speed of grouped products over that of single ones.
    ``quantise_traffic`` the same for the kernels of a recipe of quantising, by its name;
    ``weight_cast_share``: micro-batches that quantise weights anew. ``scan_fraction``: share of
    peak of state-space scans.
    ``biased_experts_passes``: elements moved beside the products of experts with biases, for
    each of their outputs. ``imbalance_fraction``: share of all tokens that choose
    the fullest rank beside its own, where the router is not forced to balance.
    ``power_exponent``: how speed falls with the power limit per peak FLOP/s.
    ``usual_w_per_tflops``: that limit of the card that a family's shares refer to (a fact).
    ``clock_fraction``: the clock that a card holds over what the law expects of it.
    ``power_boost_fraction``: what ``vboost`` adds.
    Links. ``link_fraction``, ``pcie_fraction``, ``network_fraction``: share of NVLink, of PCIe
    between GPUs and of network bandwidth that collectives reach; ``all_to_all_fraction`` and, over
    NVLink, ``link_all_to_all_fraction``: share of those that all-to-alls reach,
    ``dispatch_fraction`` that of the kernels of DeepEP and HybridEP.
    ``dispatch_token_bytes``: bytes that handling one token takes the time of in those kernels.
    ``*_hidden_fraction``: share of a communication that its overlap switch hides behind compute;
    ``dp_contention_fraction``: share of the hidden part that slows the compute it hides behind.
    Host. ``kernel_s``: time to launch and drain one kernel; ``host_op_s``: host time per op
    without CUDA graphs, ``module_host_s`` that per module of Transformer Engine or Megatron, and
    per collective; ``routing_sync_s``: wait of one layer whose token counts go through the
    host; ``checkpoint_sync_s`` that of one recomputed layer that saves random states through
    the host; ``step_overhead_s``: what each step waits for beside it; ``straggler_fraction``:
    what each doubling of the nodes adds to a step.
    Memory. ``framework_bytes``: context and libraries outside the allocator,
    ``communicator_bytes`` one communicator.
    ``fragmentation_fraction``: allocator blocks that are held but unused, per byte of tensors that
    live shorter than a micro-batch; ``expandable_fraction`` the same with expandable segments.
    """

    matmul_fraction: Mapping[str, float] = field(default_factory=dict[str, float])
    attention_fraction: Mapping[str, float] = field(default_factory=dict[str, float])
    attention_backward_fraction: Mapping[str, float] = field(default_factory=dict[str, float])
    grouped_matmul_fraction: Mapping[str, float] = field(default_factory=dict[str, float])
    usual_w_per_tflops: Mapping[str, float] = field(default_factory=dict[str, float])
    clock_fraction: Mapping[str, float] = field(default_factory=dict[str, float])
    softmax_share: float = 0.3
    scan_fraction: Mapping[str, float] = field(default_factory=dict[str, float])
    biased_experts_passes: float = 10.0
    weight_cast_share: float = 0.3
    hbm_fraction: float = 0.8
    unfused_traffic: float = 2.5
    quantise_traffic: Mapping[str, float] = field(default_factory=dict[str, float])
    half_rows: Mapping[str, float] = field(default_factory=dict[str, float])
    grouped_half_rows: float = 96.0
    imbalance_fraction: float = 0.02
    power_exponent: float = 0.6
    power_boost_fraction: float = 0.03
    link_fraction: float = 0.75
    pcie_fraction: float = 0.35
    network_fraction: float = 0.8
    link_all_to_all_fraction: float = 0.6
    all_to_all_fraction: float = 0.6
    dispatch_fraction: float = 0.7
    dispatch_token_bytes: float = 2000.0
    collective_s: float = 12e-6
    tp_hidden_fraction: float = 0.6
    cp_hidden_fraction: float = 0.8
    ep_hidden_fraction: float = 0.7
    dp_hidden_fraction: float = 0.9
    dp_contention_fraction: float = 0.1
    pp_hidden_fraction: float = 0.8
    kernel_s: float = 3e-6
    host_op_s: float = 9e-6
    module_host_s: float = 110e-6
    routing_sync_s: float = 100e-6
    checkpoint_sync_s: float = 4e-3
    step_overhead_s: float = 0.02
    straggler_fraction: float = 0.005
    framework_bytes: float = 1.6e9
    communicator_bytes: float = 2.5e8
    fragmentation_fraction: float = 1.0
    expandable_fraction: float = 0.25

    def matmul(self, architecture: str, dtype: str) -> float:
        """Return the share of peak of a large matmul."""
        return most_specific(self.matmul_fraction, architecture, dtype, 0.7)

    def attention(self, architecture: str, kernel: str) -> float:
        """Return the share of peak of the matmuls of flash attention, forward."""
        return most_specific(self.attention_fraction, architecture, kernel, 0.6)


def most_specific(
    table: Mapping[str, float], architecture: str, detail: str, default: float
) -> float:
    """Return the value of ``architecture.detail``, else of either alone, else ``default``.

    "Blackwell Ultra" is a Blackwell: the first word of an architecture counts.
    """
    family = (architecture.lower().split() or [""])[0]
    for key in (f"{family}.{detail}", family, detail):
        if key in table:
            return table[key]
    return default


@cache
def fitted() -> Factors:
    """Return the factors in force, from ``factors.toml``."""
    text = files("meshwright.cost").joinpath("factors.toml").read_text(encoding="utf-8")
    document: dict[str, Any] = tomllib.loads(text)
    return Factors(**document)


def factors_of(cluster: Cluster) -> Factors:
    """Return the factors in force on a cluster: those fitted, and over them what it measured.

    A number for a factor that is kept by architecture holds for the cluster's own.

    Raises ``ClusterError`` when the cluster names a factor that does not exist.
    """
    known = {f.name for f in fields(Factors)}
    usual, changed = fitted(), dict[str, Any]()
    for name, value in cluster.fitted.items():
        if name not in known:
            remedy = did_you_mean(name, known)
            raise ClusterError(f"fitted.{name}", value, "There is no such factor.", remedy)
        table = getattr(usual, name)
        if isinstance(table, Mapping):
            # Kept by architecture, or (clocks) by card: the number holds for this one of both;
            # kept by recipe: for all of them.
            kind = cluster.gpu.architecture.lower().split()[0]
            held = cast("Mapping[str, float]", table)
            if name == "quantise_traffic":
                changed[name] = dict.fromkeys(held, value)
                continue
            others = {k: v for k, v in held.items() if k.partition(".")[0] != kind}
            changed[name] = {**others, kind: value, cluster.gpu.name: value}
        else:
            changed[name] = value
    return replace(usual, **changed)
