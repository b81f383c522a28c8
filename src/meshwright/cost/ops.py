"""Seconds of one op on one rank: products, attention, scans, the loss and what moves memory."""

from __future__ import annotations

import numpy as np

from meshwright.cost.columns import Floats
from meshwright.cost.comm import all_gather_s
from meshwright.cost.compute import (
    attention_backward_s,
    attention_s,
    grouped_matmul_s,
    matmul_s,
    mean_context,
    stream_s,
)
from meshwright.cost.parameters import is_adapted
from meshwright.cost.pricing import Pricing, is_16_bit, is_fused
from meshwright.describe.job import CrossEntropy
from meshwright.describe.model import Op, OpKind


def op_seconds(op: Op, p: Pricing) -> tuple[Floats, Floats, Floats]:
    """Return seconds (forward, input gradient, weight gradient) of an op, each [D]."""
    if op.kind is OpKind.matmul:
        return _matmul_op(op, p)
    if op.kind is OpKind.grouped_matmul:
        return _grouped_op(op, p)
    if op.kind is OpKind.attention:
        return _attention_op(op, p)
    if op.kind is OpKind.scan:
        flops = op.scan_flops_per_token * p.slice.tokens / p.slice.tp
        fwd = flops / p.at.scan_flops_per_s + _stream(op, op.moved_per_token, p)
        return fwd, 2.0 * fwd, np.zeros_like(fwd)
    if op.kind is OpKind.cross_entropy:
        return loss_s(op, p)
    if op.name == "experts_activation" and _is_fused_away(p):
        return np.zeros_like(p.slice.tp), np.zeros_like(p.slice.tp), np.zeros_like(p.slice.tp)
    fwd = _stream(op, op.moved_per_token, p)
    back = op.backward_moved_per_token
    bwd = _stream(op, 2.0 * op.moved_per_token if back is None else back, p)
    return fwd, bwd, np.zeros_like(fwd)


FUSED_EXPERTS = ("fp8-mx", "nvfp4")
"""Recipes whose grouped MLP Transformer Engine has as one op. Ref: ``fuse_grouped_mlp_ops``."""


def _is_fused_away(p: Pricing) -> bool:
    return p.job.execution.fused_experts and p.job.precision.name in FUSED_EXPERTS


LOSS_BYTES: dict[CrossEntropy, tuple[float, float]] = {
    "vendor": (6.0, 4.0),
    "compiled": (24.0, 6.0),
    "in_place": (38.0, 14.0),
    "plain": (18.0, 22.0),
}
"""Bytes that the loss moves for each logit, forward and backward.

Transformer Engine reads 16-bit logits twice and writes their gradient, which backward scales.
Megatron's steps cast to fp32, take the maximum, subtract, exponentiate, sum, divide, and backward
scale and cast; compiled, some of them share a kernel. PyTorch casts, and log-softmax and its
gradient read and write fp32.
"""


def loss_s(op: Op, p: Pricing) -> tuple[Floats, Floats, Floats]:
    """Return the seconds of the loss, forward and backward.

    tokens * vocabulary / tp * bytes a logit (``LOSS_BYTES``, by how it is computed) / HBM + launch.
    Ref: TransformerEngine, ``pytorch/triton/cross_entropy.py``; Megatron-LM,
    ``tensor_parallel.cross_entropy``, ``fusions.fused_cross_entropy``; traffic counted.
    """
    logits = op.out_features * p.slice.op_tokens(op.where) / p.slice.feature_divisor(op.where)
    forward, backward = LOSS_BYTES[p.job.execution.cross_entropy]
    fwd = stream_s(forward * logits, p.at)
    return fwd, stream_s(backward * logits, p.at), np.zeros_like(fwd)


def _stream(op: Op, moved_per_token: float, p: Pricing) -> Floats:
    if not is_fused(op, p):
        moved_per_token = moved_per_token * p.factors.unfused_traffic
    if op.name in ("dispatch", "combine") and p.job.execution.dispatcher in ("deepep", "hybridep"):
        # Tokens leave unsorted, once each: only the receiver sorts them by expert.
        moved_per_token = moved_per_token / 2.0
    tokens = p.slice.op_tokens(op.where) / p.slice.feature_divisor(op.where)
    return stream_s(moved_per_token * tokens * p.job.precision.act_bytes, p.at)


def _matmul_op(op: Op, p: Pricing) -> tuple[Floats, Floats, Floats]:
    m, k, n = _sides(op, p)
    flops_per_s, width = _matmul_precision(op, p)
    fwd = matmul_s(m, n, k, flops_per_s, width, p.at) + _quantise_s(op, m * k, p)
    dgrad = matmul_s(m, k, n, flops_per_s, width, p.at)
    dgrad = dgrad + _quantise_s(op, m * n, p, of_gradient=True)
    wgrad = matmul_s(n, k, m, flops_per_s, width, p.at, _gradient_bytes(p))
    fwd = fwd + _weight_cast_s(op, k * n, p)
    if is_adapted(op, p.job):
        adapter_fwd, adapter_bwd = _adapter_s(op, m, k, n, p)
        fwd, dgrad = fwd + adapter_fwd, dgrad + adapter_bwd
    return fwd, dgrad, _trained(op, wgrad, p)


