"""Enumerate: every sensible combination that fills the cluster, then those that no rule forbids."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meshwright.checks import Case, illegal
from meshwright.cost.columns import Index
from meshwright.cost.factors import Factors, factors_of
from meshwright.describe.cluster import Cluster
from meshwright.describe.job import Job
from meshwright.describe.model import Model
from meshwright.errors import divisors
from meshwright.parallel.layout import (
    COLUMNS,
    CpComm,
    Ints,
    Layout,
    Layouts,
    Recompute,
    Zero,
    concatenate,
    layout,
    num_rows,
    take,
)
from meshwright.search.pipelines import pipelines
from meshwright.search.placements import PipelineChoice, work_of
from meshwright.search.space import Space


def candidate_tables(
    model: Model, cluster: Cluster, job: Job, space: Space, factors: Factors | None = None
) -> tuple[int, list[Layouts]]:
    """Return (number of candidates, tables of the legal ones).

    A candidate is a combination whose degrees fill the cluster and whose batch divides.
    """
    inner = _inner_choices(model, cluster, job, space)
    if not len(inner):
        return 0, []
    samples = _samples(cluster, inner)
    works = work_of(model, cluster, job, samples, factors or factors_of(cluster))
    candidates = 0
    by_string: dict[str | None, list[Layouts]] = {}
    for pipeline in pipelines(model, cluster, space, works):
        x = _rows(cluster, job, space, inner, pipeline)
        candidates += num_rows(x)
        if num_rows(x):
            by_string.setdefault(pipeline.pipeline_layout, []).append(x)
    tables: list[Layouts] = []
    for parts in by_string.values():
        x = concatenate(parts)
        x = take(x, np.flatnonzero(~illegal(Case(model=model, job=job, x=x, cluster=cluster))))
        if num_rows(x):
            tables.append(x)
    return candidates, tables


_INNER = ("tp", "cp", "cp_comm", "ep", "etp", "sp", "mbs", "recompute")


def _inner_choices(model: Model, cluster: Cluster, job: Job, space: Space) -> Ints:
    """Return every combination [M, len(_INNER)] of choices inside a pipeline stage."""
    gpus = cluster.num_gpus
    domain = min(cluster.scale_up_domain, gpus)
    tps = [d for d in divisors(gpus) if d <= domain and model.num_heads % d == 0]
    cps = [d for d in divisors(gpus) if d == 1 or _cp_is_sensible(d, job)]
    eps = [d for d in divisors(gpus) if model.num_experts % d == 0] if model.is_moe else [1]
    sizes = [m for m in (1, 2, 4, 8, 16, 32, 64) if job.gbs % m == 0 and _is_one_pass(m, job)]
    rows: list[tuple[int, ...]] = []
    for tp, cp, ep in itertools.product(
        space.choices("tp", tps, gpus),
        space.choices("cp", cps, gpus),
        space.choices("ep", eps, gpus),
    ):
        etps = [1, tp] if model.is_moe and tp > 1 else [1]
        sps = [0, 1] if tp > 1 and not model.is_moe else [int(tp > 1)]
        rows += itertools.product(
            [tp],
            [cp],
            space.choices("cp_comm", _cp_comms(cp)),
            [ep],
            space.choices("etp", etps, gpus),
            space.choices("sp", sps),
            space.choices("mbs", sizes, job.gbs),
            _recomputes(model, space),
        )
    return np.array(rows, dtype=np.int64).reshape(-1, len(_INNER))


def _samples(cluster: Cluster, inner: Ints) -> list[Layout[int]]:
    """Return layouts that show what the ends of a model weigh: the least and the most tp."""
    tp, cp, ep, mbs = (inner[:, _INNER.index(k)] for k in ("tp", "cp", "ep", "mbs"))
    near = int(ep[ep <= max(cluster.scale_up_domain, ep.min())].max())
    return [
        layout(tp=int(degree), cp=int(cp.min()), ep=near, mbs=int(mbs.min()))
        for degree in sorted({tp.min(), tp.max()})
    ]


def _cp_comms(cp: int) -> list[CpComm]:
    if cp == 1:
        return [CpComm.p2p]
    return list(CpComm) if cp >= 4 else [c for c in CpComm if c != CpComm.a2a_p2p]


def _cp_is_sensible(cp: int, job: Job) -> bool:
    # Shorter slices than this leave attention nothing to hide the exchange behind.
    return job.seq_len % (2 * cp) == 0 and job.seq_len // cp >= 2048


def _is_one_pass(mbs: int, job: Job) -> bool:
    # Kernels of more tokens than this are no faster; short sequences need many to get there.
    return mbs <= 8 or mbs * job.seq_len <= 16384


def _recomputes(model: Model, space: Space) -> list[int]:
    """Return recompute flags: none, every set of cheap modules of its common layer, full."""
    if "recompute" in space.allowed:
        return list(space.allowed["recompute"])
    known = Recompute.none
    commonest = max(set(model.layer_pattern), key=model.layer_pattern.count)
    for op in model.layer_kinds[commonest].ops:
        known |= op.rerun
    # A whole MoE or attention module costs nearly what full recomputation does and frees less.
    modules = [m for m in _CHEAP_MODULES if m & known]
    sets = [0]
    for module in modules:
        sets += [flags | int(module) for flags in sets]
    return [*sets, int(Recompute.full)]


_CHEAP_MODULES = (Recompute.moe_act, Recompute.mla_up_proj, Recompute.mlp)


def _rows(
    cluster: Cluster, job: Job, space: Space, inner: Ints, pipeline: PipelineChoice
) -> Layouts:
    """Return the candidates of one pipeline: inner choices x sharding, dp from the GPUs."""
    gpus, pp = cluster.num_gpus, pipeline.pp
    tp, cp, ep, etp, mbs = (inner[:, _INNER.index(k)] for k in ("tp", "cp", "ep", "etp", "mbs"))
    dp = gpus // (tp * cp * pp)
    whole = (dp * tp * cp * pp == gpus) & ((tp * cp * dp) % (ep * etp) == 0)
    whole &= job.gbs % np.maximum(dp * mbs, 1) == 0
    if "dp" in space.allowed:
        whole &= np.isin(dp, space.allowed["dp"])
    chosen = np.flatnonzero(whole)
    inner, dp = inner[chosen], dp[chosen]
    shard_ranks = dp * inner[:, _INNER.index("cp")]
    at: list[Index] = []
    sharding: list[Ints] = []
    for zero in space.choices("zero", [int(z) for z in Zero]):
        for replicate in _replicas(cluster, space, inner, shard_ranks):
            keep = np.flatnonzero(_useful(zero, replicate, shard_ranks))
            at.append(keep)
            sharding.append(np.stack([np.full_like(keep, zero), replicate[keep]]))
    rows = np.concatenate(at)
    zeros, replicas = np.concatenate(sharding, axis=1)
    return _table(inner[rows], dp[rows], zeros, replicas, pipeline)


def _replicas(cluster: Cluster, space: Space, inner: Ints, shard_ranks: Ints) -> list[Ints]:
    """Return copies of the sharded state: one, or as many as keep each copy in a domain."""
    if "dp_replicate" in space.allowed:
        return [np.full_like(shard_ranks, v) for v in space.allowed["dp_replicate"]]
    room = np.maximum(cluster.scale_up_domain // inner[:, _INNER.index("tp")], 1)
    in_domain = shard_ranks // np.gcd(shard_ranks, room)
    # Where one copy fills the domain already this would be the same again: 0 is no choice.
    return [np.ones_like(shard_ranks), np.where(in_domain > 1, in_domain, 0)]


def _useful(zero: int, replicate: Ints, shard_ranks: Ints) -> NDArray[np.bool_]:
    """Return where sharding in so many copies differs from the other choices."""
    divides = (replicate > 0) & (shard_ranks % np.maximum(replicate, 1) == 0)
    if zero == Zero.optim:
        return divides & (replicate == 1)
    # Copies of one rank each shard nothing, and one rank has nothing to shard over.
    sharded = divides & (replicate < shard_ranks) & (shard_ranks > 1)
    return sharded & ((replicate == 1) | (zero > Zero.optim))


def _table(inner: Ints, dp: Ints, zero: Ints, replicate: Ints, pipeline: PipelineChoice) -> Layouts:
    fixed = {name: getattr(pipeline, name, 0) for name in COLUMNS}
    # Views of one number: ``concatenate`` writes them out.
    values = {name: np.broadcast_to(np.int64(v), len(dp)) for name, v in fixed.items()}
    values |= {name: inner[:, k] for k, name in enumerate(_INNER)}
    values |= {"dp": dp, "zero": zero, "dp_replicate": replicate}
    columns: dict[str, Any] = values
    return Layout[Ints](**columns, pipeline_layout=pipeline.pipeline_layout)
