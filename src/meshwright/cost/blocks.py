"""What one micro-batch of one block costs one rank: seconds by kind of work, bytes kept.

The loop is over the ops of a block (tens); every formula runs on columns [D].
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from meshwright.cost.columns import Floats
from meshwright.cost.comm import (
    Network,
    Span,
    all_gather_s,
    all_reduce_s,
    all_to_all_s,
    dispatch_s,
    network,
    ring_step_s,
)
from meshwright.cost.compute import (
    ATTENTION_BACKWARD_FLOPS,
    Speeds,
    attention_backward_s,
    attention_s,
    grouped_matmul_s,
    matmul_s,
    mean_context,
    speeds,
    stream_s,
)
from meshwright.cost.factors import Factors
from meshwright.cost.parameters import is_adapted
from meshwright.cost.slices import Slice, is_all_to_all, is_ring
from meshwright.describe.cluster import Cluster
from meshwright.describe.job import CrossEntropy, Job
from meshwright.describe.model import Block, Comm, Op, OpKind
from meshwright.parallel.cp_levels import exchanging_ranks
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
        at=speeds(cluster.gpu, job.precision, job.execution, factors),
        net=network(cluster, factors),
        factors=factors,
    )


def block_seconds(block: Block, p: Pricing) -> BlockSeconds:
    """Price a block: kernels, the communication its split forces, and what is run again.

    Backward = input gradients + weight gradients + recomputed forwards. A weight that is frozen
    (LoRA) has no weight gradient. Without CUDA graphs no pass is faster than the host that launches
    it: modules * ``module_host_s`` + kernels * ``host_op_s``, 1.5 times that backward, and
    ``RERUN_MODULES`` more for each stretch of ops that is run again. Ref: Narayanan et al.,
    arXiv:2104.04473; Korthikanti et al., arXiv:2205.05198. Left out: contention of
    communication kernels for multiprocessors.
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
        backward[:, RECOMPUTE] += np.where(again, fwd, _rerun_share(op, p) * fwd)
        if op.kind is OpKind.attention:
            merging = ring_merge_s(op, p)
            forward[:, CP] += merging
            backward[:, CP] += merging
            backward[:, RECOMPUTE] += np.where(again, merging, 0.0)
        for comm in op.comm:
            kind, comm_fwd, comm_bwd = comm_seconds(op, comm, fwd, p)
            forward[:, kind] += comm_fwd
            backward[:, kind] += comm_bwd
            backward[:, RECOMPUTE] += np.where(again, comm_fwd, 0.0)
    if p.job.execution.delay_weight_grad and p.job.execution.overlap_ep_comm:
        # What is left of the exchange backward hides behind the delayed weight gradients.
        hidden = p.factors.ep_hidden_fraction * weight_grad
        backward[:, EP] = np.maximum(backward[:, EP] - hidden, 0.0)
    if p.job.execution.blocking_checkpoints and block.hidden_inputs:
        is_full = (p.slice.recompute & int(Recompute.full)) != 0
        backward[:, RECOMPUTE] += np.where(is_full, p.factors.checkpoint_sync_s, 0.0)
    if p.job.execution.cuda_graphs != "full":
        _wait_for_host(block, p, forward, backward)
    return BlockSeconds(forward, backward, weight_grad)


def _rerun_share(op: Op, p: Pricing) -> float:
    """Return the share of an op that checkpointing by op runs again: every second product."""
    if not p.job.execution.recompute_every_second_matmul or op.vocab:
        return 0.0
    match op.kind:
        case OpKind.matmul:
            return 0.5 if op.split == "out" else float(op.name == "proj")
        case OpKind.elementwise:
            return 1.0
        case _:
            return 0.0


def _wait_for_host(block: Block, p: Pricing, forward: Floats, backward: Floats) -> None:
    # Without CUDA graphs the host must launch every op; small kernels wait for it.
    graphed = p.job.execution.graphed_modules
    host: Floats = np.zeros_like(p.slice.tp)
    again: Floats = np.zeros_like(p.slice.tp)
    open_region = np.zeros(len(again), dtype=np.bool_)
    for op in block.ops:
        is_again = (p.slice.recompute & int(op.rerun)) != 0
        if module_of(op) not in graphed:
            once = _host_s(op, p)
            host += once
            again += is_again * once
            again += (is_again & ~open_region) * RERUN_MODULES * p.factors.module_host_s
        open_region = is_again
    reruns = backward[:, RECOMPUTE].copy()
    forward_s = np.einsum("dk->d", forward)
    backward_s = np.einsum("dk->d", backward) - reruns
    wait = np.maximum(1.5 * host - backward_s, 0.0)
    # What is run again is launched again; the host may run ahead of both.
    longer = np.maximum(1.5 * host + again - backward_s - reruns, 0.0)
    forward[:, COMPUTE] += np.maximum(host - forward_s, 0.0)
    backward[:, COMPUTE] += wait
    backward[:, RECOMPUTE] += np.maximum(longer - wait, 0.0)
    if block.is_moe and p.job.execution.capacity_factor is None:
        # How many tokens each expert gets goes through the host before its kernels are launched.
        waits = 2.0 if p.job.execution.dispatcher == "alltoall" else 1.0
        forward[:, COMPUTE] += waits * p.factors.routing_sync_s


