"""Where groups lie: inside an NVLink domain (or a server), or across the network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np

from meshwright import units
from meshwright.checks import Case, Mask, check, nearest
from meshwright.checks.degrees import leaves_out_an_axis
from meshwright.checks.divisibility import common_size, legal_tps
from meshwright.describe.cluster import Cluster
from meshwright.errors import divisors
from meshwright.parallel.layout import CpComm, Ints, Layout, take
from meshwright.parallel.mesh import blocks_spanned_columns, dense_mesh, expert_mesh

Group = Literal["tp", "cp", "ep", "etp"]


def _spanned(case: Case, name: Group) -> Ints:
    """Return [N]: how many fast domains the widest group of an axis touches; 0 without a cluster.

    Rows that the degree rules refuse count 0.
    """
    found = np.zeros(len(case.x.tp), dtype=np.int64)
    if case.cluster is None:
        return found
    x = case.x
    known = np.flatnonzero((getattr(x, name) > 1) & (x.edp >= 1) & ~leaves_out_an_axis(case))
    rows = take(x, known)
    mesh = expert_mesh(rows) if name in ("ep", "etp") else dense_mesh(rows)
    axis = mesh.axis(name)
    found[known] = blocks_spanned_columns(axis.size, axis.stride, case.cluster.scale_up_domain)
    return found


def _leaves(case: Case, name: Group) -> Mask:
    return _spanned(case, name) > 1 if case.cluster else case.nowhere


def _speeds(cluster: Cluster) -> dict[str, object]:
    inside, outside = cluster.intra_node.bytes_per_s, cluster.inter_node.bytes_per_s
    return {
        "domain": cluster.scale_up_domain,
        "inside": units.format_bytes_per_s(inside),
        "outside": units.format_bytes_per_s(outside),
    }


def _group(case: Case, at: Layout[int], name: Group) -> Mapping[str, object]:
    assert case.cluster is not None, "the rule fired"
    inside = divisors(case.cluster.scale_up_domain)
    legal = [d for d in _legal(case, at, name) if d in inside and d < getattr(at, name)] or [1]
    spanned = int(_spanned(case, name)[0])
    return {**_speeds(case.cluster), "spanned": spanned, "near": nearest(legal, getattr(at, name))}


def _legal(case: Case, at: Layout[int], name: Group) -> list[int]:
    match name:
        case "tp":
            return legal_tps(case.model, at.cp)
        case "ep":
            return divisors(case.model.num_experts)
        case "etp":
            return divisors(common_size(case.model, "expert"))
        case "cp":
            return divisors(at.cp)


def _tensor_group(case: Case, at: Layout[int]) -> Mapping[str, object]:
    return _group(case, at, "tp")


@check("warning", field="layout.tp", values=_tensor_group)
def tp_stays_inside_the_domain(case: Case) -> Mask:
    """A tensor group touches {spanned} fast domains of {domain} GPUs, so the exchanges of every
    layer, which nothing hides, run at {outside} a GPU instead of {inside}. TP across nodes is
    almost always a loss.

    Use tp={near} and more pp or dp.
    """
    return _leaves(case, "tp")


def _expert_tensor_group(case: Case, at: Layout[int]) -> Mapping[str, object]:
    return _group(case, at, "etp")


@check("warning", field="layout.etp", values=_expert_tensor_group)
def etp_stays_inside_the_domain(case: Case) -> Mask:
    """An expert tensor group touches {spanned} fast domains of {domain} GPUs, so every expert layer
    gathers its tokens at {outside} a GPU instead of {inside}.

    Use etp={near}.
    """
    return _leaves(case, "etp")


def _expert_group(case: Case, at: Layout[int]) -> Mapping[str, object]:
    dispatcher = case.job.execution.dispatcher
    return {**_group(case, at, "ep"), "dispatcher": dispatcher, "size": at.ep * at.etp}


@check("warning", field="layout.ep", values=_expert_group)
def ep_stays_inside_the_domain(case: Case) -> Mask:
    """An expert group (ep*etp = {size}) touches {spanned} fast domains of {domain} GPUs. Two
    exchanges a layer each way then run at {outside} a GPU instead of {inside}, and {dispatcher}
    sends a token once for each of its experts.

    Use ep={near}, or a dispatcher that sends a token once a node (deepep, hybridep).
    """
    if case.job.execution.dispatcher in ("deepep", "hybridep"):
        return case.nowhere
    return _leaves(case, "ep")


def _context_group(case: Case, at: Layout[int]) -> Mapping[str, object]:
    return _group(case, at, "cp")


@check("warning", field="layout.cp_comm", values=_context_group)
def a2a_stays_inside_the_domain(case: Case) -> Mask:
    """The all-to-all of context parallelism touches {spanned} fast domains of {domain} GPUs and
    cannot overlap with attention as a ring does: it runs at {outside} a GPU instead of {inside}.

    Use cp_comm=a2a+p2p with an inner level that stays inside, or cp_comm=p2p.
    """
    return _leaves(case, "cp") & (case.x.cp_comm == CpComm.a2a)


def _formats(case: Case, at: Layout[int]) -> Mapping[str, object]:
    del at
    known = sorted(case.cluster.gpu.peak_flops_per_s) if case.cluster else []
    return {"known": ", ".join(known), "value": case.job.precision.name}


@check("error", field="job.precision", values=_formats)
def gpu_has_the_format(case: Case) -> Mask:
    """{cluster.gpu.name} multiplies in {known}, not in {job.precision.matmul}; training would stop
    there.

    Use precision bf16, or other GPUs.
    """
    if case.cluster is None:
        return case.nowhere
    peaks = case.cluster.gpu.peak_flops_per_s
    return case.nowhere | (case.job.precision.matmul not in peaks)
