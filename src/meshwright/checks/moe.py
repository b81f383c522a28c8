"""Experts: how they divide over ranks, and what their exchange demands."""

from __future__ import annotations

from collections.abc import Mapping

from meshwright.checks import Case, Mask, check, nearest
from meshwright.errors import divisors
from meshwright.parallel.layout import Layout, Recompute


@check("error", field="layout.ep", id="MLM-ARG-ep_dense")
def ep_needs_experts(case: Case) -> Mask:
    """Expert parallelism divides experts, and {model.name} has none.

    Use ep=1.
    """
    return case.nowhere if case.model.is_moe else case.x.ep > 1


def _experts(case: Case, at: Layout[int]) -> Mapping[str, object]:
    return {"near": nearest(divisors(case.model.num_experts), at.ep)}


@check("error", field="layout.ep", id="MLM-ARG-ep_div", values=_experts)
def ep_divides_experts(case: Case) -> Mask:
    """Every rank of an expert group holds the same number of experts: ep must divide
    {model.num_experts}.

    Use ep={near}.
    """
    experts = case.model.num_experts
    return experts % case.x.ep != 0 if experts else case.nowhere


@check("error", field="layout.sp", id="MLM-MOE-forward_sp")
def moe_with_tp_needs_sp(case: Case) -> Mask:
    """A mixture of experts trains with tp = {tp} only under sequence parallelism, else every rank
    of the tensor group routes the same tokens.

    Use sp=true.
    """
    return (case.x.tp > 1) & (case.x.sp == 0) if case.model.is_moe else case.nowhere


@check("note", field="layout.etp")
def etp_needs_experts(case: Case) -> Mask:
    """Expert tensor parallelism divides experts, and {model.name} has none: it changes nothing.

    Use etp=1.
    """
    return case.nowhere if case.model.is_moe else case.x.etp > 1


@check("error", field="layout.vpp", id="MLM-TC-ov_vpp")
def ep_overlap_needs_interleaving(case: Case) -> Mask:
    """The overlap of expert communication pairs one micro-batch with the next, which a pipeline
    (pp = {pp}) offers only when it interleaves.

    Use vpp=2, or switch the overlap of expert communication off.
    """
    if not case.job.execution.overlap_ep_comm:
        return case.nowhere
    return (case.x.ep > 1) & (case.x.pp > 1) & (case.x.vpp == 1)


@check("error", field="layout.recompute", id="MLM-TC-ov_full")
def ep_overlap_excludes_recomputing_experts(case: Case) -> Mask:
    """The overlap of expert communication excludes full recomputation and that of the moe module;
    recompute = {recompute}.

    Use other modules, or switch the overlap of expert communication off.
    """
    if not case.job.execution.overlap_ep_comm:
        return case.nowhere
    return (case.x.ep > 1) & (case.x.recompute & (Recompute.full | Recompute.moe) != 0)


def _per_rank(case: Case, at: Layout[int]) -> Mapping[str, object]:
    del case
    return {"fewer": at.ep // 2}


@check("note", field="layout.ep", values=_per_rank)
def one_expert_a_rank(case: Case) -> Mask:
    """More expert parallelism means fewer experts a rank. At ep = {ep} each holds one, so every
    imbalance between experts is an imbalance between ranks.

    Watch the load of the experts, or use ep={fewer}.
    """
    return (case.x.ep == case.model.num_experts) & (case.x.ep > 1)


@check("note", field="layout.ep")
def ep_is_for_eight_gpus(case: Case) -> Mask:
    """Guides use expert parallelism from about 8 GPUs on; here are {world_size}.

    Try ep=1 with zero=optim.
    """
    if not case.model.is_moe:
        return case.nowhere
    return (case.x.ep > 1) & (case.x.world_size < 8)


ROWS_OF_A_MATMUL = 256
"""Tokens per expert below which its matmuls are narrower than two tiles of a tensor core kernel."""


def _tokens(case: Case, at: Layout[int]) -> Mapping[str, object]:
    m = case.model
    tokens = at.mbs * case.job.seq_len / at.cp / at.tp * at.ep * at.etp * m.topk / m.num_experts
    return {"tokens": round(tokens)}


@check("warning", field="layout.mbs", values=_tokens)
def experts_get_enough_tokens(case: Case) -> Mask:
    """An expert gets mbs*seq_len/(cp*tp)*ep*etp*topk/experts = {tokens} tokens of a micro-batch on
    average: its matmuls are too narrow to be fast.

    Use a larger mbs or ep, or a smaller cp.
    """
    if not case.model.is_moe:
        return case.nowhere
    x, m = case.x, case.model
    tokens = x.mbs * case.job.seq_len * x.ep * x.etp * m.topk
    return tokens < ROWS_OF_A_MATMUL * m.num_experts * x.cp * x.tp
