"""The legal layout on another number of GPUs that is nearest to one."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Final

import numpy as np

from meshwright.checks import Case, illegal
from meshwright.describe.job import Job
from meshwright.describe.model import Model
from meshwright.errors import LayoutError, divisors
from meshwright.parallel.layout import (
    Layout,
    Layouts,
    Pipeline,
    row,
    table,
    take,
    with_columns,
)

_WEIGHTS: Final = {"tp": 1.2, "pp": 1.1, "cp": 1.0, "ep": 0.9, "etp": 0.9, "vpp": 0.3, "mbs": 0.2}
"""What doubling or halving a choice costs: TP is given up last, the micro batch first."""
MOST_ASKED: Final = 200
"""Layouts that a framework is asked whether it can run them."""
MOST_TRIED: Final = 256
"""How far from a number of GPUs others are tried; farther only powers of two."""


def nearest_legal(
    model: Model,
    job: Job,
    x: Layout[int],
    gpus: int,
    can_run: Callable[[Layout[int]], bool] = lambda _: True,
) -> Layout[int]:
    """Return the legal layout on ``gpus`` GPUs that is nearest to ``x``, counted in doublings.

    Of ``MOST_ASKED`` nearest ones the first that ``can_run``. Raises ``LayoutError`` when there is
    none.
    """
    best: tuple[float, Layout[int]] | None = None
    for candidates in _candidates(model, job, x, gpus):
        legal = take(candidates, ~illegal(Case(model=model, job=job, x=candidates)))
        away = np.zeros(len(legal.tp))
        for name, weight in _WEIGHTS.items():
            away += weight * np.abs(np.log2(getattr(legal, name) / getattr(x, name)))
        for at in np.argsort(away, kind="stable")[:MOST_ASKED]:
            if best is not None and float(away[at]) >= best[0]:
                break
            if can_run(row(legal, int(at))):
                best = float(away[at]), row(legal, int(at))
    if best is None:
        rule = f"No layout of {model.name} with {job.gbs} sequences a step is legal on that many."
        near = _nearest_sizes(model, job, x, gpus)
        remedy = f"Use {' or '.join(map(str, near))} GPUs." if near else "Use another number."
        raise LayoutError("gpus", gpus, rule, remedy)
    return best[1]


def _nearest_sizes(model: Model, job: Job, x: Layout[int], gpus: int) -> list[int]:
    """Return the nearest number below and above on which a legal layout exists."""
    found: list[int] = []
    for sizes in (_below(gpus), _above(gpus)):
        found += itertools.islice((n for n in sizes if _exists(model, job, x, n)), 1)
    return found


def _below(gpus: int) -> Iterator[int]:
    yield from range(gpus - 1, max(gpus - MOST_TRIED, 0), -1)
    yield from (1 << bit for bit in range(gpus.bit_length(), -1, -1) if 1 << bit < gpus)


def _above(gpus: int) -> Iterator[int]:
    yield from range(gpus + 1, gpus + MOST_TRIED)
    yield from (1 << bit for bit in range(gpus.bit_length(), 21))


def _exists(model: Model, job: Job, x: Layout[int], gpus: int) -> bool:
    tables = _candidates(model, job, x, gpus)
    return any(not illegal(Case(model=model, job=job, x=t)).all() for t in tables if len(t.tp))


def _candidates(model: Model, job: Job, x: Layout[int], gpus: int) -> list[Layouts]:
    """Return the layouts around ``x`` on ``gpus`` GPUs.

    A stated placement of layers holds for its own pipeline only: elsewhere it is left out.
    """
    sizes = divisors(gpus)
    degrees = {
        "tp": [d for d in sizes if d <= max(8, x.tp)],
        "pp": [d for d in sizes if d <= min(model.num_layers + 2, 64)],
        "cp": [d for d in sizes if d <= max(8, x.cp)],
        "ep": divisors(model.num_experts) if model.is_moe else [1],
        "etp": sorted({1, x.etp}),
        "vpp": sorted({1, x.vpp, max(x.vpp // 2, 1), 2 * x.vpp} if x.vpp > 1 else {1}),
        "mbs": sorted({1, x.mbs, max(x.mbs // 2, 1)}),
    }
    rows = np.array(list(itertools.product(*degrees.values())), dtype=np.int64)
    columns = dict(zip(degrees, rows.T, strict=True))
    unit = columns["tp"] * columns["pp"] * columns["cp"]
    columns["dp"] = gpus // unit
    batch = columns["mbs"] * np.maximum(columns["dp"], 1)
    keep = (gpus % unit == 0) & (job.gbs % batch == 0)
    keep &= (columns["vpp"] == 1) | (columns["pp"] > 1)
    columns = {name: column[keep] for name, column in columns.items()}
    same = (columns["pp"] == x.pp) & (columns["vpp"] == x.vpp)
    same_cp = columns["cp"] == x.cp
    placed = x.pipeline_layout is not None or bool(x.first) or bool(x.last)
    levels = x.hierarchical_cp is not None
    found: list[Layouts] = []
    for keep_stages, keep_levels in itertools.product({False, placed}, {False, levels}):
        rows = same if keep_stages else ~same | (not placed)
        rows = rows & (same_cp if keep_levels else ~same_cp | (not levels))
        base = x if keep_stages else replace(x, pipeline_layout=None, first=0, last=0)
        base = base if keep_levels else replace(base, hierarchical_cp=None)
        found.append(_table(base, {n: c[rows] for n, c in columns.items()}, x))
    return found


def _table(base: Layout[int], columns: dict[str, Any], x: Layout[int]) -> Layouts:
    number = len(columns["tp"])
    made = take(table([base]), np.zeros(number, dtype=np.int64))
    plain = x.schedule in (Pipeline.one_f_one_b, Pipeline.interleaved)
    schedule = np.where(columns["vpp"] > 1, int(Pipeline.interleaved), int(Pipeline.one_f_one_b))
    replicate = np.where((columns["dp"] * columns["cp"]) % x.dp_replicate == 0, x.dp_replicate, 1)
    cp_comm = np.where(columns["cp"] > 1, x.cp_comm, 0)
    had_sp = bool(x.sp) or x.tp == 1
    return with_columns(
        made,
        **columns,
        sp=(columns["tp"] > 1) & had_sp,
        schedule=schedule if plain else x.schedule,
        dp_replicate=replicate,
        cp_comm=cp_comm,
    )
