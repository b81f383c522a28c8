"""Seconds of the host that launches the ops of a block: a floor under each block's time."""

from __future__ import annotations

import numpy as np

from meshwright.cost.columns import Floats
from meshwright.cost.exchange import RING_LAUNCHES, ring_steps
from meshwright.cost.pricing import COMPUTE, RECOMPUTE, Pricing, is_16_bit, is_fused
from meshwright.cost.slices import is_all_to_all, is_ring
from meshwright.describe.model import Block, Op, OpKind
from meshwright.parallel.layout import CpComm


def wait_for_host(block: Block, p: Pricing, forward: Floats, backward: Floats) -> None:
    """Add to the seconds of a block [D, kinds] what its kernels wait for the host.

    Forward max(host - kernels, 0); backward the same with 1.5 * host; what is run again launches
    its ops once more and takes ``RERUN_MODULES`` modules a stretch. host = sum over ops that no
    CUDA graph holds of launches * ``host_op_s`` + (modules + collectives) * ``module_host_s``.
    Token counts that go through the host add ``routing_sync_s`` to each forward. Ref: none, times
    measured on layers of tiny models. Left out: how far the host runs ahead from block to block.
    """
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
        quantised = not is_16_bit(op, p) and p.job.precision.quantise_bytes_per_element > 0
        return 2.5 if quantised else 1.0
    once = _ROUTING_LAUNCHES.get(op.name, 1.0)
    return once if is_fused(op, p) else once * p.factors.unfused_traffic


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

_ROUTING_MODULES = {"router": 3.0, "dispatch": 4.0, "combine": 3.0}
"""Score, choose, balance; count, permute, send, sort by expert; and back."""

_ROUTING_LAUNCHES = {"router": 15.0, "dispatch": 20.0, "combine": 8.0}
"""Kernels of top-k, probabilities and maps; of sorting, sending and their bookkeeping."""


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
