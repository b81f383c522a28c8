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
from meshwright.errors import MeshwrightError
from meshwright.fit.rows import Run, read_row
from meshwright.fit.summary import TUNED, is_inconsistent
from meshwright.parallel.layout import table

FITTED = (*TUNED, "derived")
"""Qualities of the runs that factors are fitted to."""

SCALE = 0.04
"""Errors well below this count squared, those above by their size: outliers do not decide."""

PRIOR_WIDTH = 0.5
"""How far, as a logarithm, a factor may move for the price of one run that is off by ``SCALE``."""

CLOCK_WIDTH = 0.1
"""The same for the clock of one card: what the power law expects of it is seldom far off."""

STEP = 0.02
"""Relative change of a factor by which derivatives are taken."""

INNER_TURNS = 5
"""How often a linear step is solved again with new weights of the runs."""

LONGEST_MOVE = 0.4
"""How far a factor may go in one linear step, as a logarithm."""

CLOCK_LIMITS = (0.85, 1.15)
"""How far a card's clock may be from what the power law expects of it."""

LIMITS: dict[str, tuple[float, float]] = {
    "matmul_fraction.ampere": (0.5, 0.95),
    "matmul_fraction.hopper": (0.5, 0.85),
    "matmul_fraction.hopper.fp8": (0.5, 0.75),
    "matmul_fraction.blackwell": (0.4, 0.85),
    "matmul_fraction.blackwell.fp8": (0.4, 0.75),
    "matmul_fraction.blackwell.fp4": (0.4, 0.75),
    "attention_fraction.hopper.flash2": (0.2, 0.8),
    "attention_fraction.blackwell.flash2": (0.1, 0.6),
    "grouped_matmul_fraction.hopper": (0.4, 1.05),
    "grouped_matmul_fraction.blackwell": (0.4, 1.05),
    "attention_backward_fraction.ampere.flash2": (0.1, 0.9),
    "attention_backward_fraction.hopper.flash2": (0.1, 0.9),
    "attention_backward_fraction.blackwell.flash2": (0.05, 0.9),
    "clock_fraction.B200-SXM-180GB": CLOCK_LIMITS,
    "clock_fraction.GB300-288GB": CLOCK_LIMITS,
    "clock_fraction.B300-SXM-288GB": CLOCK_LIMITS,
    "clock_fraction.H100-SXM-96GB": CLOCK_LIMITS,
    "clock_fraction.A100-PCIE-80GB": CLOCK_LIMITS,
    "scan_fraction.hopper": (0.01, 0.5),
    "scan_fraction.blackwell": (0.01, 0.5),
    "biased_experts_passes": (2, 60),
    "weight_cast_share": (0.01, 1.0),
    "hbm_fraction": (0.5, 0.95),
    "unfused_traffic": (1, 6),
    "quantise_traffic.fp8": (0.3, 4),
    "quantise_traffic.fp8-cs": (0.3, 4),
    "quantise_traffic.fp8-mx": (0.3, 4),
    "quantise_traffic.nvfp4": (0.3, 4),
    "half_rows.ampere": (5, 1500),
    "half_rows.hopper": (5, 1500),
    "half_rows.blackwell": (5, 1500),
    "grouped_half_rows": (10, 500),
    "imbalance_fraction": (0.001, 0.2),
    "grouped_matmul_fraction.hopper.fp8": (0.4, 1.05),
    "grouped_matmul_fraction.blackwell.fp8": (0.4, 1.05),
    "power_exponent": (0.1, 1),
    "power_boost_fraction": (0.003, 0.08),
    "link_fraction": (0.4, 0.95),
    "pcie_fraction": (0.1, 0.6),
    "network_fraction": (0.4, 0.95),
    "all_to_all_fraction": (0.2, 1),
    "link_all_to_all_fraction": (0.2, 1),
    "dispatch_fraction": (0.2, 1.0),
    "dispatch_token_bytes": (100, 2e4),
    "collective_s": (3e-06, 4e-05),
    "tp_hidden_fraction": (0.1, 0.95),
    "ep_hidden_fraction": (0.2, 0.98),
    "dp_contention_fraction": (0.01, 0.6),
    "cp_hidden_fraction": (0.1, 0.98),
    "kernel_s": (1e-06, 8e-06),
    "host_op_s": (3e-06, 1.2e-05),
    "routing_sync_s": (5e-06, 0.0005),
    "step_overhead_s": (0.002, 0.1),
    "straggler_fraction": (0.0005, 0.03),
}
"""The factors that are fitted, and what each may be physically.

Shares of peak are of the datasheet: Hopper and Blackwell meet their power limit before 85% of it in
16 bit and 75% in FP8 or FP4; a grouped product reaches at most a little more than one matmul. What
is not here is held fixed: ``docs/accuracy.md`` says where it comes from.
"""

