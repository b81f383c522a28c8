"""Seconds of data parallelism and of the optimizer step, row by row.

Collective times are straight lines in bytes, so each row's line is found once per distinct group
and then meets the bytes of each pipeline rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from meshwright.cost.columns import Floats, Index, distinct_index
from meshwright.cost.comm import Network, all_gather_s, network, span
from meshwright.cost.compute import Speeds, speeds
from meshwright.cost.factors import Factors
from meshwright.cost.memory import shards
from meshwright.describe.cluster import Cluster
from meshwright.describe.job import Job
from meshwright.parallel.layout import Ints, Layouts, Zero
from meshwright.parallel.mesh import dense_mesh, expert_mesh


@dataclass(frozen=True)
class Line:
    """Seconds of gathering or scattering ``b`` bytes: ``start_s + b * s_per_byte``, [N] each."""

    start_s: Floats
    s_per_byte: Floats

    def at(self, size_bytes: Floats) -> Floats:
        """Return the seconds for ``size_bytes`` [N]; nothing to send takes no time."""
        return np.where(size_bytes > 0, self.start_s + size_bytes * self.s_per_byte, 0.0)


@dataclass(frozen=True)
class Weights:
    """Weights of one rank in parameters, [N]: dense and expert."""

    dense: Floats
    expert: Floats


@dataclass(frozen=True)
class DataParallel:
    """Per row [N]: gathers within a shard group and across its replicas, dense and expert."""

    dense: Line
    expert: Line
    dense_replicas: Line
    expert_replicas: Line
    dense_shards: Floats
    expert_shards: Floats
    zero: Ints
    at: Speeds
    doublings: Floats
    """log2 of the number of nodes."""


def data_parallel(cluster: Cluster, job: Job, x: Layouts, factors: Factors) -> DataParallel:
    """Return what the data-parallel collectives of each row cost per byte."""
    net = network(cluster, factors)
    domain = cluster.scale_up_domain
    dense, expert = dense_mesh(x), expert_mesh(x)
    stride = np.where(x.cp > 1, dense.axis("cp").stride, dense.axis("dp").stride)
    edp_stride = expert.axis("edp").stride
    dense_shards, expert_shards = shards(x)
    lines: list[Line] = []
    for size, shard, step in (
        (x.dp * x.cp, dense_shards, stride),
        (x.edp, expert_shards, edp_stride),
    ):
        inner = shard.astype(np.int64)
        lines.append(_line(inner, step, domain, net))
        lines.append(_line(np.maximum(size // inner, 1), step * inner, domain, net))
    return DataParallel(
        dense=lines[0],
        expert=lines[2],
        dense_replicas=lines[1],
        expert_replicas=lines[3],
        dense_shards=dense_shards,
        expert_shards=expert_shards,
        zero=x.zero,
        at=speeds(cluster.gpu, job.precision, job.execution, factors),
        doublings=np.log2(np.maximum(x.world_size / cluster.gpus_per_node, 1.0)),
    )


def rows_of(dp: DataParallel, rows: Index) -> DataParallel:
    """Return the costs of some rows."""

    def line(whole: Line) -> Line:
        return Line(whole.start_s[rows], whole.s_per_byte[rows])

    return DataParallel(
        dense=line(dp.dense),
        expert=line(dp.expert),
        dense_replicas=line(dp.dense_replicas),
        expert_replicas=line(dp.expert_replicas),
        dense_shards=dp.dense_shards[rows],
        expert_shards=dp.expert_shards[rows],
        zero=dp.zero[rows],
        at=dp.at,
        doublings=dp.doublings[rows],
    )


def _line(size: Ints, stride: Ints, domain: int, net: Network) -> Line:
    first, inverse = distinct_index([size, stride])
    over = span(size[first], stride[first], domain)
    nothing = np.zeros_like(over.size)
    start = all_gather_s(nothing, over, net)
    per_byte = (all_gather_s(nothing + 1e9, over, net) - start) / 1e9
    return Line(start_s=start[inverse], s_per_byte=per_byte[inverse])


def gather_and_reduce_s(dense_bytes: Floats, expert_bytes: Floats, dp: DataParallel) -> Floats:
    """Seconds to gather, or to reduce-scatter, the bytes of one rank's slice in its shard group.

    Dense bytes over dp*cp / dp_replicate ranks, then expert bytes over theirs, each as
    ``comm.all_gather_s``: seconds to start + bytes * seconds per byte of the slower level.
    Ref: Rajbhandari et al., arXiv:1910.02054, section 7. Left out: the wait of the first bucket.
    """
    return dp.dense.at(dense_bytes) + dp.expert.at(expert_bytes)


def across_replicas_s(dense_bytes: Floats, expert_bytes: Floats, dp: DataParallel) -> Floats:
    """Seconds to all-reduce, once a step, the scattered part across the copies of hybrid sharding.

    2 * (reduce-scatter or all-gather of bytes / shards over dp_replicate), dense and expert.
    Ref: Zhao et al., arXiv:2304.11277, section 3.2.2. Left out: its overlap with other buckets.
    """
    return 2.0 * (
        dp.dense_replicas.at(dense_bytes / dp.dense_shards)
        + dp.expert_replicas.at(expert_bytes / dp.expert_shards)
    )


def dp_comm_s(
    job: Job,
    factors: Factors,
    dp: DataParallel,
    held: Weights,
    trained: Weights,
    forward_s: Floats,
    backward_s: Floats,
    num_microbatches: int,
) -> Floats:
    """Exposed seconds of data-parallel communication of one rank, [N].

    ``held`` and ``trained`` are weights of the rank: full sharding gathers all it holds, the rest
    moves only what is trained. ``forward_s``/``backward_s`` are its seconds per micro-batch.
    Gradients are reduced during the last backward, weights gathered during the first forward; what
    the overlap switch hides is at most ``dp_hidden_fraction`` of that compute.
    ZeRO-2 and ZeRO-3 keep shards of gradients only, so they reduce in every backward; ZeRO-3 also
    gathers weights in every forward and backward.
    What is hidden still takes multiprocessors and memory bandwidth from the compute beside it, and
    a step ends with the slowest of all nodes: both count here, where ranks wait for each other.
    Ref: arXiv:1910.02054, section 7; Megatron-LM, distributed optimizer documentation.
    Left out: the first bucket's wait.
    """
    execution, precision = job.execution, job.precision
    hide_reduce = factors.dp_hidden_fraction * float(execution.overlap_grad_reduce)
    hide_gather = factors.dp_hidden_fraction * float(execution.overlap_param_gather)
    is_full = dp.zero == Zero.optim_grads_params
    dense_grads = trained.dense * precision.grad_reduce_bytes
    expert_grads = trained.expert * precision.grad_reduce_bytes
    reduce = gather_and_reduce_s(dense_grads, expert_grads, dp)
    gather = gather_and_reduce_s(
        np.where(is_full, held.dense, trained.dense) * precision.param_gather_bytes,
        np.where(is_full, held.expert, trained.expert) * precision.param_gather_bytes,
        dp,
    )
    # An all-reduce (nothing sharded) is a reduce-scatter and a gather of gradients.
    reduce_once = np.where(dp.zero == Zero.no_shard, 2.0 * reduce, reduce)
    gather_once = np.where(dp.zero == Zero.no_shard, 0.0, gather)
    # Sharded gradients have no whole buffer to add micro-batches up in: each one is reduced.
    reductions = np.where(dp.zero >= Zero.optim_grads, num_microbatches, 1)
    gathers = np.where(is_full, num_microbatches, 1)
    in_backward = np.where(is_full, gather, 0.0) + reduce_once
    exposed = reductions * _exposed_s(in_backward, hide_reduce * backward_s, factors)
    exposed += gathers * _exposed_s(gather_once, hide_gather * forward_s, factors)
    if dp.dense_replicas.s_per_byte.any() or dp.expert_replicas.s_per_byte.any():
        across = across_replicas_s(dense_grads, expert_grads, dp)
        exposed += _exposed_s(across, hide_reduce * backward_s, factors)
    work = num_microbatches * (forward_s + backward_s)
    return exposed + factors.straggler_fraction * dp.doublings * work


def _exposed_s(comm_s: Floats, beside_s: Floats, factors: Factors) -> Floats:
    """Return what compute of ``beside_s`` does not hide, and what the hidden part slows it by."""
    hidden = np.minimum(comm_s, beside_s)
    return comm_s - hidden + factors.dp_contention_fraction * hidden


def optimizer_s(
    job: Job,
    cluster: Cluster,
    factors: Factors,
    dp: DataParallel,
    trained: Weights,
) -> Floats:
    """Seconds of Adam on one rank's share of the state, [N].

    Gradients are read twice (norm and update), state read and written, weights written; the part
    kept on the host crosses its link both ways. ``step_overhead_s`` is paid once a step (logging,
    gradient norm, schedulers). Ref: Kingma and Ba, arXiv:1412.6980 (state); traffic counted.
    Left out: launches of one kernel per tensor where the update is not fused.
    """
    precision = job.precision
    sharded = dp.zero >= Zero.optim
    dense = np.where(sharded, trained.dense / dp.dense_shards, trained.dense)
    expert = np.where(sharded, trained.expert / dp.expert_shards, trained.expert)
    state = precision.master_bytes + precision.moment_bytes
    moved = 2.0 * precision.grad_bytes + 2.0 * state + precision.param_bytes
    on_card = (dense + expert) * moved / dp.at.hbm_bytes_per_s
    offloaded = job.execution.optimizer_offload_fraction
    crossing = (dense + expert) * (precision.grad_bytes + precision.param_bytes) * offloaded
    return on_card + crossing / cluster.gpu.host_bytes_per_s + factors.step_overhead_s
