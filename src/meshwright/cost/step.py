"""From blocks to ranks to the step: memory and a lower bound for all rows, simulation for some.

``price`` costs each distinct slice of each block once. Rows that share the shape of their pipeline
(``by_pipeline``) then meet the matrices of ``stages``: the only loop over rows in the package.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from meshwright.cost.blocks import (
    NUM_KINDS,
    RECOMPUTE,
    BlockSeconds,
    block_seconds,
    pricing,
)
from meshwright.cost.columns import Floats, Index, distinct, distinct_index
from meshwright.cost.comm import network, point_to_point_s, spans
from meshwright.cost.data_parallel import (
    DataParallel,
    data_parallel,
    dp_comm_s,
    optimizer_s,
    rows_of,
)
from meshwright.cost.factors import Factors, fitted
from meshwright.cost.memory import (
    block_bytes,
    grads_bytes_per_param,
    optimizer_bytes_per_param,
    weights_bytes_per_param,
)
from meshwright.cost.parameters import block_params_per_rank, trained_params_per_rank
from meshwright.cost.slices import slice_keys, slices
from meshwright.cost.stages import (
    PIPELINE_COLUMNS,
    LayerFacts,
    PipelineKey,
    Stages,
    layer_facts,
    stages,
)
from meshwright.describe.cluster import Cluster
from meshwright.describe.job import Job
from meshwright.describe.model import Model
from meshwright.parallel.layout import Layouts, Pipeline, Recompute, Zero, num_rows, take
from meshwright.parallel.pipeline import Simulation, build_schedule, simulate


@dataclass(frozen=True)
class Priced:
    """Costs of the distinct slices of a table, [D, K] unless said; ``inverse`` [N] finds a row's.

    ``seconds[kind]`` hold forward and backward of every kind of work: [D, K, NUM_KINDS].
    """

    facts: LayerFacts
    inverse: Index
    forward: Floats
    backward: Floats
    weight_grad: Floats
    reruns: Floats
    by_kind_forward: Floats
    by_kind_backward: Floats
    kept: Floats
    whole: Floats
    logits: Floats
    working: Floats
    dense_params: Floats
    expert_params: Floats
    dense_trained: Floats
    expert_trained: Floats
    message_bytes: Floats


def price(model: Model, cluster: Cluster, job: Job, x: Layouts, factors: Factors) -> Priced:
    """Price every distinct slice of every kind of block of a table."""
    found = distinct(x, slice_keys(x, cluster))
    part = slices(model, cluster, job, found.rows)
    p = pricing(part, job, cluster, factors)
    blocks = model.block_kinds
    seconds = [block_seconds(b, p) for b in blocks]
    sizes = [block_bytes(b, p, model.hidden_size) for b in blocks]
    dense, expert = block_params_per_rank(model, found.rows)
    dense_trained, expert_trained = trained_params_per_rank(model, job, found.rows)
    forward, backward = _stack(seconds)
    return Priced(
        facts=layer_facts(model),
        inverse=found.inverse,
        forward=np.einsum("dkc->dk", forward),
        backward=np.einsum("dkc->dk", backward) - backward[:, :, RECOMPUTE],
        reruns=np.ascontiguousarray(backward[:, :, RECOMPUTE]),
        weight_grad=np.stack([s.weight_grad for s in seconds], axis=1),
        by_kind_forward=forward,
        by_kind_backward=backward,
        kept=np.stack([s.kept for s in sizes], axis=1),
        whole=np.stack([s.whole for s in sizes], axis=1),
        logits=np.stack([s.logits for s in sizes], axis=1),
        working=np.stack([s.working for s in sizes], axis=1),
        dense_params=dense,
        expert_params=expert,
        dense_trained=dense_trained,
        expert_trained=expert_trained,
        message_bytes=part.sp_tokens * model.hidden_size * job.precision.act_bytes,
    )


def _stack(seconds: list[BlockSeconds]) -> tuple[Floats, Floats]:
    forward = np.stack([s.forward for s in seconds], axis=1)
    backward = np.stack([s.backward for s in seconds], axis=1)
    assert forward.shape[2] == NUM_KINDS
    return forward, backward


@dataclass(frozen=True)
class Group:
    """Rows [n] that share a pipeline: their numbers in the table, its matrices, their costs."""

    key: PipelineKey
    rows: Index
    x: Layouts
    at: Index
    """Row of ``Priced`` for each row."""
    stages: Stages


def by_pipeline(job: Job, x: Layouts, priced: Priced) -> Iterator[Group]:
    """Yield the rows of a table in groups that share the shape of their pipeline."""
    num_microbatches = job.gbs // (x.dp * x.mbs)
    block = ((x.recompute & int(Recompute.block)) != 0).astype(np.int64)
    columns = [getattr(x, c) for c in PIPELINE_COLUMNS]
    columns += [num_microbatches, block, x.recompute_num_layers]
    first, group_of = distinct_index(columns)
    order = np.argsort(group_of, kind="stable")
    edges = np.searchsorted(group_of[order], np.arange(len(first) + 1))
    for g, representative in enumerate(first):
        rows = order[edges[g] : edges[g + 1]]
        shape = {c: int(getattr(x, c)[representative]) for c in PIPELINE_COLUMNS}
        key = PipelineKey(
            **shape,
            num_microbatches=int(num_microbatches[representative]),
            recompute_block=int(block[representative]),
            recompute_num_layers=int(x.recompute_num_layers[representative]),
            pipeline_layout=x.pipeline_layout,
        )
        yield Group(
            key=key,
            rows=rows,
            x=take(x, rows),
            at=priced.inverse[rows],
            stages=stages(priced.facts, key),
        )


@dataclass(frozen=True)
class Table:
    """A table of layouts with all that pricing its rows needs."""

    model: Model
    cluster: Cluster
    job: Job
    x: Layouts
    factors: Factors
    priced: Priced
    message_s: Floats
    """Seconds [N] of one activation message between pipeline neighbours that nothing hides."""


def prepare(
    model: Model, cluster: Cluster, job: Job, x: Layouts, factors: Factors | None = None
) -> Table:
    """Price the distinct slices of a table, and nothing yet that is row by row."""
    used = factors or fitted()
    priced = price(model, cluster, job, x, used)
    return with_rows(Table(model, cluster, job, x, used, priced, np.zeros(0)), x, priced.inverse)


def with_rows(table: Table, x: Layouts, inverse: Index) -> Table:
    """Return the same pricing for other rows ``x``, whose slices are ``inverse`` of the priced."""
    priced = replace(table.priced, inverse=inverse)
    crosses = spans(x, table.cluster).pp_crosses
    net = network(table.cluster, table.factors)
    message_s = point_to_point_s(priced.message_bytes[inverse], crosses, net)
    hidden = table.factors.pp_hidden_fraction * float(table.job.execution.overlap_pp_comm)
    message_s = message_s * np.where(x.vpp > 1, 1.0 - hidden, 1.0)
    return replace(table, x=x, priced=priced, message_s=message_s)


MEMORY_TERMS = (
    "weights_bytes",
    "grads_bytes",
    "optimizer_bytes",
    "activations_bytes",
    "logits_bytes",
    "buffers_bytes",
    "framework_bytes",
)


def rank_memory(t: Table, g: Group, q: int) -> dict[str, Floats]:
    """Return the bytes [n] of each memory term on candidate ``q`` of a group at its peak.

    weights, grads, optimizer = parameters of the rank * bytes per parameter; activations = held
    micro-batches * kept + recomputed layers alive; buffers = gradients alive inside the largest
    block, messages and gathered ZeRO-3 weights. Ref: the docstrings of ``cost.memory``.
    """
    s, p, at, job = g.stages, t.priced, g.at, t.job
    dense = np.einsum("nk,k->n", p.dense_params[at], s.held_params[q])
    expert = np.einsum("nk,k->n", p.expert_params[at], s.held_params[q])
    dense_trained = np.einsum("nk,k->n", p.dense_trained[at], s.held_params[q])
    expert_trained = np.einsum("nk,k->n", p.expert_trained[at], s.held_params[q])
    weights = weights_bytes_per_param(job, g.x)
    grads = grads_bytes_per_param(job, g.x)
    optimizer = optimizer_bytes_per_param(job, g.x)
    is_full = ((g.x.recompute & int(Recompute.full)) != 0).astype(np.float64)
    activations = np.einsum("nk,k->n", p.kept[at], s.held[q])
    activations = activations + np.einsum("nk,k->n", p.whole[at], s.held_whole[q])
    activations = activations + is_full * np.einsum("nk,k->n", p.whole[at], s.alive[q])
    logits = np.einsum("nk,k->n", p.logits[at], s.held[q])
    buffers = np.max(p.working[at] * s.present[q], axis=1) + _gathered_bytes(t, g)
    buffers = buffers + 2.0 * p.message_bytes[at] * float(g.key.pp > 1)
    slack = t.factors.fragmentation_fraction
    groups = np.zeros(len(at))
    for degree in (g.x.tp, g.x.cp, g.x.pp, g.x.dp, g.x.ep):
        groups += degree > 1
    return {
        "weights_bytes": dense * weights.dense + expert * weights.expert,
        "grads_bytes": dense_trained * grads.dense + expert_trained * grads.expert,
        "optimizer_bytes": dense_trained * optimizer.dense + expert_trained * optimizer.expert,
        "activations_bytes": (activations - logits) * (1.0 + slack),
        "logits_bytes": logits,
        "buffers_bytes": buffers,
        "framework_bytes": t.factors.framework_bytes + t.factors.communicator_bytes * groups,
    }


def _gathered_bytes(t: Table, g: Group) -> Floats:
    """Return the whole weights of the two largest-layer gathers that ZeRO-3 has in flight, [n]."""
    p, at = t.priced, g.at
    layers = slice(0, p.facts.num_layer_kinds)
    largest = np.max((p.dense_params + p.expert_params)[at][:, layers], axis=1)
    return np.where(g.x.zero == Zero.optim_grads_params, 2.0 * largest, 0.0) * (
        t.job.precision.param_bytes
    )


def peak_bytes(t: Table, g: Group) -> tuple[Floats, Index]:
    """Return (peak bytes [n] of the fullest rank, its candidate [n])."""
    totals = np.stack(
        [sum(rank_memory(t, g, q).values()) for q in range(len(g.stages.held))], axis=1
    )
    return totals.max(axis=1), totals.argmax(axis=1)


def pipeline_bound_s(t: Table, g: Group) -> Floats:
    """Return a lower bound [n] of the pipeline's time that no order of the same actions can beat.

    max over lines of fill + own work + drain; see ``parallel.pipeline.bound_coefficients``.
    """
    s, p, at = g.stages, t.priced, g.at
    work = (
        np.einsum("nk,rk->nr", p.forward[at], s.bound_forward)
        + np.einsum("nk,rk->nr", p.reruns[at], s.bound_reruns)
        + np.einsum("nk,rk->nr", p.backward[at], s.bound_backward)
    )
    return np.max(work + t.message_s[g.rows][:, None] * s.bound_p2p, axis=1)


def pipeline_s(t: Table, g: Group) -> Floats:
    """Return the simulated time [n] of the pipeline, first forward to last backward."""
    return simulate_group(t, g, t.message_s[g.rows]).step_s


def simulate_group(t: Table, g: Group, message_s: Floats) -> Simulation:
    """Simulate the schedule of a group for its rows; ``message_s`` [n] delays each message."""
    s, p, at, key = g.stages, t.priced, g.at, g.key
    schedule = build_schedule(
        Pipeline(key.schedule), key.pp, key.vpp, key.num_microbatches, key.microbatch_group_size
    )
    forward = np.einsum("nk,sk->ns", p.forward[at], s.runs)
    backward = np.einsum("nk,sk->ns", p.backward[at], s.runs) + np.einsum(
        "nk,sk->ns", p.reruns[at], s.reruns
    )
    weight = np.einsum("nk,sk->ns", p.weight_grad[at], s.runs)
    return simulate(schedule, forward, backward, message_s, weight)


def beside_pipeline_s(t: Table, g: Group, dp: DataParallel) -> tuple[Floats, Floats]:
    """Return exposed data-parallel seconds and optimizer seconds [n], each of its slowest rank."""
    s, p, at = g.stages, t.priced, g.at
    ranks = np.concatenate([s.params, s.own, s.own_reruns], axis=1)
    dp_s, opt_s = np.zeros(len(at)), np.zeros(len(at))
    local = rows_of(dp, g.rows)
    for r in np.unique(ranks, axis=0, return_index=True)[1]:
        dense = np.einsum("nk,k->n", p.dense_trained[at], s.params[r])
        expert = np.einsum("nk,k->n", p.expert_trained[at], s.params[r])
        forward = np.einsum("nk,k->n", p.forward[at], s.own[r])
        backward = np.einsum("nk,k->n", p.backward[at], s.own[r])
        backward = backward + np.einsum("nk,k->n", p.reruns[at], s.own_reruns[r])
        m = g.key.num_microbatches
        exposed = dp_comm_s(t.job, t.factors, local, dense, expert, forward, backward, m)
        dp_s = np.maximum(dp_s, exposed)
        update = optimizer_s(t.job, t.cluster, t.factors, local, dense, expert)
        opt_s = np.maximum(opt_s, update)
    return dp_s, opt_s


@dataclass(frozen=True)
class Bounds:
    """Columns [N]: peak bytes of the fullest rank, a lower bound of the step, what adds to it."""

    peak_bytes: Floats
    bound_s: Floats
    beside_s: Floats


def bounds(t: Table) -> Bounds:
    """Return memory and a lower bound of the step time of every row."""
    n = num_rows(t.x)
    peak, bound, beside = np.zeros(n), np.zeros(n), np.zeros(n)
    dp = data_parallel(t.cluster, t.job, t.x, t.factors)
    for g in by_pipeline(t.job, t.x, t.priced):
        peak[g.rows] = peak_bytes(t, g)[0]
        beside[g.rows] = sum(beside_pipeline_s(t, g, dp))
        bound[g.rows] = pipeline_bound_s(t, g) + beside[g.rows]
    return Bounds(peak, bound, beside)


def simulated_step_s(t: Table) -> Floats:
    """Return the step time [N] of every row, its pipeline simulated."""
    n = num_rows(t.x)
    out = np.zeros(n)
    dp = data_parallel(t.cluster, t.job, t.x, t.factors)
    for g in by_pipeline(t.job, t.x, t.priced):
        out[g.rows] = pipeline_s(t, g) + sum(beside_pipeline_s(t, g, dp))
    return out