def _host_s(op: Op, p: Pricing) -> Floats | float:
    """Return the host's seconds to launch an op and its collectives, forward.

    A kernel of eager PyTorch takes ``host_op_s``; a module of Transformer Engine or Megatron, and
    a collective, ``module_host_s``.
    """
    times, messages = _times_run(op, p), _messages(op, p)
    launches = _launches(op, p) * p.factors.host_op_s
    if op.kind is OpKind.grouped_matmul:
        launches = launches * times
    if not p.job.execution.transformer_engine:
        return launches + messages * p.factors.host_op_s
    return launches + (times + messages) * p.factors.module_host_s


def _times_run(op: Op, p: Pricing) -> Floats | float:
    """Return how many modules the host runs for an op; experts in turn run one each."""
    if op.kind is OpKind.grouped_matmul and not p.job.execution.grouped_gemm:
        return np.maximum(op.copies / p.slice.ep, 1.0)
    return _ROUTING_MODULES.get(op.name, 1.0)


def _launches(op: Op, p: Pricing) -> float:
    """Return how many kernels an op launches: with quantisation, routing or unfused work more."""
    if op.kind in (OpKind.matmul, OpKind.grouped_matmul) and op.name != "router":
        quantised = not _is_16_bit(op, p) and p.job.precision.quantise_bytes_per_element > 0
        return 2.5 if quantised else 1.0
    once = _ROUTING_LAUNCHES.get(op.name, 1.0)
    return once if _is_fused(op, p) else once * p.factors.unfused_traffic


def _messages(op: Op, p: Pricing) -> Floats | float:
    """Return how many collectives the host starts for an op; a ring starts one set a step."""
    s = p.slice
    started: Floats | float = 0.0
    for comm in op.comm:
        used = (s.cp if comm.kind.startswith("cp_") else s.tp) > 1
        if comm.kind in ("enter_tp", "exit_tp"):
            started = started + np.where(used, 1.0, 0.0)
        elif comm.kind == "cp_kv":
            steps = RING_LAUNCHES * ring_steps(s)
            gathers = np.where(used & (s.cp_comm == CpComm.all_gather), 1.0, 0.0)
            started = started + np.where(is_ring(s.cp_comm) > 0, steps, gathers)
        elif comm.kind == "cp_heads":
            started = started + np.where(used & (is_all_to_all(s.cp_comm) > 0), 1.0, 0.0)
        elif comm.kind == "dispatch":
            # Token counts, tokens and their probabilities; the kernels of DeepEP send all at once.
            sent = 3.0 if p.job.execution.dispatcher == "alltoall" else 1.0
            started = started + np.where(s.ep > 1, sent, 0.0)
        elif comm.kind == "combine":
            started = started + np.where(s.ep > 1, 1.0, 0.0)
    return started


RERUN_MODULES = 5.0
"""Modules whose host time each stretch of recomputed ops takes: to save and restore random states
and graphs. Measured: 0.3 to 0.6 ms for each of attention, activation and projections in one layer
of a mixture of experts on H100."""

RING_LAUNCHES = 4.0
"""Of one step of a ring: send and receive, attention, and two that merge its result."""

_ROUTING_MODULES = {"router": 3.0, "dispatch": 4.0, "combine": 3.0}
"""Score, choose, balance; count, permute, send, sort by expert; and back."""

_ROUTING_LAUNCHES = {"router": 15.0, "dispatch": 20.0, "combine": 8.0}
"""Kernels of top-k, probabilities and maps; of sorting, sending and their bookkeeping."""


def _is_fused(op: Op, p: Pricing) -> bool:
    if op.name in ("dispatch", "combine"):
        return p.job.execution.fused_permute
    if op.name.endswith("_streams"):
        # Norm, mixing weights and sums of hyper-connections are kernels of their own.
        return False
    return p.job.execution.fused_kernels


_MODULES = {
    **dict.fromkeys(("fc1", "activation", "fc2", "mlp_norm", "mlp_residual"), "mlp"),
    **dict.fromkeys(("in_proj", "conv", "scan", "scan_norm", "out_proj"), "mamba"),
    **dict.fromkeys(("experts_fc1", "experts_activation", "experts_fc2", "combine"), "moe"),
    "router": "moe_router",
    "dispatch": "moe_preprocess",
}


