"""Seconds of the kernels of one rank: matmuls, grouped matmuls, attention, scans, streaming.

Each formula takes columns [D] and returns columns [D]. A kernel costs what it computes at the share
of peak it reaches, plus what it must move, plus its launch: an additive roofline, which holds near
the knee where the maximum of the two is too kind. Ref: Williams, Waterman, Patterson, CACM 2009
(roofline); NVIDIA, "Matrix Multiplication Background" (tile and wave quantisation).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from meshwright.cost.columns import Floats
from meshwright.cost.factors import Factors, most_specific
from meshwright.describe.cluster import Gpu
from meshwright.describe.job import Execution, Precision

ATTENTION_BACKWARD_FLOPS = 2.5
"""Products of flash attention backward over those forward: five for two."""

MOST_CLOCK = 1.25
"""Clock over that of the family's usual card: more power than matmuls can use buys nothing."""
MOST_OF_PEAK = 0.95
"""Share of the datasheet's peak that no kernel exceeds."""

ATTENTION_TILE = 128
"""Tokens of a tile of flash attention; the tiles on the diagonal are computed whole."""


@dataclass(frozen=True)
class Speeds:
    """Speeds that kernels reach on one GPU: FLOP/s of large matmuls, bytes/s of streams."""

    matmul_flops_per_s: float
    matmul_16_bit_flops_per_s: float
    attention_flops_per_s: float
    exponentials_per_s: float
    attention_backward_flops_per_s: float
    grouped_fraction: float
    scan_flops_per_s: float
    hbm_bytes_per_s: float
    half_rows: float
    grouped_half_rows: float
    kernel_s: float


def speeds(gpu: Gpu, precision: Precision, execution: Execution, factors: Factors) -> Speeds:
    """Return the speeds in force: datasheet peaks times the fitted share of them.

    A precision the card has no unit for runs at the next wider one it has.
    """
    matmul = supported_dtype(gpu, precision.matmul)
    attention = supported_dtype(gpu, "fp8" if execution.fp8_attention else precision.attention)
    wide = supported_dtype(gpu, "fp16" if precision.attention == "fp16" else "bf16")
    peak, kind = gpu.peak_flops_per_s, gpu.architecture
    clock = power_fraction(gpu, execution, factors)
    kernel = "vendor" if execution.tuned_attention else "flash2"
    return Speeds(
        matmul_flops_per_s=peak[matmul] * min(factors.matmul(kind, matmul) * clock, MOST_OF_PEAK),
        matmul_16_bit_flops_per_s=peak[wide]
        * min(factors.matmul(kind, wide) * clock, MOST_OF_PEAK),
        attention_flops_per_s=peak[attention] * factors.attention(kind, kernel) * clock,
        exponentials_per_s=gpu.exponentials_per_s * clock / factors.softmax_share,
        attention_backward_flops_per_s=peak[attention]
        * most_specific(factors.attention_backward_fraction, kind, kernel, 0.5)
        * clock,
        grouped_fraction=most_specific(factors.grouped_matmul_fraction, kind, matmul, 0.85),
        scan_flops_per_s=peak[wide]
        * most_specific(factors.scan_fraction, kind, wide, 0.03)
        * clock,
        hbm_bytes_per_s=gpu.hbm_bytes_per_s * factors.hbm_fraction,
        half_rows=most_specific(factors.half_rows, kind, matmul, 80.0),
        grouped_half_rows=factors.grouped_half_rows,
        kernel_s=factors.kernel_s,
    )


def power_fraction(gpu: Gpu, execution: Execution, factors: Factors) -> float:
    """Return the clock under load, relative to the family's usual card.

    (W per dense 16-bit TFLOP/s / ``usual_w_per_tflops``) ** ``power_exponent``: matmuls run into
    the power limit long before their peak. ``clock_fraction`` corrects cards that were measured.
    Ref: torchtitan, docs/performance.md (500 W cards). Left out: cooling, and that light kernels
    do not reach the limit.
    """
    usual = most_specific(factors.usual_w_per_tflops, gpu.architecture, "", 0.0)
    peak = gpu.peak_flops_per_s.get("bf16", 0.0)
    boost = 1.0 + factors.power_boost_fraction * float(execution.power_boost)
    boost *= factors.clock_fraction.get(gpu.name, 1.0)
    if not usual or not peak or not gpu.power_w:
        return boost
    law = (gpu.power_w / (peak / 1e12) / usual) ** factors.power_exponent
    return boost * min(law, MOST_CLOCK)


_WIDER = {"fp4": "fp8", "fp8": "bf16", "bf16": "fp16", "fp16": "tf32", "tf32": "fp32"}


