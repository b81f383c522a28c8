"""Fitting the factors of the cost model to measured runs.

Minimises the sum over runs of soft-L1(log(predicted / measured) / ``SCALE``) plus a pull of every
factor towards its prior, by Gauss-Newton on the logarithms of the factors with iterated
reweighting. A factor is named as in ``factors.toml``: ``hbm_fraction``, ``half_rows.hopper``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from meshwright.cost.columns import Floats
from meshwright.cost.factors import Factors
from meshwright.cost.step import prepare, simulated_step_s
from meshwright.fit.rows import Run
from meshwright.parallel.layout import table

SCALE = 0.04
"""Errors well below this count squared, those above by their size: outliers do not decide."""

PRIOR_WIDTH = 0.5
"""How far, as a logarithm, a factor may move for the price of one run that is off by ``SCALE``."""

STEP = 0.02
"""Relative change of a factor by which derivatives are taken."""


@dataclass(frozen=True)
class Measured:
    """A run and its measured step time."""

    run: Run
    step_time_s: float


def value_of(factors: Factors, name: str) -> float:
    """Return a factor by its dotted name."""
    head, _, key = name.partition(".")
    found: Any = getattr(factors, head)
    return float(found[key] if key else found)


def with_values(factors: Factors, values: Mapping[str, float]) -> Factors:
    """Return the factors with some replaced."""
    changes: dict[str, Any] = {}
    for name, value in values.items():
        head, _, key = name.partition(".")
        if key:
            changes[head] = {**changes.get(head, getattr(factors, head)), key: value}
        else:
            changes[head] = value
    return replace(factors, **changes)


def predicted_s(run: Run, factors: Factors) -> float:
    """Return the step time of a run under some factors."""
    prepared = prepare(run.model, run.cluster, run.job, table([run.layout]), factors)
    return float(simulated_step_s(prepared)[0])


def log_errors(runs: Sequence[Measured], factors: Factors) -> Floats:
    """Return log(predicted / measured) of each run."""
    return np.asarray([np.log(predicted_s(m.run, factors) / m.step_time_s) for m in runs])


def reads(run: Run, name: str) -> bool:
    """Return whether a run's price can depend on a factor: another family's share cannot."""
    head, _, key = name.partition(".")
    gpu = run.cluster.gpu
    if head == "clock_fraction":
        return gpu.name == key
    return not key or gpu.architecture.lower().startswith(key.partition(".")[0])


def fit(
    runs: Sequence[Measured],
    start: Factors,
    names: Sequence[str],
    *,
    iterations: int = 4,
    limits: Mapping[str, tuple[float, float]] | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Factors:
    """Return the factors that explain the runs best."""
    prior = np.log([value_of(start, n) for n in names])
    at = prior.copy()
    factors, errors = start, log_errors(runs, start)
    for turn in range(iterations):
        slopes = _slopes(runs, factors, names, errors)
        weights = 1.0 / np.sqrt(1.0 + (errors / SCALE) ** 2) / SCALE**2
        damping = np.full(len(names), 1.0 / PRIOR_WIDTH**2)
        left = np.einsum("ri,r,rj->ij", slopes, weights, slopes) + np.diag(damping)
        right = -np.einsum("ri,r,r->i", slopes, weights, errors) - damping * (at - prior)
        move = np.clip(_solved(left, right), -0.4, 0.4)
        factors, at, errors = _best_move(runs, start, names, at, move, errors, prior, limits or {})
        progress(f"{turn + 1}: loss {_loss(errors, at, prior):.1f}, {describe(errors)}")
    return factors


def _solved(left: Floats, right: Floats) -> Floats:
    return np.asarray(np.linalg.solve(left, right), dtype=np.float64)  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]


def _slopes(
    runs: Sequence[Measured], factors: Factors, names: Sequence[str], errors: Floats
) -> Floats:
    slopes = np.zeros((len(runs), len(names)))
    for i, name in enumerate(names):
        changed = with_values(factors, {name: value_of(factors, name) * (1.0 + STEP)})
        for r, measured in enumerate(runs):
            if reads(measured.run, name):
                error = np.log(predicted_s(measured.run, changed) / measured.step_time_s)
                slopes[r, i] = (error - errors[r]) / np.log(1.0 + STEP)
    return slopes


def _best_move(
    runs: Sequence[Measured],
    start: Factors,
    names: Sequence[str],
    at: Floats,
    move: Floats,
    errors: Floats,
    prior: Floats,
    limits: Mapping[str, tuple[float, float]],
) -> tuple[Factors, Floats, Floats]:
    """Return the state after the longest of some fractions of ``move`` that lowers the loss."""
    before = _loss(errors, at, prior)
    low = np.log([limits.get(n, (1e-12, 0))[0] for n in names])
    high = np.log([limits.get(n, (0, 1e12))[1] for n in names])
    for fraction in (1.0, 0.5, 0.2):
        there = np.clip(at + fraction * move, low, high)
        factors = with_values(start, dict(zip(names, np.exp(there).tolist(), strict=True)))
        found = log_errors(runs, factors)
        if _loss(found, there, prior) < before:
            return factors, there, found
    same = with_values(start, dict(zip(names, np.exp(at).tolist(), strict=True)))
    return same, at, errors


def _loss(errors: Floats, at: Floats, prior: Floats) -> float:
    soft = 2.0 * (np.sqrt(1.0 + (errors / SCALE) ** 2) - 1.0)
    return float(np.sum(soft) + np.sum(((at - prior) / PRIOR_WIDTH) ** 2))


def describe(errors: Floats) -> str:
    """Return median, 90th percentile and bias of errors as text."""
    size = np.abs(np.expm1(errors))
    return (
        f"median {np.median(size):.1%}, p90 {np.quantile(size, 0.9):.1%}, "
        f"bias {np.expm1(np.median(errors)):+.1%}"
    )