def module_of(op: Op) -> str:
    """Return the module of Megatron's CUDA graph scopes that launches an op."""
    if op.name.startswith("shared_"):
        return "moe_router"
    return _MODULES.get(op.name, "attn")


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
        return _loss_op(op, p)
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


def _loss_op(op: Op, p: Pricing) -> tuple[Floats, Floats, Floats]:
    """Return the seconds of the loss: bytes a logit, by how it is computed, over HBM bandwidth.

    Ref: TransformerEngine, ``pytorch/triton/cross_entropy.py``; Megatron-LM,
    ``tensor_parallel.cross_entropy``, ``fusions.fused_cross_entropy``; traffic counted.
    """
    logits = op.out_features * p.slice.op_tokens(op.where) / p.slice.feature_divisor(op.where)
    forward, backward = LOSS_BYTES[p.job.execution.cross_entropy]
    fwd = stream_s(forward * logits, p.at)
    return fwd, stream_s(backward * logits, p.at), np.zeros_like(fwd)


def _stream(op: Op, moved_per_token: float, p: Pricing) -> Floats:
    if not _is_fused(op, p):
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
    fullest = _fullest(op, p)
    return fwd * fullest, dgrad * fullest, _trained(op, wgrad, p) * fullest


def _stream_s(elements: Floats, p: Pricing) -> Floats:
    return elements * p.job.precision.act_bytes / p.at.hbm_bytes_per_s


def _has_bias(op: Op) -> float:
    """Return 1 where experts have biases, which a grouped product does not add by itself."""
    return float(op.params > op.copies * op.in_features * op.out_features)


def _fullest(op: Op, p: Pricing) -> Floats:
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
    if _is_16_bit(op, p):
        return p.at.matmul_16_bit_flops_per_s, p.job.precision.act_bytes
    return p.at.matmul_flops_per_s, p.job.precision.matmul_input_bytes


def _is_16_bit(op: Op, p: Pricing) -> bool:
    return op.trained_in_16_bit and (not op.vocab or p.job.precision.head_in_16_bit)


QUANTISE_TRAFFIC = 2.0
"""Of recipes without a fitted factor."""


def _quantise_s(op: Op, elements: Floats, p: Pricing, *, of_gradient: bool = False) -> Floats:
    """Seconds to quantise an input, or the gradient of an output.

    It is read and written twice, the second time transposed for the weight gradient: where the
    weight is frozen there is none, but with delayed scaling one kernel casts and transposes
    gradients all the same. Ref: TransformerEngine, ``fp8_cast_transpose_fused``, ``Quantizer``.
    """
    if _is_16_bit(op, p):
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
    if _is_16_bit(op, p) or recipe.quantise_bytes_per_element == 0 or recipe.param_bytes < 2.0:
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


def comm_seconds(op: Op, comm: Comm, beside_s: Floats, p: Pricing) -> tuple[int, Floats, Floats]:
    """Return (kind of work, exposed seconds forward, exposed seconds backward) of a communication.

    Tensor and expert parallelism: seconds * (1 - hidden fraction), with ``overlap_tp_comm`` (only
    under sequence parallelism) or ``overlap_ep_comm``; all of them without the switch. Context
    parallelism hides behind ``beside_s`` [D], the op's own forward time. PyTorch's async TP hides
    ``ASYNC_TP_SHARE`` of what user buffers do. Ref: the hidden fractions are fitted. Left out: how
    long the compute beside it is.
    """
    if comm.kind in ("enter_tp", "exit_tp", "exit_vocab"):
        fwd, bwd = tensor_parallel_s(comm, p)
        left = 1.0 - _hidden_tp_fraction(p)
        # Without sequence parallelism the all-reduce has nothing to hide behind.
        left = np.where(p.slice.sp > 0, left, 1.0)
        return TP, fwd * left, bwd * left
    if comm.kind in ("dispatch", "combine"):
        one_way = expert_parallel_s(comm, p)
        left = 1.0 - p.factors.ep_hidden_fraction * float(p.job.execution.overlap_ep_comm)
        return EP, one_way * left, one_way * left
    fwd, bwd = context_parallel_s(op, comm, beside_s, p)
    return CP, fwd, bwd


ASYNC_TP_SHARE = 0.4
"""What PyTorch's async TP hides over what user buffers do. Measured on H100 with and without: 4% of
a step of Llama 3 70B and 9% of one of 8B, 0.26 and 0.33 of the communication against 0.75."""


def _hidden_tp_fraction(p: Pricing) -> float:
    execution = p.job.execution
    share = ASYNC_TP_SHARE if execution.asynchronous_tp else 1.0
    return p.factors.tp_hidden_fraction * share * float(execution.overlap_tp_comm)


