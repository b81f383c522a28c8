"""What data parallelism shards, and sequence parallelism's part in tensor parallelism."""

from __future__ import annotations

from collections.abc import Mapping

from meshwright.checks import Case, Mask, check
from meshwright.parallel.layout import Layout, Pipeline, Zero


@check("error", field="layout.schedule")
def zero_3_keeps_backward_whole(case: Case) -> Mask:
    """Schedules that split the backward pass ({schedule}) need each layer's weights twice, at times
    that full sharding (ZeRO-3) cannot gather them for.

    Use zero=optim, or schedule=1f1b.
    """
    splits = (case.x.schedule == Pipeline.zb_h1) | (case.x.schedule == Pipeline.zb_v)
    return splits & (case.x.zero == Zero.optim_grads_params)


@check("warning", field="layout.sp", id="MLM-ARG-sp_tp1")
def sp_needs_tp(case: Case) -> Mask:
    """Sequence parallelism divides activations over the tensor group; with tp=1 it is switched off.

    Use sp=false, or tp=2.
    """
    return (case.x.sp == 1) & (case.x.tp == 1)


@check("warning", field="layout.sp")
def tp_wants_sp(case: Case) -> Mask:
    """Without sequence parallelism every rank of the tensor group keeps the activations of norms
    and residuals whole: tp = {tp} times as much as with it, for the same traffic.

    Use sp=true.
    """
    if case.model.is_moe:
        return case.nowhere
    return (case.x.sp == 0) & (case.x.tp > 1)


def _states(case: Case, at: Layout[int]) -> Mapping[str, object]:
    p = case.job.precision
    return {
        "ranks": at.dp * at.cp,
        "bytes": f"{p.master_bytes + p.moment_bytes:g}",
        "shard_bytes": f"{(p.master_bytes + p.moment_bytes) / (at.dp * at.cp):.3g}",
    }


@check("warning", field="layout.zero", values=_states)
def replicas_share_the_optimizer(case: Case) -> Mask:
    """Each of {ranks} data parallel ranks holds the whole optimizer, {bytes} bytes a parameter
    instead of {shard_bytes}.

    Use zero=optim on every run with more than one GPU.
    """
    return (case.x.zero == Zero.no_shard) & (case.x.dp * case.x.cp > 1)


@check("note", field="layout.ep")
def expert_optimizer_is_whole(case: Case) -> Mask:
    """With edp = 1 each expert lives on one rank only, so sharding leaves its optimizer whole,
    whatever dp = {dp} is.

    Use a smaller ep or more GPUs where memory is short.
    """
    if not case.model.is_moe:
        return case.nowhere
    return (case.x.edp == 1) & (case.x.zero >= Zero.optim) & (case.x.dp > 1)


@check("warning", field="layout.zero")
def zero_3_with_tp(case: Case) -> Mask:
    """Full sharding gathers each layer's weights over the data ranks while tp = {tp} exchanges its
    activations: two kinds of traffic that want the same wires.

    Use tp=1 with zero=optim_grads_params, or zero=optim with tp={tp}.
    """
    return (case.x.zero == Zero.optim_grads_params) & (case.x.tp > 1)


def _gathers(case: Case, at: Layout[int]) -> Mapping[str, object]:
    del at
    return {"gathers": 2 * int(case.num_microbatches[0])}


@check("warning", field="layout.zero")
def sharded_gradients_reduce_every_microbatch(case: Case) -> Mask:
    """In a pipeline (pp = {pp}) sharded gradients are reduced after each of {num_microbatches}
    micro-batches instead of once a step.

    Use zero=optim, or pp=1.
    """
    return (case.x.zero >= Zero.optim_grads) & (case.x.pp > 1) & (case.x.dp_shard > 1)


@check("note", field="layout.zero")
def sharded_gradients_are_whole_at_first(case: Case) -> Mask:
    """A micro-batch's gradients are made whole, in buckets, before each rank keeps its share: with
    zero=optim_grads the peak can lie above that of zero=optim, where the reduction lags behind.

    Measure the peak of both, or use zero=optim_grads_params.
    """
    return (case.x.zero == Zero.optim_grads) & (case.x.dp_shard > 1)


@check("warning", field="layout.zero", values=_gathers)
def sharded_stages_gather_every_microbatch(case: Case) -> Mask:
    """In a pipeline (pp = {pp}) full sharding gathers the weights of a stage for each forward and
    each backward: {gathers} times a step.

    Use zero=optim, or pp=1.
    """
    return (case.x.zero == Zero.optim_grads_params) & (case.x.pp > 1) & (case.x.dp_shard > 1)
