"""How the global batch splits into micro-batches."""

from __future__ import annotations

from collections.abc import Mapping

from meshwright.checks import Case, Mask, check, either, nearest
from meshwright.errors import divisors
from meshwright.parallel.layout import Layout


def _batches(case: Case, at: Layout[int]) -> Mapping[str, object]:
    gbs, unit = case.job.gbs, at.mbs * at.dp
    near = sorted({max(unit, gbs // unit * unit), (gbs // unit + 1) * unit})
    sizes = divisors(gbs // at.dp) if gbs % at.dp == 0 else []
    smaller = f"mbs={nearest(sizes, at.mbs)}" if sizes else f"dp={nearest(divisors(gbs), at.dp)}"
    return {"unit": unit, "near": either(near), "smaller": smaller, "rest": gbs % unit}


@check("error", field="job.gbs", id="MLM-NMB-gbs_div", values=_batches)
def batch_splits_into_microbatches(case: Case) -> Mask:
    """The global batch must be a multiple of mbs*dp = {mbs}*{dp} = {unit}; {rest} sequences remain.

    Use gbs={near}, or {smaller}.
    """
    unit = case.x.mbs * case.x.dp
    return (case.job.gbs % unit != 0) & (case.job.gbs >= unit)


@check("error", field="job.gbs", id="MLM-NMB-at_least_one", values=_batches)
def batch_fills_every_replica(case: Case) -> Mask:
    """Every replica needs a micro-batch: the global batch must be at least mbs*dp = {mbs}*{dp} =
    {unit}.

    Use gbs={unit}, a smaller dp (more tp, pp or cp), or {smaller}.
    """
    return case.job.gbs < case.x.mbs * case.x.dp


@check("note", field="job.task", id="MB-CFG-pad_fixed")
def fine_tuning_pads_to_full_length(case: Case) -> Mask:
    """Pipelines and expert groups exchange messages of one size, so with pp = {pp} and ep = {ep}
    every sample is padded to {job.seq_len} tokens.

    Pack samples, or plan time and memory for full length.
    """
    if case.job.task == "pretrain":
        return case.nowhere
    return (case.x.pp > 1) | (case.x.ep > 1)
