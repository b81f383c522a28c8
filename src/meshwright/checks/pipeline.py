"""Pipeline parallelism: stages that hold whole layers, and schedules with enough micro-batches."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from meshwright.checks import Case, Mask, check, either, nearest
from meshwright.cost.columns import distinct_index
from meshwright.errors import LayoutError, divisors
from meshwright.parallel.layout import Ints, Layout, Layouts, Pipeline, row
from meshwright.parallel.placement import balanced_layout, place_by


def _interleaves(x: Layouts) -> Mask:
    return x.schedule == Pipeline.interleaved


def _even(x: Layouts) -> Mask:
    """Return where layers are split evenly: no stage has its own number of layers."""
    return (x.first == 0) & (x.last == 0) & (x.pipeline_layout is None)


def _counted(case: Case) -> Ints:
    return case.model.num_layers + case.x.account_for_embedding + case.x.account_for_loss


def _stages(case: Case, at: Layout[int]) -> Mapping[str, object]:
    layers, extra = case.model.num_layers, at.account_for_embedding + at.account_for_loss
    counted, stages = layers + extra, at.pp * at.vpp
    per_rank = counted // at.pp
    text = ""
    if stages <= layers:
        layout = balanced_layout(layers, stages, len(case.model.mtp_layers))
        text = f", or pipeline_layout={layout}"
    return {
        "layers": f"{layers} layers" + (f" + {extra} counted as layers" if extra else ""),
        "per_rank": per_rank,
        "pp_near": nearest(divisors(counted), at.pp),
        "vpp_near": nearest(divisors(per_rank), at.vpp) if per_rank else 1,
        "balanced": text,
    }


@check("error", field="layout.pp", id="MLM-ARG-layers_pp", values=_stages)
def pp_divides_layers(case: Case) -> Mask:
    """Without first, last or a pipeline layout every pipeline rank holds the same number of layers:
    pp must divide {layers}.

    Use pp={pp_near}{balanced}.
    """
    return (_counted(case) % case.x.pp != 0) & _even(case.x)


@check("error", field="layout.vpp", id="MLM-BLOCK-vpp", values=_stages)
def vpp_divides_layers_of_a_rank(case: Case) -> Mask:
    """The {per_rank} layers of a pipeline rank ({layers} over pp = {pp}) must split evenly over vpp
    chunks.

    Use vpp={vpp_near}{balanced}.
    """
    x, counted = case.x, _counted(case)
    return (counted % x.pp == 0) & (counted // x.pp % x.vpp != 0) & _even(x)


def _refusal(case: Case, at: Layout[int]) -> LayoutError | None:
    try:
        place_by(at, case.model.num_layers, len(case.model.mtp_layers))
    except LayoutError as error:
        return error
    return None


def _placement(case: Case, at: Layout[int]) -> Mapping[str, object]:
    error = _refusal(case, at)
    assert error is not None, "asked about a row on which the rule fired"
    return {"of": error.field, "value": error.value, "why": error.rule, "remedy": error.remedy}


@check("error", field="{of}", id="MLM-TC-uneven_div", values=_placement)
def uneven_stages_hold_all_layers(case: Case) -> Mask:
    """Uneven stages (first, last, pipeline_layout) must hold every layer once: {why}

    {remedy}
    """
    x = case.x
    if x.pipeline_layout is None and not (x.first.any() or x.last.any()):
        return case.nowhere
    uneven = ~_even(x)
    columns = (x.pp, x.vpp, x.first, x.last, x.account_for_embedding, x.account_for_loss)
    some, where = distinct_index([*columns, x.schedule, uneven.astype(np.int64)])
    refused = [bool(uneven[i]) and _refusal(case, row(x, int(i))) is not None for i in some]
    return np.array(refused, dtype=np.bool_)[where]


@check("error", field="layout.vpp", id="MLM-ARG-vpp_pp1")
def vpp_needs_pp(case: Case) -> Mask:
    """Virtual stages interleave pipeline ranks, so vpp = {vpp} needs pp > 1.

    Use vpp=1, or pp=2.
    """
    return (case.x.vpp > 1) & (case.x.pp == 1) & (case.x.schedule != Pipeline.zb_v)


@check("error", field="layout.schedule")
def schedule_runs_its_chunks(case: Case) -> Mask:
    """gpipe, 1f1b and zb_h1 run one chunk a rank (vpp=1), zb_v two (vpp=2), interleaved two or
    more; {schedule} was given vpp = {vpp}.

    Use schedule=interleaved for vpp > 1, schedule=1f1b for vpp=1, vpp=2 for zb_v.
    """
    x = case.x
    one = (x.schedule != Pipeline.zb_v) & ~_interleaves(x)
    wrong_v = (x.schedule == Pipeline.zb_v) & (x.vpp != 2)
    return (one & (x.vpp > 1)) | wrong_v | (_interleaves(x) & (x.vpp == 1))


@check("error", field="layout.microbatch_group_size")
def only_interleaving_has_groups(case: Case) -> Mask:
    """Groups of micro-batches exist in the interleaved schedule only, not in {schedule}.

    Leave microbatch_group_size out.
    """
    return (case.x.microbatch_group_size > 0) & ~_interleaves(case.x)


def _group(case: Case) -> Ints:
    return np.where(case.x.microbatch_group_size > 0, case.x.microbatch_group_size, case.x.pp)


def _microbatches(case: Case, at: Layout[int]) -> Mapping[str, object]:
    m = case.job.gbs // (at.mbs * at.dp)
    group = at.microbatch_group_size or at.pp
    near = sorted({max(group, m // group * group), (m // group + 1) * group})
    return {
        "group": group,
        "near": either([n * at.mbs * at.dp for n in near]),
        "unit": at.mbs * at.dp,
        "value": m,
    }


@check("error", field="num_microbatches", id="MLM-SCHED-group_range", values=_microbatches)
def interleaving_has_enough_microbatches(case: Case) -> Mask:
    """Interleaving sends groups of {group} micro-batches through all chunks, with pp = {pp} <=
    group <= micro-batches = gbs/(mbs*dp) = {job.gbs}/{unit} = {num_microbatches}.

    Raise gbs to {near}, lower mbs, dp or pp, or use vpp=1.
    """
    group = _group(case)
    few = (group < case.x.pp) | (group > case.num_microbatches)
    return few & _interleaves(case.x)


@check("error", field="num_microbatches", id="MLM-SCHED-group_rem", values=_microbatches)
def last_group_feeds_every_stage(case: Case) -> Mask:
    """Over groups of {group}, {num_microbatches} micro-batches must leave none, or at least pp =
    {pp}.

    Use gbs={near}, or vpp=1.
    """
    rest = case.num_microbatches % _group(case)
    return (rest > 0) & (rest < case.x.pp) & _interleaves(case.x)


def _rounds(case: Case, at: Layout[int]) -> Mapping[str, object]:
    m = case.job.gbs // (at.mbs * at.dp)
    rounds = max(m // at.pp, 1)
    near = sorted({m // rounds * rounds, (m // rounds + 1) * rounds} - {0})
    return {
        "rounds": rounds,
        "near": either([n * at.mbs * at.dp for n in near]),
        "value": m,
    }


@check("error", field="num_microbatches", values=_rounds)
def zero_bubble_rounds_are_equal(case: Case) -> Mask:
    """zb_h1 sends its {num_microbatches} micro-batches in {rounds} rounds (micro-batches // pp),
    which must have equal sizes.

    Use gbs={near}, or schedule=1f1b.
    """
    m = case.num_microbatches
    rounds = np.maximum(m // np.maximum(case.x.pp, 1), 1)
    return (m % rounds != 0) & (case.x.schedule == Pipeline.zb_h1)


@check("error", field="layout.pp", id="MLM-ARG-vpp_pp2_nooverlap")
def interleaving_two_ranks_needs_overlap(case: Case) -> Mask:
    """Interleaving over pp = 2 ranks needs the overlap of their communication.

    Keep the overlap of pipeline communication on, or use pp=4.
    """
    if case.job.execution.overlap_pp_comm:
        return case.nowhere
    return (case.x.vpp > 1) & (case.x.pp == 2)


def _chunks(case: Case, at: Layout[int]) -> Mapping[str, object]:
    per_rank, rest = divmod(case.model.num_layers, at.pp)
    m = case.job.gbs // (at.mbs * at.dp)
    more = [v for v in divisors(per_rank) if v > at.vpp] if m % at.pp == rest == 0 else []
    remedy = f"Use vpp={either(more[:3])}" if more else f"Use gbs={2 * case.job.gbs}"
    return {
        "bubble_percent": round(100 * (at.pp - 1) / (max(m, 1) * at.vpp)),
        "advice": f"{remedy}, a smaller pp, or zb_h1.",
        "ranks": at.pp - 1,
        "passes": m * at.vpp,
    }


BUBBLE_FRACTION = 0.1
"""Idle time over work from which a plain pipeline is called unwise."""


@check("warning", field="layout.vpp", values=_chunks)
def bubble_is_small(case: Case) -> Mask:
    """A pipeline idles (pp-1)/(m*vpp) = {ranks}/{passes} = {bubble_percent}% of its working time
    while it fills and drains.

    {advice}
    """
    x = case.x
    splits_backward = (x.schedule == Pipeline.zb_h1) | (x.schedule == Pipeline.zb_v)
    return (x.pp - 1 > BUBBLE_FRACTION * case.num_microbatches * x.vpp) & ~splits_backward


@check("warning", field="num_microbatches", id="MLM-SCHED-few_mb", values=_microbatches)
def every_stage_has_a_microbatch(case: Case) -> Mask:
    """With {num_microbatches} micro-batches for pp = {pp} ranks some ranks always wait.

    Use gbs={near}, or a smaller mbs, dp or pp.
    """
    return (case.num_microbatches < case.x.pp) & ~_interleaves(case.x)
