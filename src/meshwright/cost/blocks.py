"""What one micro-batch of one block costs one rank: seconds by kind of work, bytes kept.

The loop is over the ops of a block (tens); every formula runs on columns [D].
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from meshwright.cost.columns import Floats
from meshwright.cost.comm import (
    Network,
    all_gather_s,
    all_reduce_s,
    all_to_all_s,
    network,
    ring_step_s,
)
from meshwright.cost.compute import (
    Speeds,
    attention_s,
    grouped_matmul_s,
    matmul_s,
    mean_context,
    speeds,
    stream_s,
)
from meshwright.cost.factors import Factors
from meshwright.cost.slices import Slice, is_ring
from meshwright.describe.cluster import Cluster
from meshwright.describe.job import Job
from meshwright.describe.model import Block, Comm, Op, OpKind
from meshwright.parallel.layout import CpComm, Recompute

COMPUTE, RECOMPUTE, TP, CP, EP = range(5)
"""Kinds of work, the last axis of ``BlockSeconds``; what is run again counts with its messages."""
NUM_KINDS = 5


@dataclass(frozen=True)
class BlockSeconds:
    """Seconds of one micro-batch of one block: [D, NUM_KINDS] forward and backward.

    ``weight_grad`` [D] is the part of backward that computes weight gradients.
    """

    forward: Floats
    backward: Floats
    weight_grad: Floats


@dataclass(frozen=True)
class Pricing:
    """What every op's price needs: the slice, the job and the speeds in force."""

    slice: Slice
    job: Job
    at: Speeds
    net: Network
    factors: Factors


def pricing(part: Slice, job: Job, cluster: Cluster, factors: Factors) -> Pricing:
    """Collect what prices the ops of a slice."""
    return Pricing(
        slice=part,
        job=job,
        at=speeds(cluster.gpu, job.precision, factors),
        net=network(cluster, factors),
        factors=factors,
    )


def block_seconds(block: Block, p: Pricing) -> BlockSeconds:
    """Price a block: kernels, the communication its split forces, and what is run again.

    Backward = input gradients + weight gradients + recomputed forwards. A weight that is frozen
    (LoRA) has no weight gradient. Ref: Narayanan et al., arXiv:2104.04473; Korthikanti et al.,
    arXiv:2205.05198. Left out: contention of communication kernels for multiprocessors.
    """
    d = len(p.slice.tp)
    forward, backward = np.zeros((d, NUM_KINDS)), np.zeros((d, NUM_KINDS))
    weight_grad = np.zeros(d)
    for op in block.ops:
        fwd, dgrad, wgrad = op_seconds(op, p)
        forward[:, COMPUTE] += fwd
        backward[:, COMPUTE] += dgrad + wgrad
        weight_grad += wgrad
        again = (p.slice.recompute & int(op.rerun)) != 0
        backward[:, RECOMPUTE] += np.where(again, fwd, 0.0)
        for comm in op.comm:
            kind, comm_fwd, comm_bwd = comm_seconds(comm, fwd, p)
            forward[:, kind] += comm_fwd
            backward[:, kind] += comm_bwd
            backward[:, RECOMPUTE] += np.where(again, comm_fwd, 0.0)
    if p.job.execution.cuda_graphs == "none":
        _wait_for_host(block, p, forward, backward)
    return BlockSeconds(forward, backward, weight_grad)


def _wait_for_host(block: Block, p: Pricing, forward: Floats, backward: Floats) -> None:
    # Without CUDA graphs the host must launch every op; small kernels wait for it.
    host = len(block.ops) * p.factors.host_op_s
    again = p.slice.recompute & int(Recompute.full)
    for seconds, floor in ((forward, host), (backward, np.where(again > 0, 2.0, 1.0) * host)):
        busy = np.einsum("dk->d", seconds)
        seconds[:, COMPUTE] += np.maximum(floor - busy, 0.0)


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
    fwd = _stream(op, op.moved_per_token, p)
    back = op.backward_moved_per_token
    bwd = _stream(op, 2.0 * op.moved_per_token if back is None else back, p)
    return fwd, bwd, np.zeros_like(fwd)


