"""Seconds that the messages of an op expose: tensor, context and expert parallelism."""

from __future__ import annotations

import numpy as np

from meshwright.cost.columns import Floats
from meshwright.cost.comm import (
    Span,
    all_gather_s,
    all_reduce_s,
    all_to_all_s,
    dispatch_s,
    ring_step_s,
)
from meshwright.cost.compute import ATTENTION_BACKWARD_FLOPS
from meshwright.cost.pricing import CP, EP, TP, Pricing
from meshwright.cost.slices import Slice, is_all_to_all, is_ring
from meshwright.describe.model import Comm, Op
from meshwright.parallel.cp_levels import exchanging_ranks
from meshwright.parallel.layout import CpComm

RING_LAUNCHES = 4.0
"""Of one step of a ring: send and receive, attention, and two that merge its result."""


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