def tensor_parallel_s(comm: Comm, p: Pricing) -> tuple[Floats, Floats]:
    """Seconds (forward, backward) of entering or leaving a tensor-parallel region, nothing hidden.

    With sequence parallelism, of elements * tokens * activation bytes: entering is an all-gather
    forward, a reduce-scatter and a second all-gather backward; leaving is a reduce-scatter forward,
    an all-gather backward. Without it: an all-reduce backward on entering, forward on leaving.
    Ref: Korthikanti et al., arXiv:2205.05198, section 4.2; Megatron-LM, ``tensor_parallel``.
    """
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
    """Seconds of one dispatch or combine, by dispatcher.

    ``alltoall``: an all-to-all over ep of the routed tokens / etp, and an all-gather of them over
    etp; ``allgather``: an all-gather over ep of all tokens; ``deepep``, ``hybridep``:
    ``comm.dispatch_s``. Ref: Megatron-LM, transformer.moe.token_dispatcher.
    """
    s = p.slice
    width = p.job.precision.act_bytes
    local = comm.elements * s.routed_tokens / s.etp * width
    shared = all_gather_s(local * s.etp, s.spans.etp, p.net)
    match p.job.execution.dispatcher:
        case "deepep" | "hybridep":
            once = comm.elements * width * s.sp_tokens
            handled = p.factors.dispatch_token_bytes * s.sp_tokens
            return dispatch_s(once, handled, s.destinations, s.spans.ep, p.net)
        case "allgather":
            return all_gather_s(comm.elements * s.sp_tokens * width * s.ep, s.spans.ep, p.net)
        case _:
            return all_to_all_s(local, s.spans.ep, p.net) + shared


def context_parallel_s(op: Op, comm: Comm, beside_s: Floats, p: Pricing) -> tuple[Floats, Floats]:
    """Exposed seconds (forward, backward) of passing keys and values, heads or states around.

    Ring: (cp - 1) steps, twice the seconds backward, less the hidden fraction of the attention
    beside it. All-gather: once forward, twice backward; all-to-all of heads: once each way; a
    state: one step each way. With ``a2a+p2p`` the ring joins the groups of the all-to-all. Where TP
    has more ranks than there are key-value heads, each holds one head and passes it on.
    Ref: Liu et al., arXiv:2310.01889 (ring); Jacobs et al., arXiv:2309.14509 (heads).
    """
    s = p.slice
    local = comm.elements * s.tokens / s.tp * p.job.precision.act_bytes
    hidden = p.factors.cp_hidden_fraction * float(p.job.execution.overlap_cp_comm)
    ratio = ATTENTION_BACKWARD_FLOPS
    if comm.kind == "cp_state":
        step = ring_step_s(local, s.spans.cp, p.net)
        return step, step
    inner, outer = cp_levels(s)
    if comm.kind == "cp_heads":
        once = all_to_all_s(local, inner, p.net) * is_all_to_all(s.cp_comm)
        return once, once
    local = local * np.maximum(s.tp / max(op.num_kv_heads, 1), 1.0)
    ring = ring_steps(s) * ring_step_s(local, outer, p.net)
    ring_fwd = np.maximum(ring - hidden * beside_s, 0.0)
    ring_bwd = np.maximum(2.0 * ring - hidden * ratio * beside_s, 0.0)
    gather = all_gather_s(local * s.cp, s.spans.cp, p.net)
    gathers = (s.cp_comm == CpComm.all_gather).astype(np.float64)
    used = is_ring(s.cp_comm)
    return ring_fwd * used + gather * gathers, ring_bwd * used + 2.0 * gather * gathers


def cp_levels(s: Slice) -> tuple[Span, Span]:
    """Return the spans of the all-to-all and of the ring of context parallelism.

    One of them has the whole group, the other one rank; with ``a2a+p2p`` both have a level.
    """
    cp, inside = s.spans.cp.size, s.spans.cp.inside
    ranks = exchanging_ranks(cp.astype(np.int64), s.cp_comm, s.hierarchical_cp)
    size = ranks.astype(np.float64)
    ring = cp / size
    return (
        Span(size, np.minimum(size, inside)),
        Span(ring, np.clip(inside / size, 1.0, ring)),
    )


def ring_steps(s: Slice) -> Floats:
    """Return how often the ring passes keys and values on."""
    return cp_levels(s)[1].size - 1.0


def ring_merge_s(op: Op, p: Pricing) -> Floats:
    """Seconds to merge the results of a ring's steps, and to launch them, one way.

    Each step but the first reads its result and reads and writes the fp32 sum: 10 bytes an
    element of the output. Ref: Liu et al., arXiv:2310.01889, section 3. Left out: the log-sums.
    """
    s = p.slice
    elements = s.tokens * op.num_heads * op.v_head_dim / s.tp
    steps = ring_steps(s) * is_ring(s.cp_comm)
    return steps * (10.0 * elements / p.at.hbm_bytes_per_s + RING_LAUNCHES * p.at.kernel_s)