def _stream(op: Op, moved_per_token: float, p: Pricing) -> Floats:
    tokens = p.slice.op_tokens(op.where) / p.slice.feature_divisor(op.where)
    return stream_s(moved_per_token * tokens * p.job.precision.act_bytes, p.at)


def _matmul_op(op: Op, p: Pricing) -> tuple[Floats, Floats, Floats]:
    m, k, n = _sides(op, p)
    flops_per_s, width = _matmul_precision(op, p)
    fwd = matmul_s(m, n, k, flops_per_s, width, p.at) + _quantise_s(op, m * k, p)
    dgrad = matmul_s(m, k, n, flops_per_s, width, p.at) + _quantise_s(op, m * n, p)
    wgrad = matmul_s(n, k, m, flops_per_s, width, p.at)
    return fwd, dgrad, _trained(op, wgrad, p)


def _grouped_op(op: Op, p: Pricing) -> tuple[Floats, Floats, Floats]:
    m, k, n = _sides(op, p)
    experts = np.maximum(op.copies / p.slice.ep, 1.0)
    flops_per_s, width = _matmul_precision(op, p)
    if not p.job.execution.grouped_gemm:
        launches = (experts - 1.0) * (p.at.kernel_s + p.factors.host_op_s)
    else:
        launches = np.zeros_like(m)
    fwd = grouped_matmul_s(experts, m, n, k, flops_per_s, width, p.at) + launches
    dgrad = grouped_matmul_s(experts, m, k, n, flops_per_s, width, p.at) + launches
    quantise_in, quantise_out = _quantise_s(op, m * k, p), _quantise_s(op, m * n, p)
    return fwd + quantise_in, dgrad + quantise_out, _trained(op, dgrad, p)


def _sides(op: Op, p: Pricing) -> tuple[Floats, Floats, Floats]:
    m = p.slice.op_tokens(op.where)
    divisor = p.slice.etp if op.where in ("expert", "routed") else p.slice.tp
    whole = np.ones_like(m)
    k = op.in_features / (divisor if op.split == "in" else whole)
    n = op.out_features / (divisor if op.split == "out" else whole)
    return m, k, n


def _matmul_precision(op: Op, p: Pricing) -> tuple[float, float]:
    if op.trained_in_16_bit:
        return p.at.matmul_16_bit_flops_per_s, p.job.precision.act_bytes
    return p.at.matmul_flops_per_s, p.job.precision.matmul_input_bytes


def _quantise_s(op: Op, elements: Floats, p: Pricing) -> Floats:
    per_element = 0.0 if op.trained_in_16_bit else p.job.precision.quantise_bytes_per_element
    return elements * per_element / p.at.hbm_bytes_per_s


def _trained(op: Op, wgrad: Floats, p: Pricing) -> Floats:
    return np.zeros_like(wgrad) if p.job.task == "lora" or not op.params else wgrad


def _attention_op(op: Op, p: Pricing) -> tuple[Floats, Floats, Floats]:
    context = np.full_like(p.slice.tokens, mean_context(p.slice.seq_len, op.window, op.causal))
    heads = op.num_heads / p.slice.tp
    fwd = attention_s(p.slice.tokens, heads, context, op.qk_head_dim + op.v_head_dim, p.at)
    bwd = fwd * p.at.attention_backward_ratio
    if not p.job.execution.flash_attention:
        # Scores are written, masked, normalised, dropped out and read again, whole rows each.
        scores = p.slice.tokens * heads * float(p.slice.seq_len)
        fwd = fwd + stream_s(8.0 * scores * p.job.precision.act_bytes, p.at)
        bwd = bwd + stream_s(8.0 * scores * p.job.precision.act_bytes, p.at)
    return fwd, bwd, np.zeros_like(fwd)


