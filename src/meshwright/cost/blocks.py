"""What one micro-batch of one block costs one rank: seconds by kind of work.

The loop is over the ops of a block (tens); every formula runs on columns [D].
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from meshwright.cost.columns import Floats
from meshwright.cost.exchange import comm_seconds, ring_merge_s
from meshwright.cost.host import wait_for_host
from meshwright.cost.ops import op_seconds
from meshwright.cost.pricing import COMPUTE, CP, EP, NUM_KINDS, RECOMPUTE, Pricing
from meshwright.describe.model import Block, Op, OpKind
from meshwright.parallel.layout import Recompute


@dataclass(frozen=True)
class BlockSeconds:
    """Seconds of one micro-batch of one block: [D, NUM_KINDS] forward and backward.

    ``weight_grad`` [D] is the part of backward that computes weight gradients.
    """

    forward: Floats
    backward: Floats
    weight_grad: Floats


def block_seconds(block: Block, p: Pricing) -> BlockSeconds:
    """Price a block: kernels, the communication its split forces, and what is run again.

    Backward = input gradients + weight gradients + recomputed forwards. A weight that is frozen
    (LoRA) has no weight gradient. Without CUDA graphs the host is a floor (``wait_for_host``).
    Ref: Narayanan et al., arXiv:2104.04473; Korthikanti et al., arXiv:2205.05198. Left out:
    contention of communication kernels for multiprocessors.
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
        wait_for_host(block, p, forward, backward)
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
