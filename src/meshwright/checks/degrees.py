"""The sizes themselves: whole numbers of at least one that fill the GPUs on both meshes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from meshwright.checks import DEGREES, Case, Mask, check, either, nearest
from meshwright.errors import divisors
from meshwright.parallel.layout import Ints, Layout, minimum_world_size, take, with_columns
from meshwright.parallel.mesh import pipelines_agree


def _smallest(case: Case, at: Layout[int]) -> Mapping[str, object]:
    del case
    name = next(n for n in DEGREES if getattr(at, n) < 1)
    return {"degree": name, "value": getattr(at, name)}


@check("error", field="layout.{degree}", values=_smallest)
def degrees_at_least_one(case: Case) -> Mask:
    """A degree counts ranks, chunks or sequences: it is a whole number of at least 1.

    Use {degree}=1 to switch it off.
    """
    return np.logical_or.reduce([getattr(case.x, name) < 1 for name in DEGREES])


def _worlds(case: Case, at: Layout[int]) -> Mapping[str, object]:
    unit = minimum_world_size(at.tp, at.cp, at.pp, at.ep, at.etp)
    near = sorted({max(unit, at.world_size // unit * unit), (at.world_size // unit + 1) * unit})
    per_stage = at.tp * at.cp * at.dp
    experts = divisors(case.model.num_experts or at.ep)
    fitting = [e for e in experts if per_stage % (e * at.etp) == 0]
    smaller = f", or ep={nearest(fitting, at.ep, 1)} on {at.world_size}" if fitting else ""
    return {
        "value": at.world_size,
        "dense": at.tp * at.cp,
        "expert": at.ep * at.etp,
        "unit": unit,
        "near": either(near),
        "smaller": smaller,
        "per_stage": per_stage,
        "edp_fraction": round(per_stage / (at.ep * at.etp), 3),
    }


@check("error", field="layout.world_size", id="MLM-PS-world_expert", values=_worlds)
def world_holds_experts(case: Case) -> Mask:
    """The expert mesh lies over the same ranks as the dense one, dp*cp*tp = edp*ep*etp, but
    {per_stage} ranks a stage over ep*etp = {expert} give edp = {edp_fraction}. The world must be a
    multiple of pp*lcm(tp*cp, ep*etp) = {pp}*lcm({dense}, {expert}) = {unit}.

    Use {near} GPUs{smaller}.
    """
    x = case.x
    return x.tp * x.cp * x.dp % (x.ep * x.etp) != 0


def _cluster_worlds(case: Case, at: Layout[int]) -> Mapping[str, object]:
    gpus = case.cluster.num_gpus if case.cluster else at.world_size
    unit = at.tp * at.cp * at.pp
    near = sorted({max(unit, gpus // unit * unit), (gpus // unit + 1) * unit})
    return {"unit": unit, "near": either(near), "dp_near": gpus // unit}


@check("error", field="cluster.num_gpus", id="MLM-ARG-world_div", values=_cluster_worlds)
def cluster_holds_whole_replicas(case: Case) -> Mask:
    """The GPUs must be a multiple of tp*pp*cp = {tp}*{pp}*{cp} = {unit}; dp is the quotient.

    Use {near} GPUs, or degrees whose product divides {cluster.num_gpus}.
    """
    if case.cluster is None:
        return case.nowhere
    return case.cluster.num_gpus % (case.x.tp * case.x.pp * case.x.cp) != 0


@check("error", field="layout.dp", values=_cluster_worlds)
def layout_fills_cluster(case: Case) -> Mask:
    """The layout has tp*cp*pp*dp = {tp}*{cp}*{pp}*{dp} = {world_size} ranks, the cluster
    {cluster.num_gpus} GPUs.

    Use dp={dp_near}, or a cluster of {world_size} GPUs.
    """
    if case.cluster is None:
        return case.nowhere
    x, gpus = case.x, case.cluster.num_gpus
    replica = x.tp * x.pp * x.cp
    return (replica * x.dp != gpus) & (gpus % replica == 0)


def leaves_out_an_axis(case: Case) -> Mask:
    """Return where the order string leaves out an axis that is larger than one."""
    named = case.x.order.lower().split("-")
    absent = [name for name in ("tp", "cp", "ep", "dp", "pp") if name not in named]
    larger = [getattr(case.x, name) > 1 for name in absent]
    return np.logical_or.reduce([case.nowhere, *larger])


def _absent_axes(case: Case, at: Layout[int]) -> Mapping[str, object]:
    del case
    named = at.order.lower().split("-")
    absent = [f"{n}={getattr(at, n)}" for n in ("tp", "cp", "ep", "dp", "pp") if n not in named]
    return {"absent": " and ".join(a for a in absent if not a.endswith("=1"))}


@check("error", field="layout.order", id="MLM-PS-order_tokens", values=_absent_axes)
def order_names_every_axis(case: Case) -> Mask:
    """An axis larger than 1 must stand in the order of ranks; {absent} does not.

    Use order=tp-cp-ep-dp-pp.
    """
    return leaves_out_an_axis(case)


def _pipelines(case: Case, at: Layout[int]) -> Mapping[str, object]:
    return {"dense": at.tp * at.cp, "expert": at.ep * int(_expert_tensor(case)[0])}


def _expert_tensor(case: Case) -> Ints:
    """Return etp [N] as Megatron-LM counts it: a dense model that leaves it open has that of tp."""
    x = case.x
    return x.etp if case.model.is_moe else np.where(x.etp > 1, x.etp, x.tp)


@check("error", field="layout.order", id="MLM-PS-pp_last", values=_pipelines)
def meshes_share_pipelines(case: Case) -> Mask:
    """Where pp is not last in the order and pp > 1, both meshes must have the same pipelines: tp*cp
    = {dense} must equal ep*etp = {expert}. A dense model counts etp as tp.

    Use order=tp-cp-ep-dp-pp, or degrees for which they are equal.
    """
    if case.x.order.lower().endswith("pp"):
        return case.nowhere
    x = with_columns(case.x, etp=_expert_tensor(case))
    comparable = np.flatnonzero(~leaves_out_an_axis(case) & (x.edp >= 1))
    fires = case.nowhere.copy()
    fires[comparable] = ~pipelines_agree(take(x, comparable))
    return fires


def _replicas(case: Case, at: Layout[int]) -> Mapping[str, object]:
    del case
    return {"shards": at.dp * at.cp, "near": nearest(divisors(at.dp * at.cp), at.dp_replicate)}


@check("error", field="layout.dp_replicate", id="MLM-PS-inst_dp", values=_replicas)
def dp_replicate_divides_dp(case: Case) -> Mask:
    """Hybrid sharding makes dp_replicate equal groups of the dp*cp = {dp}*{cp} = {shards} ranks.

    Use dp_replicate={near}.
    """
    return case.x.dp * case.x.cp % case.x.dp_replicate != 0


def _expert_replicas(case: Case, at: Layout[int]) -> Mapping[str, object]:
    del case
    common = int(np.gcd(at.edp, at.dp * at.cp))
    return {"near": nearest(divisors(common), at.dp_replicate)}


@check("error", field="layout.dp_replicate", id="MLM-PS-inst_edp", values=_expert_replicas)
def dp_replicate_divides_edp(case: Case) -> Mask:
    """Hybrid sharding makes dp_replicate equal groups of the expert data parallel ranks too, and
    edp = {edp}.

    Use dp_replicate={near}.
    """
    return (case.x.edp % case.x.dp_replicate != 0) & (case.x.dp_replicate > 1)
