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
from meshwright.cost.factors import Factors
from meshwright.describe.cluster import Gpu
from meshwright.describe.job import Precision


@dataclass(frozen=True)
class Speeds:
    """Speeds that kernels reach on one GPU: FLOP/s of large matmuls, bytes/s of streams."""

    matmul_flops_per_s: float
    matmul_16_bit_flops_per_s: float
    attention_flops_per_s: float
    attention_backward_ratio: float
    grouped_fraction: float
    scan_flops_per_s: float
    hbm_bytes_per_s: float
    half_rows: float
    kernel_s: float


def speeds(gpu: Gpu, precision: Precision, factors: Factors) -> Speeds:
    """Return the speeds in force: datasheet peaks times the fitted share of them.

    A precision the card has no unit for runs at the next wider one it has.
    """
    matmul = supported_dtype(gpu, precision.matmul)
    attention = supported_dtype(gpu, precision.attention)
    wide = supported_dtype(gpu, "fp16" if precision.attention == "fp16" else "bf16")
    peak, kind = gpu.peak_flops_per_s, gpu.architecture
    return Speeds(
        matmul_flops_per_s=peak[matmul] * factors.matmul(kind, matmul),
        matmul_16_bit_flops_per_s=peak[wide] * factors.matmul(kind, wide),
        attention_flops_per_s=peak[attention] * factors.attention(kind, attention),
        attention_backward_ratio=factors.attention_backward_ratio,
        grouped_fraction=factors.grouped_matmul_fraction,
        scan_flops_per_s=peak[wide] * factors.scan_fraction,
        hbm_bytes_per_s=gpu.hbm_bytes_per_s * factors.hbm_fraction,
        half_rows=factors.half_rows,
        kernel_s=factors.kernel_s,
    )


_WIDER = {"fp4": "fp8", "fp8": "bf16", "bf16": "fp16", "fp16": "tf32", "tf32": "fp32"}


def supported_dtype(gpu: Gpu, dtype: str) -> str:
    """Return ``dtype``, or the next wider one that the card computes in."""
    while dtype not in gpu.peak_flops_per_s and dtype in _WIDER:
        dtype = _WIDER[dtype]
    return dtype


def matmul_s(
    m: Floats, n: Floats, k: Floats, flops_per_s: float, element_bytes: float, at: Speeds
) -> Floats:
    """Seconds of [m, k] x [k, n]: 2mnk / speed * (1 + half_rows/m') + bytes / HBM + launch.

    m' is the shortest side: a side of ``half_rows`` fills half of a tile wave. Bytes are both
    inputs and the output once. Ref: as the module. Left out: the exact tile grid and power limits.
    """
    shortest = np.minimum(np.minimum(m, n), k)
    flops = 2.0 * m * n * k
    moved = element_bytes * (m * k + k * n + m * n)
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
) -> Floats:
    """Seconds of ``experts`` products [m/experts, k] x [k, n] in one grouped kernel.

    Each expert's rows fill their own tiles, so the short side is that of one expert. Ref: as the
    module; Gale et al., arXiv:2211.15841. Left out: imbalance between experts.
    """
    rows = m / experts
    shortest = np.minimum(np.minimum(rows, n), k)
    flops = 2.0 * m * n * k / (flops_per_s * at.grouped_fraction)
    moved = element_bytes * (m * k + experts * k * n + m * n)
    return flops * (1.0 + at.half_rows / shortest) + moved / at.hbm_bytes_per_s + at.kernel_s


def attention_s(
    tokens: Floats, heads: Floats, context: Floats, head_dims: float, at: Speeds
) -> Floats:
    """Seconds of flash attention forward: 2 * tokens * heads * context * (qk + v dims) / speed.

    ``context`` is the mean number of attended tokens (half the sequence when causal). Ref: Dao,
    arXiv:2307.08691, section 3. Left out: softmax throughput on short head dims.
    """
    return 2.0 * tokens * heads * context * head_dims / at.attention_flops_per_s + at.kernel_s


def stream_s(moved_bytes: Floats, at: Speeds) -> Floats:
    """Seconds of a memory-bound kernel: bytes read and written / HBM + launch. Ref: the module."""
    return moved_bytes / at.hbm_bytes_per_s + at.kernel_s


def mean_context(seq_len: int, window: int, causal: bool) -> float:
    """Return the mean number of tokens that a token attends to.

    Causal: (s + 1) / 2; with a window w < s: w - w(w-1)/(2s); full: s.
    """
    if not causal:
        return float(min(window, seq_len) if window else seq_len)
    if window and window < seq_len:
        return window - window * (window - 1) / (2.0 * seq_len)
    return (seq_len + 1) / 2.0
