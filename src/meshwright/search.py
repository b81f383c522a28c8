"""Find the best layouts: enumerate, keep the legal, price all, simulate best first.

Exact: a row is simulated unless its lower bound is already worse than the k-th best simulated one.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meshwright.checks import Case, illegal
from meshwright.cost.columns import Floats, Index
from meshwright.cost.detail import BAND_FRACTION, capacity_bytes
from meshwright.cost.factors import Factors, factors_of
from meshwright.cost.step import Table, bounds, price, price_rows, simulated_step_s, with_rows
from meshwright.describe.cluster import MAX_GPUS, Cluster
from meshwright.describe.job import Job
from meshwright.describe.model import Model
from meshwright.errors import LayoutError, did_you_mean, divisors
from meshwright.parallel.layout import (
    CHOICES,
    COLUMNS,
    CpComm,
    Ints,
    Layout,
    Layouts,
    Pipeline,
    Recompute,
    Zero,
    concatenate,
    num_rows,
    recompute_from_text,
    row,
    take,
)
from meshwright.parallel.placement import balanced_layout

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, done, of how many)."""
Accepts = Callable[[Layout[int]], bool]
"""Says whether a layout may be an answer."""


MOST_CHUNKS = 10
"""Model chunks of a pipeline rank that are tried: each costs messages, and the last ones gain
little."""


@dataclass(frozen=True, kw_only=True)
class Space:
    """What the search may choose from; ``allowed[key]`` limits a key to some values.

    Keys are those of the layout text. Without limits everything sensible is tried.
    """

    allowed: Mapping[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])

    def choices(self, key: str, sensible: Sequence[int], of: int = 0) -> list[int]:
        """Return the values of ``key`` to try: what the user allows, else what is sensible.

        Only divisors of ``of``, if it is given.
        """
        return [v for v in self.allowed.get(key, tuple(sensible)) if not of or of % v == 0]


@dataclass(frozen=True)
class Ranked:
    """One layout that the search simulated: its step time and the fullest rank's peak."""

    layout: Layout[int]
    step_time_s: float
    peak_bytes: float


@dataclass(frozen=True)
class Found:
    """What a search found.

    ``best`` is the exact top in order. ``pareto`` is the front of peak memory against step time
    among layouts that fit, cheapest memory first. ``closest`` is the layout with the lowest peak.
    ``candidates`` were enumerated, ``legal`` passed the rules, ``fit`` fit in memory,
    ``simulated`` were simulated, in ``seconds``. ``limit_bytes`` is what a rank may hold at most.
    """

    best: list[Ranked]
    pareto: list[Ranked]
    closest: Ranked | None
    candidates: int
    legal: int
    fit: int
    simulated: int
    seconds: float
    limit_bytes: float


def search(
    model: Model,
    cluster: Cluster,
    job: Job,
    *,
    top: int = 5,
    space: Space | None = None,
    max_memory_bytes: float | None = None,
    with_pareto: bool = False,
    accepts: Accepts | None = None,
    factors: Factors | None = None,
    progress: Progress | None = None,
) -> Found:
    """Return the ``top`` fastest layouts that fit, exactly, and what was looked at.

    ``accepts`` narrows the top to layouts that, say, a framework can run.

    A layout fits when its peak stays clear of ``max_memory_bytes`` (default: the capacity) by the
    memory model's error band; where none does, layouts inside the band count as well.
    """
    began = time.perf_counter()
    report = progress or _silent
    limit = min(capacity_bytes(cluster, job), max_memory_bytes or math.inf)
    report("enumerating", 0, 1)
    candidates, tables = candidate_tables(model, cluster, job, space or Space())
    legal = sum(map(num_rows, tables))
    if not legal:
        return Found([], [], None, candidates, 0, 0, 0, time.perf_counter() - began, limit)
    parts = _priced_parts(model, cluster, job, tables, factors or factors_of(cluster))
    peak, bound = _bounds(parts, legal, report)
    report("sorting", 0, 1)
    fits = peak <= limit * (1.0 - BAND_FRACTION)
    if not fits.any():
        fits = peak <= limit
    rows = np.flatnonzero(fits)
    order = rows[np.lexsort((peak[rows], bound[rows]))]
    best, simulated = _best_first(parts, order, bound, peak, top, accepts, report)
    front = _pareto(parts, rows, bound, peak, best) if with_pareto and len(rows) else []
    lowest = int(np.lexsort((bound, peak))[0])
    closest = _ranked(parts, lowest, _simulate(parts, np.array([lowest]))[0], peak)
    seconds = time.perf_counter() - began
    return Found(best, front, closest, candidates, legal, len(rows), simulated, seconds, limit)