def _adapter_s(op: Op, m: Floats, k: Floats, n: Floats, p: Pricing) -> tuple[Floats, Floats]:
    """Seconds of a LoRA adapter (forward, backward): thin products and sums, bound by memory.

    Forward m * (k + 6n) elements: the input is read, the output written, scaled and added to what
    the frozen weight gives. Backward m * (5k + 4n): the gradient is scaled, read for both products
    of the second factor; the input is read for the gradient of the first, and its own gradient is
    written and added. Four kernels forward, seven backward. Where TP divides the layer, the
    low-rank tensor is gathered or reduced each way. Ref: Hu et al., arXiv:2106.09685;
    Megatron-Bridge, ``peft.utils.ParallelLinearAdapter``. Left out: dropout.
    """
    rank = m * p.job.lora_rank * p.job.precision.act_bytes
    exchange = all_gather_s(rank, p.slice.spans.tp, p.net) if op.split else np.zeros_like(m)
    fwd = _stream_s(m * (k + 6.0 * n), p) + 4.0 * p.at.kernel_s + exchange
    bwd = _stream_s(m * (5.0 * k + 4.0 * n), p) + 7.0 * p.at.kernel_s + exchange
    return fwd, bwd


def _grouped_op(op: Op, p: Pricing) -> tuple[Floats, Floats, Floats]:
    """Return the seconds of a product of all experts, forward and both gradients.

    With ``FUSED_EXPERTS`` Transformer Engine's op fuser quantises what passes between the two
    products of an MLP, and runs its activation, in the kernels of the products. Ref:
    TransformerEngine 2.20, ``pytorch.ops.fused.grouped_mlp``.
    """
    m, k, n = _sides(op, p)
    experts = np.maximum(op.copies / p.slice.ep, 1.0)
    flops_per_s, width = _matmul_precision(op, p)
    gradient = _gradient_bytes(p)
    if p.job.execution.grouped_gemm:
        flops_per_s = flops_per_s * p.at.grouped_fraction
        fwd = grouped_matmul_s(experts, m, n, k, flops_per_s, width, p.at)
        dgrad = grouped_matmul_s(experts, m, k, n, flops_per_s, width, p.at)
        wgrad = grouped_matmul_s(experts, m, k, n, flops_per_s, width, p.at, gradient)
    else:
        # One expert after the other, each an ordinary product.
        rows = m / experts
        fwd = experts * matmul_s(rows, n, k, flops_per_s, width, p.at)
        dgrad = experts * matmul_s(rows, k, n, flops_per_s, width, p.at)
        wgrad = experts * matmul_s(n, k, rows, flops_per_s, width, p.at, gradient)
    # With biases, adding, splitting by expert and activation are kernels of their own; the op
    # fuser joins those forward with their products, and about half of the traffic stays.
    apart = 0.5 if p.job.execution.fused_experts else 1.0
    added = _stream_s(m * n * _has_bias(op) * p.factors.biased_experts_passes * apart, p)
    fwd = fwd + added + _weight_cast_s(op, experts * k * n, p)
    dgrad = dgrad + added
    if not (_is_fused_away(p) and op.split == "in"):
        fwd = fwd + _quantise_s(op, m * k, p)
    if not (_is_fused_away(p) and op.split == "out"):
        dgrad = dgrad + _quantise_s(op, m * n, p, of_gradient=True)
    most = fullest(op, p)
    return fwd * most, dgrad * most, _trained(op, wgrad, p) * most


def _stream_s(elements: Floats, p: Pricing) -> Floats:
    return elements * p.job.precision.act_bytes / p.at.hbm_bytes_per_s


def _has_bias(op: Op) -> float:
    """Return 1 where experts have biases, which a grouped product does not add by itself."""
    return float(op.params > op.copies * op.in_features * op.out_features)


def fullest(op: Op, p: Pricing) -> Floats:
    """Return the tokens of the fullest expert-parallel rank over the mean.

    1 + ``imbalance_fraction`` * (most - 1) where the router is not forced to balance: that share of
    all tokens chooses the same rank, ``most`` = min(ep, experts / topk) is what it gets if every
    token does. Ref: none, an empirical law; Fedus et al., arXiv:2101.03961, section 2.2, on
    capacity.
    """
    s = p.slice
    if p.job.execution.forced_balance:
        return np.ones_like(s.ep)
    topk = s.routed_tokens / (s.sp_tokens * s.etp)
    most = np.minimum(s.ep, np.maximum(op.copies / topk, 1.0))
    return 1.0 + p.factors.imbalance_fraction * (most - 1.0)


