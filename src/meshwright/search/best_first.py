"""Price all legal layouts, then simulate best first until no bound can enter the top."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from meshwright.cost.columns import Floats, Index
from meshwright.cost.detail import BAND_FRACTION, capacity_bytes
from meshwright.cost.factors import Factors, factors_of
from meshwright.cost.step import Table, bounds, price, price_rows, simulated_step_s, with_rows
from meshwright.describe.cluster import Cluster
from meshwright.describe.job import Job
from meshwright.describe.model import Model
from meshwright.findings import Finding
from meshwright.parallel.layout import Layout, Layouts, concatenate, num_rows, row, take
from meshwright.search.candidates import candidate_tables
from meshwright.search.space import Space

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, done, of how many)."""
Refuses = Callable[[Layout[int]], Sequence[Finding]]
"""Says why a layout may be no answer; nothing when it may."""
Accepts = Callable[[Layout[int]], bool]


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
    ``refused`` is the commonest reason why layouts better than the last of ``best`` are no answer.
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
    refused: Finding | None = None


def search(
    model: Model,
    cluster: Cluster,
    job: Job,
    *,
    top: int = 5,
    space: Space | None = None,
    max_memory_bytes: float | None = None,
    with_pareto: bool = False,
    refuses: Refuses | None = None,
    factors: Factors | None = None,
    progress: Progress | None = None,
) -> Found:
    """Return the ``top`` fastest layouts that fit, exactly, and what was looked at.

    ``refuses`` narrows the top to layouts that, say, a framework can run.

    A layout fits when its peak stays clear of ``max_memory_bytes`` (default: the capacity) by the
    memory model's error band; where none does, layouts inside the band count as well.
    """
    began = time.perf_counter()
    report = progress or _silent
    used = factors or factors_of(cluster)
    limit = min(capacity_bytes(cluster, job), max_memory_bytes or math.inf)
    report("enumerating", 0, 1)
    candidates, tables = candidate_tables(model, cluster, job, space or Space(), used)
    legal = sum(map(num_rows, tables))
    if not legal:
        return Found([], [], None, candidates, 0, 0, 0, time.perf_counter() - began, limit)
    parts = _priced_parts(model, cluster, job, tables, used)
    peak, bound = _bounds(parts, legal, report)
    report("sorting", 0, 1)
    fits = peak <= limit * (1.0 - BAND_FRACTION)
    if not fits.any():
        fits = peak <= limit
    rows = np.flatnonzero(fits)
    order = rows[np.lexsort((peak[rows], bound[rows]))]
    refused: list[Finding] = []
    best, simulated = _best_first(parts, order, bound, peak, top, _gate(refuses, refused), report)
    front = _pareto(parts, rows, bound, peak, best) if with_pareto and len(rows) else []
    lowest = int(np.lexsort((bound, peak))[0])
    closest = _ranked(parts, lowest, _simulate(parts, np.array([lowest]))[0], peak)
    seconds = time.perf_counter() - began
    why = _commonest(refused)
    fit = len(rows)
    return Found(best, front, closest, candidates, legal, fit, simulated, seconds, limit, why)


def _gate(refuses: Refuses | None, refused: list[Finding]) -> Accepts | None:
    """Return a test of layouts that notes why they are refused."""
    if refuses is None:
        return None

    def accepts(layout: Layout[int]) -> bool:
        found = refuses(layout)
        refused.extend(found)
        return not found

    return accepts


def _commonest(refused: list[Finding]) -> Finding | None:
    counts = Counter((f.field, f.rule) for f in refused)
    if not counts:
        return None
    most = counts.most_common(1)[0][0]
    return next(f for f in refused if (f.field, f.rule) == most)


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
