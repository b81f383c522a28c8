"""What tensor parallelism divides: heads, key-value heads, feed-forward and Mamba sizes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from meshwright.checks import Case, Mask, check, nearest
from meshwright.describe.model import Holder, Model, Op, OpKind
from meshwright.errors import divisors
from meshwright.parallel.layout import Layout


def legal_tps(model: Model, cp: int = 1) -> list[int]:
    """Return every tp that divides all that tensor parallelism must divide in this model."""
    mamba = math.gcd(*recurrence_heads(model, "scan"))
    delta_net = math.gcd(*recurrence_heads(model, "delta_rule"))
    most = math.gcd(model.num_heads, common_size(model, "tp"), mamba)
    return [
        tp
        for tp in divisors(most or delta_net or 1)
        if delta_net % (tp * cp) == 0 and _kv_heads_fit(model.num_kv_heads, tp)
    ]


def _kv_heads_fit(kv_heads: int, tp: int) -> bool:
    return kv_heads == 0 or kv_heads % tp == 0 or tp % kv_heads == 0


def _nearest_tp(case: Case, at: Layout[int]) -> Mapping[str, object]:
    return {"near": nearest(legal_tps(case.model, at.cp) or [1], at.tp)}


@check("error", field="layout.tp", id="MLM-TC-heads_tp", values=_nearest_tp)
def tp_divides_heads(case: Case) -> Mask:
    """Tensor parallelism gives each rank whole attention heads, so tp must divide
    {model.num_heads}.

    Use tp={near}.
    """
    heads = case.model.num_heads
    return heads % case.x.tp != 0 if heads else case.nowhere


@check("error", field="layout.tp", id="MLM-TC-groups_tp", values=_nearest_tp)
def tp_fits_kv_heads(case: Case) -> Mask:
    """The {model.num_kv_heads} key-value heads must be a multiple of tp, or tp a multiple of them
    (which then holds each head on several ranks).

    Use tp={near}.
    """
    kv, tp = case.model.num_kv_heads, case.x.tp
    if kv in (0, case.model.num_heads):
        return case.nowhere
    return (kv % tp != 0) & (tp % kv != 0)


def row_splits(model: Model, holder: Holder) -> Iterator[Op]:
    """Yield the matmuls whose input features TP (or, for experts, ETP) divides.

    Projections after a mixer are left out: their input is whole heads, which have their own rules.
    """
    for block in model.block_kinds:
        for op in block.ops:
            if op.split == "in" and op.holder == holder and not op.name.endswith("proj"):
                yield op


def _unsplit(model: Model, holder: Holder, degree: int) -> Op:
    return next(op for op in row_splits(model, holder) if op.in_features % degree)


def common_size(model: Model, holder: Holder) -> int:
    """Return the greatest common divisor of all sizes that TP (or ETP) must divide; 0: none."""
    return math.gcd(*(op.in_features for op in row_splits(model, holder)))


def _tp_size(case: Case, at: Layout[int]) -> Mapping[str, object]:
    op = _unsplit(case.model, "tp", at.tp)
    return {"op": op.name, "size": op.in_features, **_nearest_tp(case, at)}


@check("error", field="layout.tp", id="MLM-BUILD-divide", values=_tp_size)
def tp_divides_sizes(case: Case) -> Mask:
    """Tensor parallelism divides the {size} input features of {op}, and {size} / {tp} is not whole.

    Use tp={near}.
    """
    size = common_size(case.model, "tp")
    return size % case.x.tp != 0 if size else case.nowhere


def _etp_size(case: Case, at: Layout[int]) -> Mapping[str, object]:
    op = _unsplit(case.model, "expert", at.etp)
    legal = [d for d in divisors(common_size(case.model, "expert")) if d <= 2 * at.etp]
    return {"op": op.name, "size": op.in_features, "near": nearest(legal, at.etp)}


@check("error", field="layout.etp", id="MLM-BUILD-divide", values=_etp_size)
def etp_divides_expert_size(case: Case) -> Mask:
    """Expert tensor parallelism divides the {size} input features of {op}, and {size} / {etp} is
    not whole.

    Use etp={near}.
    """
    size = common_size(case.model, "expert")
    return size % case.x.etp != 0 if size else case.nowhere


def recurrence_heads(model: Model, name: str) -> tuple[int, int]:
    """Return common divisors of the heads and of the groups (key heads) of the scans ``name``.

    ``scan`` is Mamba's, ``delta_rule`` that of gated delta nets; 0 without such layers.
    """
    ops = [op for block in model.layer_kinds for op in block.ops]
    scans = [op for op in ops if op.kind is OpKind.scan and op.name == name]
    return math.gcd(*(op.num_heads for op in scans)), math.gcd(*(op.num_kv_heads for op in scans))


def _mamba(case: Case, at: Layout[int]) -> Mapping[str, object]:
    heads, groups = recurrence_heads(case.model, "scan")
    return {"heads": heads, "groups": groups, **_nearest_tp(case, at)}


@check("error", field="layout.tp", values=_mamba)
def tp_divides_mamba(case: Case) -> Mask:
    """Mamba layers give each rank whole heads and whole groups, so tp must divide {heads} heads and
    {groups} groups.

    Use tp={near}.
    """
    common = math.gcd(*recurrence_heads(case.model, "scan"))
    return common % case.x.tp != 0 if common else case.nowhere


def _delta_net(case: Case, at: Layout[int]) -> Mapping[str, object]:
    values, keys = recurrence_heads(case.model, "delta_rule")
    return {"values": values, "keys": keys, "ranks": at.tp * at.cp, **_nearest_tp(case, at)}


@check("error", field="layout.tp", id="MLM-TC-gdn_key_tpcp", values=_delta_net)
def tp_and_cp_divide_delta_net(case: Case) -> Mask:
    """Gated delta nets divide their heads by tp and, for context parallelism, by cp: tp*cp =
    {ranks} must divide {keys} key heads and {values} value heads.

    Use tp={near} with cp={cp}, or a smaller cp.
    """
    common = math.gcd(*recurrence_heads(case.model, "delta_rule"))
    return common % (case.x.tp * case.x.cp) != 0 if common else case.nowhere
