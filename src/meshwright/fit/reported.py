"""What the peak that a row reports is the peak of: its iterations, its rank's share of tokens."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from meshwright.cost.detail import Estimate, estimate
from meshwright.cost.factors import Factors, fitted
from meshwright.cost.memory import spare_fraction
from meshwright.fit.rows import Run


def reported(
    found: Estimate, row: Mapping[str, str], run: Run, factors: Factors | None
) -> Estimate:
    """Return the estimate of the memory that a row reports, by the words of ``peak_memory_kind``.

    Rank 0 is any rank: it gets its mean share of routed tokens, not the most. In the first
    iteration the moments of the optimizer come to be when forward and backward are over, so what
    is reported after it is the larger of both phases without them and the update with them. That
    is when Megatron reports its peak, once; a peak of no named statistic is taken for that one.
    """
    kind = (row.get("peak_memory_kind") or "").lower()
    is_any_rank = run.model.is_moe and re.search(r"\brank[ -]0\b", kind)
    if is_any_rank and not run.job.execution.forced_balance:
        job = replace(run.job, execution=replace(run.job.execution, forced_balance=True))
        found = estimate(run.model, run.cluster, job, run.layout, factors)
    unnamed = row.get("peak_memory_stat") == "unnamed" and "iteration" not in kind
    is_first_report = unnamed and run.job.execution.megatron_head
    if not (is_first_report or re.search(r"\bafter iteration 1\b", kind)):
        return found
    precision = run.job.precision
    moments = precision.moment_bytes / max(precision.moment_bytes + precision.master_bytes, 1.0)
    spare = spare_fraction(run.job, factors or fitted())
    return replace(found, stages=[_first_iteration(s, moments, spare) for s in found.stages])


def _first_iteration(
    stage: Mapping[str, Any], moments_fraction: float, spare: float
) -> dict[str, Any]:
    """Return a stage whose live tensors at the peak are those of the first iteration."""
    states = stage["weights_bytes"] + stage["grads_bytes"] + stage["optimizer_bytes"]
    software = stage["framework_bytes"] - spare * (stage["logits_bytes"] + stage["buffers_bytes"])
    before = stage["peak_bytes"] - stage["framework_bytes"]
    before -= stage["optimizer_bytes"] * moments_fraction
    update = states + (stage["optimizer_peak_bytes"] - states - software) / (1.0 + spare)
    return {**stage, "peak_bytes": stage["framework_bytes"] + max(before, update)}
