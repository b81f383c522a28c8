"""What tensor parallelism divides: heads, key-value heads, feed-forward and Mamba sizes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from meshwright.checks import Case, Mask, check, divisors, nearest
from meshwright.describe.model import Holder, Model, Op, OpKind
from meshwright.parallel.layout import Layout


def _heads(case: Case, at: Layout[int]) -> Mapping[str, object]:
    return {"near": nearest(divisors(case.model.num_heads), at.tp)}


@check("error", field="layout.tp", id="MLM-TC-heads_tp", values=_heads)
def tp_divides_heads(case: Case) -> Mask:
    """Tensor parallelism gives each rank whole attention heads, so tp must divide
    {model.num_heads}.

    Use tp={near}.
    """
    heads = case.model.num_heads
    return heads % case.x.tp != 0 if heads else case.nowhere


def _kv_heads(case: Case, at: Layout[int]) -> Mapping[str, object]:
    kv = case.model.num_kv_heads
    legal = [t for t in divisors(case.model.num_heads) if kv % t == 0 or t % kv == 0]
    return {"near": nearest(legal, at.tp)}


@check("error", field="layout.tp", id="MLM-TC-groups_tp", values=_kv_heads)
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
    legal = [d for d in divisors(common_size(case.model, "tp")) if d <= 2 * at.tp]
    return {"op": op.name, "size": op.in_features, "near": nearest(legal, at.tp)}


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
    legal = divisors(math.gcd(heads, groups))
    return {"heads": heads, "groups": groups, "near": nearest(legal, at.tp)}


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
    legal = [d // at.cp for d in divisors(math.gcd(values, keys)) if d % at.cp == 0] or [1]
    return {"values": values, "keys": keys, "near": nearest(legal, at.tp), "ranks": at.tp * at.cp}


@check("error", field="layout.tp", id="MLM-TC-gdn_key_tpcp", values=_delta_net)
def tp_and_cp_divide_delta_net(case: Case) -> Mask:
    """Gated delta nets divide their heads by tp and, for context parallelism, by cp: tp*cp =
    {ranks} must divide {keys} key heads and {values} value heads.

    Use tp={near} with cp={cp}, or a smaller cp.
    """
    common = math.gcd(*recurrence_heads(case.model, "delta_rule"))
    return common % (case.x.tp * case.x.cp) != 0 if common else case.nowhere
