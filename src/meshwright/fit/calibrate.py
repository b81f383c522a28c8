"""A cluster's own factors from runs that were measured on it.

The factors in force are the prior: a few runs move them a little, and what no run informs stays.
Shares of links, time of the host and the clock of the card may be a cluster's own; everything else
is of the software and the architecture, and is fitted on the shipped runs only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from meshwright.cost.columns import Floats
from meshwright.cost.factors import Factors, factors_of
from meshwright.describe.cluster import Cluster, build_cluster
from meshwright.errors import DocumentError, MeshwrightError
from meshwright.fit.fitting import (
    Measured,
    fit,
    log_errors,
    predicted_s,
    value_of,
    with_values,
)
from meshwright.fit.measured import TIME, measured, unusable
from meshwright.fit.rows import read_row
from meshwright.fit.summary import is_inconsistent

OWN = ("clock_fraction", "link_fraction", "network_fraction", "host_op_s")
"""The factors that a cluster may have of its own."""

SMALLEST_CHANGE = 0.002
"""A factor that moves by less, relatively, was not informed and is not written."""

MOST_OFF = 5.0
"""No cluster makes a run so many times slower or faster: another unit or setting is meant."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A calibrated cluster, and what became of every row.

    ``changes``: each factor that moved, before and after. ``before`` and ``after``:
    log(predicted / measured) of the runs that were used. ``left_out``: why a row was not, by its
    place in the file, from 1.
    """

    cluster: Cluster
    changes: Mapping[str, tuple[float, float]]
    before: Floats
    after: Floats
    left_out: Mapping[int, str]


def calibrate(
    cluster: Cluster,
    rows: Sequence[Mapping[str, str]],
    models: Mapping[str, Any],
    *,
    source: str,
    progress: Callable[[str], None] = lambda _: None,
) -> Calibration:
    """Return the cluster with the factors that its runs show; ``source`` is told of each.

    The runs are priced on the cluster's GPU and links, each with its own number of GPUs. Raises
    ``DocumentError`` when no row is a run of this cluster with a step time.
    """
    start = _start(cluster)
    runs: list[Measured] = []
    left_out: dict[int, str] = {}
    for place, row in enumerate(rows, start=1):
        try:
            runs.append(_measured_on(cluster, row, models, start))
        except MeshwrightError as error:
            left_out[place] = str(error)
    if not runs:
        first = next(iter(left_out.values()), "There are no rows.")
        rule = f"At least one row is a run on {cluster.gpu.name} with a step time. First: {first}"
        raise DocumentError("measurements", len(rows), rule, "Give runs of this cluster.")
    names = [n if n != "clock_fraction" else f"{n}.{cluster.gpu.name}" for n in OWN]
    found = fit(runs, start, names, progress=progress)
    changes: dict[str, tuple[float, float]] = {}
    for own, name in zip(OWN, names, strict=True):
        before, after = value_of(start, name), value_of(found, name)
        if abs(after / before - 1.0) >= SMALLEST_CHANGE:
            changes[own] = (before, after)
    fitted = {**cluster.fitted, **{name: float(f"{new:.4g}") for name, (_, new) in changes.items()}}
    told = {f"fitted.{name}": f"{len(runs)} runs: {source}" for name in changes}
    calibrated = replace(cluster, fitted=fitted, sources={**cluster.sources, **told})
    return Calibration(
        cluster=calibrated,
        changes=changes,
        before=log_errors(runs, start),
        after=log_errors(runs, factors_of(calibrated)),
        left_out=left_out,
    )


def _start(cluster: Cluster) -> Factors:
    """Return the factors in force, with a clock for this card: 1 where it has none yet."""
    factors = factors_of(cluster)
    clock = factors.clock_fraction.get(cluster.gpu.name, 1.0)
    return with_values(factors, {f"clock_fraction.{cluster.gpu.name}": clock})


def _measured_on(
    cluster: Cluster, row: Mapping[str, str], models: Mapping[str, Any], factors: Factors
) -> Measured:
    """Return a row's run, priced on the cluster. Raises ``MeshwrightError``."""
    run = read_row(row, models)
    if run.cluster.gpu.name != cluster.gpu.name:
        rule = f"The cluster has {cluster.gpu.name}."
        raise DocumentError("gpu", run.cluster.gpu.name, rule, "Give runs of this cluster.")
    if is_inconsistent(row):
        raise DocumentError("consistency", row["consistency"], "The file calls it wrong.", "")
    step_time_s = measured(row, TIME)
    if step_time_s is None or run.is_module:
        why = unusable(row, TIME) or "A step time is measured."
        raise DocumentError("step_time_best_s", row.get(TIME[0], ""), why, "Give it in seconds.")
    size = run.cluster.num_gpus
    machines = build_cluster(
        cluster.gpu,
        size,
        gpus_per_node=cluster.gpus_per_node if size % cluster.gpus_per_node == 0 else None,
        nearest=True,
    )
    links = {name: getattr(cluster, name) for name in ("intra_node", "inter_node", "host")}
    domain = min(cluster.nvlink_domain, size)
    machines = replace(machines, **links, nvls=cluster.nvls, nvlink_domain=domain)
    found = Measured(replace(run, cluster=machines), step_time_s)
    expected_s = predicted_s(found.run, factors)
    if not 1.0 / MOST_OFF <= step_time_s / expected_s <= MOST_OFF:
        rule = f"A step of this run takes {expected_s:.4g} s, within {MOST_OFF:g} times."
        remedy = "Give it in seconds, and the settings that it was measured with."
        raise DocumentError("step_time_best_s", step_time_s, rule, remedy)
    return found