def _gradient_bytes(p: Pricing) -> float:
    """Return the bytes moved for each element of a weight gradient that is added to the last ones.

    Fused accumulation reads and writes the sum; without it the gradient is written and read too.
    """
    added = 2.0 * p.job.precision.grad_bytes
    return added if p.job.execution.fused_wgrad_accumulation else added + 2.0 * 2.0


def _sides(op: Op, p: Pricing) -> tuple[Floats, Floats, Floats]:
    m = p.slice.op_tokens(op.where)
    divisor = p.slice.etp if op.where in ("expert", "routed") else p.slice.tp
    whole = np.ones_like(m)
    k = op.in_features / (divisor if op.split == "in" else whole)
    n = op.out_features / (divisor if op.split == "out" else whole)
    return m, k, n


def _matmul_precision(op: Op, p: Pricing) -> tuple[float, float]:
    if is_16_bit(op, p):
        return p.at.matmul_16_bit_flops_per_s, p.job.precision.act_bytes
    return p.at.matmul_flops_per_s, p.job.precision.matmul_input_bytes


QUANTISE_TRAFFIC = 2.0
"""Of recipes without a fitted factor."""


def _quantise_s(op: Op, elements: Floats, p: Pricing, *, of_gradient: bool = False) -> Floats:
    """Seconds to quantise an input, or the gradient of an output.

    It is read and written twice, the second time transposed for the weight gradient: where the
    weight is frozen there is none, but with delayed scaling one kernel casts and transposes
    gradients all the same. Ref: TransformerEngine, ``fp8_cast_transpose_fused``, ``Quantizer``.
    """
    if is_16_bit(op, p):
        return np.zeros_like(elements)
    moved = p.job.precision.quantise_bytes_per_element
    is_transposed = of_gradient and p.job.precision.name == "fp8"
    if p.job.task == "lora" and moved > 0 and not is_transposed:
        moved -= p.job.precision.matmul_input_bytes
    passes = p.factors.quantise_traffic.get(p.job.precision.name, QUANTISE_TRAFFIC)
    return elements * moved * passes / p.at.hbm_bytes_per_s


def _weight_cast_s(op: Op, weights: Floats, p: Pricing) -> Floats:
    """Seconds to quantise weights anew for a micro-batch: read in 16 bit, written both ways round.

    ``weight_cast_share`` of the micro-batches do so where what was quantised is kept, else all of
    them, unless the weights themselves are in FP8. Ref: TransformerEngine,
    ``is_first_microbatch`` (caching of quantised weights).
    """
    recipe = p.job.precision
    if is_16_bit(op, p) or recipe.quantise_bytes_per_element == 0 or recipe.param_bytes < 2.0:
        return np.zeros_like(weights)
    moved = recipe.param_bytes + 2.0 * recipe.matmul_input_bytes
    share = p.factors.weight_cast_share if p.job.execution.caches_quantised_weights else 1.0
    return share * weights * moved / p.at.hbm_bytes_per_s


def _trained(op: Op, wgrad: Floats, p: Pricing) -> Floats:
    return np.zeros_like(wgrad) if p.job.task == "lora" or not op.params else wgrad


def _attention_op(op: Op, p: Pricing) -> tuple[Floats, Floats, Floats]:
    seq_len = min(p.job.execution.packed_sample_tokens or p.slice.seq_len, p.slice.seq_len)
    context = np.full_like(p.slice.tokens, mean_context(seq_len, op.window, op.causal))
    heads = op.num_heads / p.slice.tp
    fwd = attention_s(p.slice.tokens, heads, context, op.qk_head_dim + op.v_head_dim, p.at)
    bwd = attention_backward_s(p.slice.tokens, heads, context, op.qk_head_dim + op.v_head_dim, p.at)
    if not p.job.execution.flash_attention:
        return _unfused_attention(op, heads, p)
    return fwd, bwd, np.zeros_like(fwd)


def _unfused_attention(op: Op, heads: Floats, p: Pricing) -> tuple[Floats, Floats, Floats]:
    """Whole scores are written, masked, normalised, dropped out and read again.

    Matmuls of [s, d] x [d, s] over the square, run as batched products; passes over the scores:
    5 forward and 5 backward with scale, mask and softmax in one kernel, 9 and 8 without.
    """
    pairs = p.slice.tokens * heads * float(p.slice.seq_len)
    dims = float(op.qk_head_dim + op.v_head_dim)
    products = 2.0 * pairs * dims / p.at.matmul_16_bit_flops_per_s
    thin = 1.0 + p.at.half_rows / max(min(op.qk_head_dim, op.v_head_dim), 1)
    passes = (5.0, 5.0) if p.job.execution.fused_softmax else (9.0, 8.0)
    scores = pairs * p.job.precision.act_bytes
    fwd = products * thin + stream_s(passes[0] * scores, p.at)
    bwd = 2.0 * products * thin + stream_s(passes[1] * scores, p.at)
    return fwd, bwd, np.zeros_like(fwd)