_OF_EXPERTS = (
    "grouped_matmul_fraction",
    "grouped_half_rows",
    "biased_experts_passes",
    "imbalance_fraction",
    "all_to_all_fraction",
    "link_all_to_all_fraction",
    "dispatch_fraction",
    "dispatch_token_bytes",
    "ep_hidden_fraction",
    "routing_sync_s",
)
"""Factors that no dense model is priced with."""


@dataclass(frozen=True)
class Measured:
    """A run and its measured step time."""

    run: Run
    step_time_s: float


def measured_runs(
    rows: Sequence[Mapping[str, str]], models: Mapping[str, Any]
) -> tuple[list[Mapping[str, str]], list[Measured]]:
    """Return the rows that factors are fitted to, with their runs: tuned, consistent, readable."""
    kept: list[Mapping[str, str]] = []
    found: list[Measured] = []
    for row in rows:
        time = row.get("step_time_best_s") or ""
        if (row.get("quality") or "") not in FITTED or is_inconsistent(row) or not time:
            continue
        try:
            run = read_row(row, models)
        except MeshwrightError:
            continue
        kept.append(row)
        found.append(Measured(run, float(time)))
    return kept, found


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
    if head in _OF_EXPERTS and not run.model.is_moe:
        return False
    if head == "clock_fraction":
        return gpu.name == key
    if head == "quantise_traffic":
        return run.job.precision.name == key
    return not key or gpu.architecture.lower().startswith(key.partition(".")[0])


def fit(
    runs: Sequence[Measured],
    start: Factors,
    names: Sequence[str],
    *,
    iterations: int = 4,
    progress: Callable[[str], None] = lambda _: None,
    prior_of: Callable[[Factors, str], float] = value_of,
) -> Factors:
    """Return the factors that explain the runs best, those of ``names`` moved within their limits.

    ``prior_of`` says what each factor is pulled to: where it starts, unless another is given.
    ``progress`` is told the loss of each of the ``iterations``. Ref: Gauss-Newton with iteratively
    reweighted squares; line search over a few lengths of each move.
    """
    at = np.log([value_of(start, n) for n in names])
    prior = np.log([prior_of(start, n) for n in names])
    room, damping = room_of(names), damping_of(names)
    factors, errors = start, log_errors(runs, start)
    for turn in range(iterations):
        slopes = slopes_of(runs, factors, names, errors)
        move = np.zeros(len(names))
        for _ in range(INNER_TURNS):
            now = errors + np.einsum("ri,i->r", slopes, move)
            move = move + _linear_move(now, slopes, at + move - prior, room - at - move, damping)
        factors, at, errors = _best_move(runs, start, names, at, move, errors, prior)
        progress(f"{turn + 1}: loss {_loss(errors, at - prior, damping):.1f}, {describe(errors)}")
    return factors


def uninformed(factors: Factors, name: str) -> float:
    """Return what a factor is taken to be where no run informs it.

    A card's clock: 1, what the power law expects. A factor without a key: its default, set
    by hand. Shares by family are taken as fitted: no fold leaves a family without runs.
    """
    head, _, key = name.partition(".")
    if head == "clock_fraction":
        return 1.0
    return value_of(factors, name) if key else value_of(Factors(), name)


def room_of(names: Sequence[str]) -> Floats:
    """Return the logarithms of the limits of factors, [2, names]."""
    return np.log(np.asarray([LIMITS.get(n, CLOCK_LIMITS) for n in names]).T)