def comm_seconds(comm: Comm, beside_s: Floats, p: Pricing) -> tuple[int, Floats, Floats]:
    """Return (kind of work, exposed seconds forward, exposed seconds backward) of a communication.

    ``beside_s`` [D] is the op's own forward time, which a ring can hide behind.
    """
    if comm.kind in ("enter_tp", "exit_tp", "exit_vocab"):
        fwd, bwd = tensor_parallel_s(comm, p)
        left = 1.0 - p.factors.tp_hidden_fraction * float(p.job.execution.overlap_tp_comm)
        # Without sequence parallelism the all-reduce has nothing to hide behind.
        left = np.where(p.slice.sp > 0, left, 1.0)
        return TP, fwd * left, bwd * left
    if comm.kind in ("dispatch", "combine"):
        one_way = expert_parallel_s(comm, p)
        left = 1.0 - p.factors.ep_hidden_fraction * float(p.job.execution.overlap_ep_comm)
        return EP, one_way * left, one_way * left
    fwd, bwd = context_parallel_s(comm, beside_s, p)
    return CP, fwd, bwd


def tensor_parallel_s(comm: Comm, p: Pricing) -> tuple[Floats, Floats]:
    s = p.slice
    width = p.job.precision.act_bytes
    size = comm.elements * s.tokens * width
    if comm.kind == "exit_vocab":
        once = all_reduce_s(size, s.spans.tp, p.net)
        return once, np.zeros_like(once)
    gather, reduce = all_gather_s(size, s.spans.tp, p.net), all_reduce_s(size, s.spans.tp, p.net)
    nothing = np.zeros_like(gather)
    if comm.kind == "enter_tp":
        # Backward reduces the input gradient and gathers the input again for the weight gradient.
        return np.where(s.sp > 0, gather, nothing), np.where(s.sp > 0, 2.0 * gather, reduce)
    return np.where(s.sp > 0, gather, reduce), np.where(s.sp > 0, gather, nothing)


def expert_parallel_s(comm: Comm, p: Pricing) -> Floats:
    s = p.slice
    width = p.job.precision.act_bytes
    local = comm.elements * s.routed_tokens / s.etp * width
    exchange = all_to_all_s(local, s.spans.ep, p.net)
    return exchange + all_gather_s(local * s.etp, s.spans.etp, p.net)


def context_parallel_s(comm: Comm, beside_s: Floats, p: Pricing) -> tuple[Floats, Floats]:
    s = p.slice
    local = comm.elements * s.tokens / s.tp * p.job.precision.act_bytes
    hidden = p.factors.cp_hidden_fraction * float(p.job.execution.overlap_cp_comm)
    ratio = p.at.attention_backward_ratio
    if comm.kind == "cp_state":
        step = ring_step_s(local, s.spans.cp, p.net)
        return step, step
    if comm.kind == "cp_heads":
        once = all_to_all_s(local, s.spans.cp, p.net)
        used = ((s.cp_comm == CpComm.a2a) | (s.cp_comm == CpComm.a2a_p2p)).astype(np.float64)
        return once * used, once * used
    steps = s.cp - 1.0
    ring = steps * ring_step_s(local, s.spans.cp, p.net)
    ring = np.where(s.cp_comm == CpComm.a2a_p2p, ring / np.sqrt(s.cp), ring)
    ring_fwd = np.maximum(ring - hidden * beside_s, 0.0)
    ring_bwd = np.maximum(2.0 * ring - hidden * ratio * beside_s, 0.0)
    gather = all_gather_s(local * s.cp, s.spans.cp, p.net)
    gathers = (s.cp_comm == CpComm.all_gather).astype(np.float64)
    used = is_ring(s.cp_comm)
    return ring_fwd * used + gather * gathers, ring_bwd * used + 2.0 * gather * gathers