def _silent(what: str, done: int, of: int) -> None:
    del what, done, of


@dataclass(frozen=True)
class _Part:
    """Rows ``start``... of the whole search that share one table."""

    table: Table
    start: int


def _priced_parts(
    model: Model, cluster: Cluster, job: Job, tables: list[Layouts], factors: Factors
) -> list[_Part]:
    """Price the slices of all tables together, once, then the rows of each table."""
    priced = price(model, cluster, job, concatenate(tables), factors)
    parts: list[_Part] = []
    start = 0
    for x in tables:
        stop = start + num_rows(x)
        mine = replace(priced, inverse=priced.inverse[start:stop])
        parts.append(_Part(price_rows(model, cluster, job, x, factors, mine), start))
        start = stop
    return parts


def _bounds(parts: list[_Part], legal: int, report: Progress) -> tuple[Floats, Floats]:
    peak, bound = np.empty(legal), np.empty(legal)
    for part in parts:
        report("pricing", part.start, legal)
        found = bounds(part.table)
        stop = part.start + len(found.bound_s)
        peak[part.start : stop] = found.peak_bytes
        bound[part.start : stop] = found.bound_s
    return peak, bound


def _best_first(
    parts: list[_Part],
    order: Index,
    bound: Floats,
    peak: Floats,
    top: int,
    accepts: Accepts | None,
    report: Progress,
) -> tuple[list[Ranked], int]:
    """Simulate rows in the order of their bounds until no bound can enter the top."""
    simulated = 0
    rows, seconds = np.zeros(0, dtype=np.intp), np.zeros(0)
    done, batch, worst = 0, max(8, top), math.inf
    while done < len(order) and bound[order[done]] <= worst:
        chosen = order[done : done + batch]
        chosen = chosen[bound[chosen] <= worst]
        done += len(chosen)
        if accepts is not None:
            kept = [accepts(_layout(parts, int(r))) for r in chosen]
            chosen = chosen[np.array(kept, dtype=np.bool_)]
        simulated += len(chosen)
        rows = np.concatenate([rows, chosen])
        seconds = np.concatenate([seconds, _simulate(parts, chosen)])
        keep = np.lexsort((rows, peak[rows], seconds))[:top]
        rows, seconds = rows[keep], seconds[keep]
        if len(rows) == top:
            worst = float(seconds[-1])
        batch = min(2 * batch, 4096)
        report("simulating", done, len(order))
    found = [_ranked(parts, int(r), s, peak) for r, s in zip(rows, seconds, strict=True)]
    return found, simulated


def _simulate(parts: list[_Part], rows: NDArray[np.intp]) -> Floats:
    seconds = np.zeros(len(rows))
    for part in parts:
        stop = part.start + num_rows(part.table.x)
        mine = np.flatnonzero((rows >= part.start) & (rows < stop))
        if len(mine):
            local = rows[mine] - part.start
            t = part.table
            chosen = with_rows(t, take(t.x, local), t.priced.inverse[local])
            seconds[mine] = simulated_step_s(chosen)
    return seconds


def _ranked(parts: list[_Part], at: int, step_time_s: float, peak: Floats) -> Ranked:
    return Ranked(_layout(parts, at), float(step_time_s), float(peak[at]))


def _layout(parts: list[_Part], at: int) -> Layout[int]:
    part = next(p for p in reversed(parts) if p.start <= at)
    return row(part.table.x, at - part.start)


def _pareto(
    parts: list[_Part], rows: NDArray[np.intp], bound: Floats, peak: Floats, best: list[Ranked]
) -> list[Ranked]:
    """Return the front of memory against time: the bound chooses candidates, simulation decides.

    The best layouts are candidates too, so that the front ends with the fastest of all.
    """
    candidates = _front(rows, bound[rows], peak[rows])
    seconds = _simulate(parts, candidates)
    found = [_ranked(parts, int(r), s, peak) for r, s in zip(candidates, seconds, strict=True)]
    front: list[Ranked] = []
    for one in sorted(found + best, key=lambda r: (r.step_time_s, r.peak_bytes)):
        if not front or one.peak_bytes < front[-1].peak_bytes:
            front.append(one)
    return front[::-1]