def damping_of(names: Sequence[str]) -> Floats:
    """Return the weight of each factor's pull towards its prior."""
    clocks = np.asarray([n.startswith("clock_fraction") for n in names])
    return 1.0 / np.where(clocks, CLOCK_WIDTH, PRIOR_WIDTH) ** 2


def left_out_errors(
    errors: Floats, slopes: Floats, folds: Sequence[str], factors: Factors, names: Sequence[str]
) -> Floats:
    """Return the log errors that runs would have with their own fold left out of the fit.

    For every fold the fit is solved again without its runs, from ``factors`` as fitted and with
    predictions linear in the logarithms of the factors ``names``, within the same limits. What the
    runs that remain do not inform goes back to its prior. Left out: what second derivatives would
    change, and that formulas were chosen with all runs in sight.
    """
    out = errors.copy()
    of_run, damping = np.asarray(folds), damping_of(names)
    at = np.log([value_of(factors, n) for n in names])
    away = at - np.log([uninformed(factors, n) for n in names])
    room = room_of(names) - at
    for fold in dict.fromkeys(folds):
        kept = of_run != fold
        move = np.zeros(slopes.shape[1])
        for _ in range(INNER_TURNS):
            now = errors[kept] + np.einsum("ri,i->r", slopes[kept], move)
            move = move + _linear_move(now, slopes[kept], away + move, room - move, damping)
        out[~kept] = errors[~kept] + np.einsum("ri,i->r", slopes[~kept], move)
    return out


def _linear_move(
    errors: Floats, slopes: Floats, away: Floats, room: Floats, damping: Floats
) -> Floats:
    """Return the step of the factors that fits best while predictions are linear in it.

    ``away``: how far each is from its prior; ``room`` [2, factors]: how far it may go either way.
    A factor that would leave its limits stays at the limit, and the rest are solved again.
    """
    weights = 1.0 / np.sqrt(1.0 + (errors / SCALE) ** 2) / SCALE**2
    left = np.einsum("ri,r,rj->ij", slopes, weights, slopes) + np.diag(damping)
    right = -np.einsum("ri,r,r->i", slopes, weights, errors) - damping * away
    low, high = np.maximum(room[0], -LONGEST_MOVE), np.minimum(room[1], LONGEST_MOVE)
    move, free = np.zeros(len(right)), np.ones(len(right), dtype=np.bool_)
    while free.any():
        rest = right[free] - np.einsum("ij,j->i", left[np.ix_(free, ~free)], move[~free])
        move[free] = _solved(left[np.ix_(free, free)], rest)
        beyond = free & ((move < low) | (move > high))
        if not beyond.any():
            break
        move = np.clip(move, low, high)
        free &= ~beyond
    return move


def _solved(left: Floats, right: Floats) -> Floats:
    return np.asarray(np.linalg.solve(left, right), dtype=np.float64)  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]


def slopes_of(
    runs: Sequence[Measured], factors: Factors, names: Sequence[str], errors: Floats
) -> Floats:
    """Return d log(predicted) / d log(factor) of each run and factor, by forward differences."""
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
) -> tuple[Factors, Floats, Floats]:
    """Return the state after the longest of some fractions of ``move`` that lowers the loss."""
    room, damping = room_of(names), damping_of(names)
    before = _loss(errors, at - prior, damping)
    for fraction in (1.0, 0.5, 0.2):
        there = np.clip(at + fraction * move, room[0], room[1])
        factors = with_values(start, dict(zip(names, np.exp(there).tolist(), strict=True)))
        found = log_errors(runs, factors)
        if _loss(found, there - prior, damping) < before:
            return factors, there, found
    same = with_values(start, dict(zip(names, np.exp(at).tolist(), strict=True)))
    return same, at, errors


def _loss(errors: Floats, away: Floats, damping: Floats) -> float:
    soft = 2.0 * (np.sqrt(1.0 + (errors / SCALE) ** 2) - 1.0)
    return float(np.sum(soft) + np.sum(damping * away**2))


def describe(errors: Floats) -> str:
    """Return median, 90th percentile and bias of errors as text."""
    size = np.abs(np.expm1(errors))
    return (
        f"median {np.median(size):.1%}, p90 {np.quantile(size, 0.9):.1%}, "
        f"bias {np.expm1(np.median(errors)):+.1%}"
    )