def supported_dtype(gpu: Gpu, dtype: str) -> str:
    """Return ``dtype``, or the next wider one that the card computes in."""
    while dtype not in gpu.peak_flops_per_s and dtype in _WIDER:
        dtype = _WIDER[dtype]
    return dtype


def matmul_s(
    m: Floats,
    n: Floats,
    k: Floats,
    flops_per_s: float,
    element_bytes: float,
    at: Speeds,
    output_bytes: float = 2.0,
) -> Floats:
    """Seconds of [m, k] x [k, n]: 2mnk / speed * (1 + half_rows/m') + bytes / HBM + launch.

    m' is the shortest side: a side of ``half_rows`` fills half of a tile wave. Bytes are both
    inputs and the output (``output_bytes`` an element) once. Ref: as the module.
    Left out: the exact tile grid.
    """
    shortest = np.minimum(np.minimum(m, n), k)
    flops = 2.0 * m * n * k
    moved = element_bytes * (m * k + k * n) + output_bytes * m * n
    compute = flops / flops_per_s * (1.0 + at.half_rows / shortest)
    return compute + moved / at.hbm_bytes_per_s + at.kernel_s


def grouped_matmul_s(
    experts: Floats,
    m: Floats,
    n: Floats,
    k: Floats,
    flops_per_s: float,
    element_bytes: float,
    at: Speeds,
    weight_bytes: float = 0.0,
) -> Floats:
    """Seconds of ``experts`` products [m/experts, k] x [k, n] in one grouped kernel.

    Each expert's rows fill their own tiles, so the short side is that of one expert. An element of
    a weight (or of its gradient) moves ``weight_bytes``, if that is given.
    Ref: as the module; Gale et al., arXiv:2211.15841. Left out: imbalance between experts.
    """
    rows = m / experts
    shortest = np.minimum(np.minimum(rows, n), k)
    flops = 2.0 * m * n * k / flops_per_s
    weights = experts * k * n * (weight_bytes or element_bytes)
    moved = element_bytes * m * k + weights + 2.0 * m * n
    return (
        flops * (1.0 + at.grouped_half_rows / shortest) + moved / at.hbm_bytes_per_s + at.kernel_s
    )


def attention_s(
    tokens: Floats, heads: Floats, context: Floats, head_dims: float, at: Speeds
) -> Floats:
    """Seconds of flash attention forward.

    pairs * (2 * (qk + v dims) / speed + 1 / exponentials), pairs = tokens * heads * context, where
    ``context`` is the mean number of attended tokens. Every pair takes an exponential, of which
    ``softmax_share`` stays beside the matmuls; so short head dims are slower per FLOP. Ref: Dao,
    arXiv:2307.08691, section 3; Shah et al., arXiv:2407.08608, section 3.1 (exponentials).
    """
    pairs = tokens * heads * context
    per_pair = 2.0 * head_dims / at.attention_flops_per_s + 1.0 / at.exponentials_per_s
    return pairs * per_pair + at.kernel_s


def attention_backward_s(
    tokens: Floats, heads: Floats, context: Floats, head_dims: float, at: Speeds
) -> Floats:
    """Seconds of flash attention backward: as forward, with 5/2 of its products.

    Scores are computed again, so every pair takes its exponential once more. It runs in the dtype
    of the forward. Ref: Dao, arXiv:2307.08691, section 3; TransformerEngine, ``NVTE_FP8_DPA_BWD``.
    """
    pairs = tokens * heads * context
    products = ATTENTION_BACKWARD_FLOPS * 2.0 * head_dims / at.attention_backward_flops_per_s
    return pairs * (products + 1.0 / at.exponentials_per_s) + at.kernel_s


def stream_s(moved_bytes: Floats, at: Speeds) -> Floats:
    """Seconds of a memory-bound kernel.

    bytes read and written / HBM + launch. Ref: as the module. Left out: what the cache holds.
    """
    return moved_bytes / at.hbm_bytes_per_s + at.kernel_s


def mean_context(seq_len: int, window: int, causal: bool) -> float:
    """Return the mean number of tokens that a token is scored with, whole tiles counted.

    Causal: (s + tile) / 2; with a window w < s: w - w(w-1)/(2s) + tile / 2; full: s.
    """
    if not causal:
        return float(min(window, seq_len) if window else seq_len)
    tile = float(min(ATTENTION_TILE, seq_len))
    if window and window < seq_len:
        return min(window - window * (window - 1) / (2.0 * seq_len) + tile / 2.0, float(seq_len))
    return (seq_len + tile) / 2.0