def _front(rows: NDArray[np.intp], seconds: Floats, size: Floats) -> NDArray[np.intp]:
    order = np.lexsort((size, seconds))
    lowest = np.minimum.accumulate(size[order])
    new_low = np.concatenate([[True], size[order][1:] < lowest[:-1]])
    return rows[order[new_low]]


def candidate_tables(
    model: Model, cluster: Cluster, job: Job, space: Space
) -> tuple[int, list[Layouts]]:
    """Return (number of candidates, tables of the legal ones).

    A candidate is a combination whose degrees fill the cluster and whose batch divides.
    """
    inner = _inner_choices(model, cluster, job, space)
    candidates = 0
    by_string: dict[str | None, list[Layouts]] = {}
    for pipeline in _pipelines(model, cluster, space):
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


@dataclass(frozen=True)
class _Pipeline:
    pp: int
    vpp: int
    schedule: Pipeline
    pipeline_layout: str | None
    account: int


def _pipelines(model: Model, cluster: Cluster, space: Space) -> Iterator[_Pipeline]:
    """Yield pipelines: degrees, schedule and a placement that splits the layers evenly.

    Layers that do not divide go by counting embedding and loss as layers where that divides, else
    by a balanced layout string.
    """
    layers = model.num_layers
    degrees = [d for d in divisors(cluster.num_gpus) if d <= min(layers, 64)]
    for pp in space.choices("pp", degrees, cluster.num_gpus):
        chunks = space.choices("vpp", _chunks(layers, pp))
        for vpp in (v for v in chunks if pp * v <= layers):
            schedules = [Pipeline.one_f_one_b] if vpp == 1 else [Pipeline.interleaved]
            if pp > 1 and vpp == 1:
                schedules.append(Pipeline.zb_h1)
            if pp > 1 and vpp == 2:
                schedules.append(Pipeline.zb_v)
            for schedule in space.choices("schedule", schedules):
                yield from _placements(model, pp, vpp, Pipeline(schedule), space)


