"""How the sequence splits: context parallelism, its communication, and sequence parallelism."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from meshwright.checks import Case, Mask, check, either, nearest
from meshwright.checks.divisibility import recurrence_heads
from meshwright.cost.columns import distinct_index
from meshwright.describe.model import OpKind
from meshwright.errors import divisors
from meshwright.parallel.cp_levels import exchanging_ranks, most_square_level
from meshwright.parallel.layout import CpComm, Layout, take

_ATTENTION = "Transformer Engine"


def _sequences(case: Case, at: Layout[int]) -> Mapping[str, object]:
    unit = at.cp * math.lcm(2, at.tp) if at.sp and at.tp > 1 else 2 * at.cp
    low = case.job.seq_len // unit * unit
    legal = [d for d in divisors(case.job.seq_len) if case.job.seq_len % (2 * d) == 0] or [1]
    return {
        "unit": unit,
        "near": either([n for n in (low, low + unit) if n]),
        "cp_near": nearest(legal, at.cp),
        "local": case.job.seq_len // at.cp,
    }


@check("error", field="job.seq_len", id="MLM-ARG-seq_2cp", values=_sequences)
def sequence_splits_over_cp(case: Case) -> Mask:
    """Context parallelism gives each rank an early and a late piece, so the sequence must be a
    multiple of 2*cp = 2*{cp}.

    Pad to {near} tokens (multiples of {unit}), or use cp={cp_near}.
    """
    return (case.job.seq_len % (2 * case.x.cp) != 0) & (case.x.cp > 1)


@check("error", field="job.seq_len", id="MLM-SP-seq_split", values=_sequences)
def sequence_splits_over_tp(case: Case) -> Mask:
    """Sequence parallelism divides the {local} tokens of a rank (seq_len/cp) by tp = {tp}.

    Pad to {near} tokens (multiples of {unit}), or lower tp.
    """
    x = case.x
    uneven = case.job.seq_len % (x.cp * x.tp) != 0
    return uneven & (x.sp == 1) & (x.tp > 1) & (case.job.seq_len % x.cp == 0)


def _exchanged(case: Case, at: Layout[int]) -> Mapping[str, object]:
    heads = max(case.model.num_heads // at.tp, 1)
    kv_heads = max(case.model.num_kv_heads // at.tp, 1)
    return {
        "heads": heads,
        "kv_heads": kv_heads,
        "near": nearest(divisors(math.gcd(heads, kv_heads)), at.cp),
    }


@check("error", field="layout.cp_comm", values=_exchanged, library=_ATTENTION)
def a2a_divides_heads(case: Case) -> Mask:
    """The all-to-all of context parallelism exchanges tokens for heads, so its ranks must divide
    the {heads} heads and {kv_heads} key-value heads that tp = {tp} leaves on a rank.

    Use cp={near}, cp_comm=p2p, or cp_comm=a2a+p2p with an inner level of {near}.
    """
    x = case.x
    exchanging = np.flatnonzero((x.cp_comm >= CpComm.a2a) & (x.cp > 1))
    some, where = distinct_index([c[exchanging] for c in (x.tp, x.cp, x.cp_comm)])
    rows = take(x, exchanging[some])
    ranks = exchanging_ranks(rows.cp, rows.cp_comm, rows.hierarchical_cp)
    heads = np.maximum(case.model.num_heads // rows.tp, 1)
    kv_heads = np.maximum(case.model.num_kv_heads // rows.tp, 1)
    fires = case.nowhere.copy()
    fires[exchanging] = ((heads % ranks != 0) | (kv_heads % ranks != 0))[where]
    return fires


def _levels(case: Case, at: Layout[int]) -> Mapping[str, object]:
    del case
    levels = at.hierarchical_cp or ()
    inner = most_square_level(at.cp)
    return {
        "product": "*".join(map(str, levels)),
        "size": math.prod(levels),
        "near": f"{inner}x{at.cp // inner}",
    }


@check("error", field="layout.hierarchical_cp", id="MLM-ARG-hcp_product", values=_levels)
def levels_make_cp(case: Case) -> Mask:
    """The product of the levels, {product} = {size}, must be cp = {cp}.

    Use hierarchical_cp={near}, or leave it out.
    """
    if case.x.hierarchical_cp is None:
        return case.nowhere
    return case.x.cp != math.prod(case.x.hierarchical_cp)


def _mamba(case: Case, at: Layout[int]) -> Mapping[str, object]:
    heads, groups = recurrence_heads(case.model, "scan")
    local = max(groups // at.tp, 1)
    legal = [d for d in divisors(max(heads // at.tp, 1)) if local % d == 0 or d % local == 0]
    return {"heads": heads, "local": local, "near": nearest(legal, at.cp), "ranks": at.tp * at.cp}


@check("error", field="layout.cp", values=_mamba)
def cp_divides_mamba(case: Case) -> Mask:
    """Mamba layers exchange tokens for heads over the CP group, so tp*cp = {ranks} must divide the
    {heads} heads, and cp and the {local} groups of a rank must divide one the other.

    Use cp={near}.
    """
    heads, groups = recurrence_heads(case.model, "scan")
    if not heads:
        return case.nowhere
    x = case.x
    local = np.maximum(groups // x.tp, 1)
    return ((heads % (x.tp * x.cp) != 0) | ((local % x.cp != 0) & (x.cp % local != 0))) & (x.cp > 1)


@check("error", field="layout.cp_comm", library=_ATTENTION)
def ring_sees_whole_sequences(case: Case) -> Mask:
    """Layers of {model.name} attend within a sliding window, which Transformer Engine's ring
    attention (cp_comm = {cp_comm}) does not support.

    Use cp_comm=all_gather or cp_comm=a2a.
    """
    ops = (op for block in case.model.layer_kinds for op in block.ops)
    if not any(op.kind is OpKind.attention and op.window for op in ops):
        return case.nowhere
    ring = (case.x.cp_comm == CpComm.p2p) | (case.x.cp_comm == CpComm.a2a_p2p)
    return ring & (case.x.cp > 1)


SHORT_TOKENS = 2048
"""Tokens of a sequence on one rank below which splitting it is called needless."""


def _local(case: Case, at: Layout[int]) -> Mapping[str, object]:
    return {"local": case.job.seq_len // at.cp, "near": max(case.job.seq_len // SHORT_TOKENS, 1)}


@check("warning", field="layout.cp", values=_local)
def cp_has_long_sequences(case: Case) -> Mask:
    """Context parallelism leaves {local} of {job.seq_len} tokens on a rank: attention over so few
    does not hide the exchange of keys and values. Guides start it at 8K tokens.

    Use cp={near}.
    """
    return (case.x.cp > 1) & (case.job.seq_len < SHORT_TOKENS * case.x.cp)


@check("note", field="job.seq_len", id="MLM-ARG-maxpos")
def positions_cover_the_sequence(case: Case) -> Mask:
    """{model.name} was configured for {model.max_seq_len} positions.

    Raise max_position_embeddings to the sequence length, and scale its rotary embedding.
    """
    known = case.model.max_seq_len or case.job.seq_len
    return case.nowhere | (case.job.seq_len > known)
