"""What pricing any op needs: its slice, the job, the speeds in force, and the kinds of work."""

from __future__ import annotations

from dataclasses import dataclass

from meshwright.cost.comm import Network, network
from meshwright.cost.compute import Speeds, speeds
from meshwright.cost.factors import Factors
from meshwright.cost.slices import Slice
from meshwright.describe.cluster import Cluster
from meshwright.describe.job import Job
from meshwright.describe.model import Op

COMPUTE, RECOMPUTE, TP, CP, EP = range(5)
"""Kinds of work, the last axis of ``BlockSeconds``; what is run again counts with its messages."""
NUM_KINDS = 5


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


def is_fused(op: Op, p: Pricing) -> bool:
    """Return whether what an op does is one kernel."""
    if op.name in ("dispatch", "combine"):
        return p.job.execution.fused_permute
    if op.name.endswith("_streams"):
        # Norm, mixing weights and sums of hyper-connections are kernels of their own.
        return False
    return p.job.execution.fused_kernels


def is_16_bit(op: Op, p: Pricing) -> bool:
    """Return whether a product stays in 16 bit under every recipe."""
    return op.trained_in_16_bit and (not op.vocab or p.job.precision.head_in_16_bit)