def _chunks(layers: int, pp: int) -> list[int]:
    if pp == 1:
        return [1]
    most = max(layers // pp, 1)
    if layers % pp == 0:
        return [v for v in divisors(most) if v <= MOST_CHUNKS]
    return [v for v in (1, 2, 3, 4, 6, 8) if v <= most]


def _placements(
    model: Model, pp: int, vpp: int, schedule: Pipeline, space: Space
) -> Iterator[_Pipeline]:
    layers, stages = model.num_layers, pp * vpp
    if layers % stages == 0:
        yield _Pipeline(pp, vpp, schedule, None, 0)
    elif (layers + 2) % stages == 0:
        yield _Pipeline(pp, vpp, schedule, None, 1)
    elif len(model.mtp_layers) <= 1 or stages < layers:
        text = balanced_layout(layers, stages, len(model.mtp_layers))
        yield _Pipeline(pp, vpp, schedule, text, 0)


_INNER = ("tp", "cp", "cp_comm", "ep", "etp", "sp", "mbs", "recompute")


def _inner_choices(model: Model, cluster: Cluster, job: Job, space: Space) -> Ints:
    """Return every combination [M, len(_INNER)] of choices inside a pipeline stage."""
    gpus = cluster.num_gpus
    domain = min(cluster.scale_up_domain, gpus)
    tps = [d for d in divisors(gpus) if d <= domain and model.num_heads % d == 0]
    cps = [d for d in divisors(gpus) if d == 1 or _cp_is_sensible(d, job)]
    eps = [d for d in divisors(gpus) if model.num_experts % d == 0] if model.is_moe else [1]
    sizes = [m for m in (1, 2, 4, 8) if job.gbs % m == 0]
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


def _cp_comms(cp: int) -> list[CpComm]:
    if cp == 1:
        return [CpComm.p2p]
    return list(CpComm) if cp >= 4 else [c for c in CpComm if c != CpComm.a2a_p2p]


def _cp_is_sensible(cp: int, job: Job) -> bool:
    # Shorter slices than this leave attention nothing to hide the exchange behind.
    return job.seq_len % (2 * cp) == 0 and job.seq_len // cp >= 2048


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


def _rows(cluster: Cluster, job: Job, space: Space, inner: Ints, pipeline: _Pipeline) -> Layouts:
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


def _table(inner: Ints, dp: Ints, zero: Ints, replicate: Ints, pipeline: _Pipeline) -> Layouts:
    fixed = dict.fromkeys(COLUMNS, 0) | {
        "pp": pipeline.pp,
        "vpp": pipeline.vpp,
        "schedule": int(pipeline.schedule),
        "account_for_embedding": pipeline.account,
        "account_for_loss": pipeline.account,
    }
    # Views of one number: ``concatenate`` writes them out.
    values = {name: np.broadcast_to(np.int64(v), len(dp)) for name, v in fixed.items()}
    values |= {name: inner[:, k] for k, name in enumerate(_INNER)}
    values |= {"dp": dp, "zero": zero, "dp_replicate": replicate}
    columns: dict[str, Any] = values
    return Layout[Ints](**columns, pipeline_layout=pipeline.pipeline_layout)


def read_space(texts: Sequence[str]) -> Space:
    """Read limits such as ``tp=8``, ``pp=2..8`` or ``ep=8,16`` (several may share a text).

    Raises ``LayoutError`` naming the key and the forms that are understood.
    """
    allowed: dict[str, tuple[int, ...]] = {}
    for item in itertools.chain.from_iterable(text.split() for text in texts):
        key, sign, value = item.partition("=")
        if not sign or not value:
            raise LayoutError("fix", item, "A limit is key=value.", "Write tp=8 or pp=2..8.")
        if key in allowed:
            rule, remedy = "It is limited twice.", f"Write all values at once, as in {key}=2,4."
            raise LayoutError(f"fix.{key}", value, rule, remedy)
        allowed[key] = _read_values(key, value)
    return Space(allowed=allowed)


_NAMED: dict[str, type[Zero] | type[CpComm] | type[Pipeline]] = {
    "zero": Zero,
    "cp_comm": CpComm,
    "schedule": Pipeline,
}
_NUMBERS = ("tp", "cp", "dp", "pp", "vpp", "ep", "etp", "mbs", "dp_replicate")


def _read_values(key: str, value: str) -> tuple[int, ...]:
    if key == "recompute":
        return tuple(_recompute_flags(v) for v in value.split(","))
    if key == "sp":
        return tuple(int(_boolean(v)) for v in value.split(","))
    if key in _NAMED:
        return tuple(_named(key, v) for v in value.split(","))
    if key not in _NUMBERS:
        known = (*_NUMBERS, *_NAMED, "sp", "recompute")
        raise LayoutError("fix", key, "This key cannot be limited.", did_you_mean(key, known))
    low, dots, high = value.partition("..")
    try:
        ends = [int(v) for v in ((low, high) if dots else value.split(","))]
    except ValueError:
        ends = []
    if not ends or min(ends) < 1 or max(ends) > MAX_GPUS or (dots and ends[0] > ends[1]):
        raise LayoutError(
            f"fix.{key}",
            value,
            f"A limit is whole numbers from 1 to {MAX_GPUS:,}.",
            f"Write {key}=2..8 or {key}=2,4.",
        )
    return tuple(range(ends[0], ends[1] + 1)) if dots else tuple(ends)


def _recompute_flags(text: str) -> int:
    flags, num_layers = recompute_from_text(text)
    if num_layers:
        raise LayoutError(
            "fix.recompute",
            text,
            "The search recomputes whole stages: none, modules, or full.",
            "Write recompute=full, and price numbers of layers with estimate.",
        )
    return int(flags)


def _boolean(text: str) -> bool:
    if text not in ("true", "false"):
        raise LayoutError("fix.sp", text, "It is true or false.", "Write sp=true.")
    return text == "true"


def _named(key: str, text: str) -> int:
    if text not in CHOICES[key]:
        raise LayoutError(f"fix.{key}", text, "Unknown choice.", did_you_mean(text, CHOICES[key]))
    return int(CHOICES[key][text])
