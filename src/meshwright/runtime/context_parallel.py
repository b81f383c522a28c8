"""Context parallelism: the sequence of one sample spread over ranks, attention exact.

``p2p`` passes K and V round a ring (arXiv:2310.01889) with the zigzag split that balances the
causal triangle: of 2R equal pieces rank r holds piece r and piece 2R-1-r. ``all_gather`` gathers
K and V. ``a2a`` exchanges tokens for heads (Ulysses, arXiv:2309.14509). ``a2a+p2p`` does ``a2a``
inside groups of A ranks and ``p2p`` among them (USP, arXiv:2405.07719); R = CP / A. A sliding
window is cut by position: blocks outside it are not computed, those it cuts through are masked.
"""

# torch annotates some functions only in part.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportIncompatibleMethodOverride=false
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from meshwright.parallel.layout import CpComm
from meshwright.runtime.attention import (
    Sight,
    attend,
    block_backward,
    block_forward,
    expand_heads,
    merge,
    visible,
)
from meshwright.runtime.collectives import all_gather, reduce_scatter
from meshwright.runtime.groups import Group
from meshwright.runtime.shape import Scores


def positions(seq_len: int, inner: Group, outer: Group) -> Tensor:
    """Return the positions that this rank holds, in its order.

    Zigzag over the outer ring, consecutive inside the all-to-all group.
    """
    piece = torch.arange(seq_len)
    if outer.size > 1:
        pieces = piece.chunk(2 * outer.size)
        piece = torch.cat([pieces[outer.index], pieces[2 * outer.size - 1 - outer.index]])
    return piece.chunk(inner.size)[inner.index]


@dataclass(frozen=True, kw_only=True)
class ContextAttention:
    """Attention over a sequence that is spread over ``inner`` and ``outer`` ranks.

    ``overlap``: the ring's next K and V travel while one block is worked on.
    """

    comm: CpComm
    inner: Group
    outer: Group
    overlap: bool = True

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scores: Scores,
        window: int,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Return this rank's tokens of causal attention over the whole sequence.

        ``q`` is ``[b, n, s, d]`` with this rank's tokens; V may have fewer features than K.
        ``sinks`` ``[n]`` are logits that every query sees beside its keys, and that bring nothing:
        they take a part of the softmax (arXiv:2309.17453; learned ones: gpt-oss, arXiv:2508.10925).
        """
        if self.inner.size > 1:
            q, k, v = self._gather_tokens(q, k, v)
            if sinks is not None:
                sinks = sinks.chunk(self.inner.size)[self.inner.index]
        if self.outer.size == 1 and sinks is None and not scores.cap:
            out = attend(q, k, v, scores.scale, window)
        else:
            gathers = self.comm == CpComm.all_gather and self.outer.size > 1
            function = _GatheredAttention if gathers else _RingAttention
            out = function.apply(q, k, v, sinks, _How(scores, window, self.outer, self.overlap))
        return heads_to_tokens(out, self.inner) if self.inner.size > 1 else out

    def _gather_tokens(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads, kv_heads = q.shape[1], k.shape[1]
        needed = kv_heads * self.inner.size // math.gcd(kv_heads, self.inner.size)
        if needed != kv_heads:
            needed = needed if heads % needed == 0 else heads
            k, v = expand_heads(k, needed), expand_heads(v, needed)
        return (
            tokens_to_heads(q, self.inner),
            tokens_to_heads(k, self.inner),
            tokens_to_heads(v, self.inner),
        )


class _AllToAll(Function):
    """Split dim ``split`` over the group and join what arrives along dim ``join``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, split: int, join: int) -> Tensor:
        ctx.group, ctx.split, ctx.join = group, split, join
        return _exchange(x, group, split, join)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchange(grad, ctx.group, ctx.join, ctx.split), None, None, None


def _exchange(x: Tensor, group: Group, split: int, join: int) -> Tensor:
    send = torch.stack(x.chunk(group.size, dim=split))
    receive = torch.empty_like(send)
    dist.all_to_all_single(receive, send, group=group.handle)
    return torch.cat(receive.unbind(0), dim=join)


def tokens_to_heads(x: Tensor, group: Group) -> Tensor:
    """``[b, n, s/A, d]`` -> ``[b, n/A, s, d]``: give heads away, get the others' tokens."""
    return _AllToAll.apply(x, group, 1, 2)


def heads_to_tokens(x: Tensor, group: Group) -> Tensor:
    """``[b, n/A, s, d]`` -> ``[b, n, s/A, d]``."""
    return _AllToAll.apply(x, group, 2, 1)


@dataclass(frozen=True)
class _How:
    """How queries attend to the sequence of a ring."""

    scores: Scores
    window: int
    ring: Group
    overlap: bool


class _Accumulator:
    """Partial attention of the query tokens, joined block by block in at least float32."""

    def __init__(self, q: Tensor, features: int) -> None:
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        self.out = torch.zeros((*q.shape[:3], features), dtype=wide, device=q.device)
        self.lse = torch.full(q.shape[:3], -math.inf, dtype=wide, device=q.device)

    def add(self, rows: slice, out: Tensor, lse: Tensor) -> None:
        """Join a block that the query tokens of ``rows`` see."""
        self.out[:, :, rows], self.lse[:, :, rows] = merge(
            self.out[:, :, rows], self.lse[:, :, rows], out, lse
        )

    def add_sinks(self, sinks: Tensor | None) -> None:
        """Join logits whose values are 0, one a head."""
        if sinks is not None:
            lse, sink = self.lse, sinks.to(self.lse.dtype)[:, None]
            self.lse = torch.logaddexp(lse, sink)
            self.out *= (lse - self.lse).exp().unsqueeze(-1)


def _sinks_gradient(sinks: Tensor | None, grad: Tensor, out: Tensor, lse: Tensor) -> Tensor | None:
    """Return -sum over queries of P (dO O): a sink's score has weight P and value 0."""
    if sinks is None:
        return None
    weights = (sinks.to(lse.dtype)[:, None] - lse).exp()
    delta = (grad * out).to(lse.dtype).sum(-1)
    return -(weights * delta).sum((0, 2)).to(sinks.dtype)


@dataclass(frozen=True)
class _Block:
    """Query tokens ``rows``, key tokens ``columns``, and what the former see of the latter."""

    rows: slice
    columns: slice
    sight: Sight


def _ring_blocks(q: Tensor, other: int, how: _How) -> list[_Block]:
    """Return which of my query tokens see which keys of ring rank ``other``.

    Of the two pieces that each rank holds, mine are ``mine`` and the last but ``mine``. Own blocks
    start with the diagonal, so that every query sees something first.
    """
    mine, size, tokens = how.ring.index, how.ring.size, q.shape[2]
    half = tokens // 2
    first, second, everything = slice(0, half), slice(half, tokens), slice(0, tokens)
    if how.window and size == 1:
        whole = _windowed(everything, everything, 0, how.window, q)
        return [] if whole is None else [whole]
    if how.window:
        pieces = ((first, mine), (second, 2 * size - 1 - mine))
        theirs = ((first, other), (second, 2 * size - 1 - other))
        pairs = [(a, b) for a in pieces for b in theirs]
        pairs.sort(key=lambda pair: pair[0][1] != pair[1][1])
        found = [
            _windowed(rows, columns, (a - b) * half, how.window, q)
            for (rows, a), (columns, b) in pairs
        ]
        return [block for block in found if block is not None]
    if other == mine:
        return [_Block(everything, everything, Sight(causal=True))]
    if other < mine:
        return [_Block(everything, first, Sight())]
    return [_Block(second, everything, Sight())]


def _windowed(rows: slice, columns: slice, ahead: int, window: int, q: Tensor) -> _Block | None:
    """Return the block of queries that start ``ahead`` tokens after the keys, if they see any."""
    queries, keys = rows.stop - rows.start, columns.stop - columns.start
    nearest, farthest = ahead - (keys - 1), ahead + queries - 1
    if farthest < 0 or nearest >= window:
        return None
    if nearest >= 0 and farthest < window:
        return _Block(rows, columns, Sight())
    if ahead == 0 and farthest < window:
        return _Block(rows, columns, Sight(causal=True))
    return _Block(rows, columns, Sight(seen=visible(queries, keys, ahead, window, q.device)))


class _Ring:
    """Sends a tensor to the next rank while receiving the previous one's."""

    def __init__(self, group: Group, overlap: bool = True) -> None:
        self.group, self.overlap = group, overlap
        self.next = group.ranks[(group.index + 1) % group.size]
        self.previous = group.ranks[group.index - 1]

    def start(self, x: Tensor) -> tuple[Tensor, list[Any]]:
        """Begin the exchange; ``wait`` for the handles before reading the tensor."""
        arriving = torch.empty_like(x)
        handles = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, x, self.next, self.group.handle),
                dist.P2POp(dist.irecv, arriving, self.previous, self.group.handle),
            ]
        )
        if not self.overlap:
            _wait(handles)
            handles = []
        return arriving, handles


def _wait(handles: list[Any]) -> None:
    for handle in handles:
        handle.wait()


class _RingAttention(Function):
    """Ring attention with double buffering: the next K and V travel while one is worked on."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, how: _How
    ) -> Tensor:
        group, total = how.ring, _Accumulator(q, v.shape[-1])
        ring = _Ring(group, how.overlap)
        kv = torch.cat([k, v], dim=-1)
        for step in range(group.size):
            other = (group.index - step) % group.size
            arriving, handles = kv, []
            if step < group.size - 1:
                arriving, handles = ring.start(kv)
            blocks = _ring_blocks(q, other, how)
            _attend_blocks(total, q, *_halves(kv, k), blocks, how.scores)
            _wait(handles)
            kv = arriving
        total.add_sinks(sinks)
        out = total.out.to(q.dtype)
        ctx.save_for_backward(q, k, v, sinks, out, total.lse)
        ctx.how = how
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, out, lse = ctx.saved_tensors
        how: _How = ctx.how
        group, ring = how.ring, _Ring(how.ring, how.overlap)
        grad, features = grad.contiguous(), k.shape[-1]
        kv = torch.cat([k, v], dim=-1)
        dq = torch.zeros(q.shape, dtype=lse.dtype, device=q.device)
        own = torch.zeros(kv.shape, dtype=lse.dtype, device=q.device)
        # The gradient of K and V travels one step behind them and arrives home at the end.
        travelling, travel_handles = torch.zeros_like(own), []
        for step in range(group.size):
            other = (group.index - step) % group.size
            arriving, handles = kv, []
            if step < group.size - 1:
                arriving, handles = ring.start(kv)
            here = _Gradients(dq, torch.zeros_like(own) if step else own, features)
            blocks = _ring_blocks(q, other, how)
            here.add(grad, q, *_halves(kv, k), out, lse, blocks, how.scores)
            _wait(handles)
            kv = arriving
            if step:
                _wait(travel_handles)
                travelling, travel_handles = ring.start(travelling.add_(here.kv))
        _wait(travel_handles)
        own += travelling
        dk, dv = _halves(own, k)
        of_sinks = _sinks_gradient(sinks, grad, out, lse)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), of_sinks, None


def _halves(kv: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Return K and V, which travel side by side."""
    return kv[..., : k.shape[-1]], kv[..., k.shape[-1] :]


def _attend_blocks(
    total: _Accumulator, q: Tensor, k: Tensor, v: Tensor, blocks: list[_Block], scores: Scores
) -> None:
    for block in blocks:
        rows, columns = block.rows, block.columns
        found = block_forward(
            q[:, :, rows], k[:, :, columns], v[:, :, columns], block.sight, scores
        )
        total.add(rows, *found)


@dataclass(frozen=True)
class _Gradients:
    """Sums of gradients, in at least float32: of the queries, and of K and V side by side."""

    q: Tensor
    kv: Tensor
    features: int

    def add(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        blocks: list[_Block],
        scores: Scores,
    ) -> None:
        """Add what some blocks contribute."""
        for block in blocks:
            rows, columns = block.rows, block.columns
            dq, dk, dv = block_backward(
                grad[:, :, rows].contiguous(),
                q[:, :, rows],
                k[:, :, columns],
                v[:, :, columns],
                out[:, :, rows],
                lse[:, :, rows],
                block.sight,
                scores,
            )
            self.q[:, :, rows] += dq
            self.kv[:, :, columns, : self.features] += dk
            self.kv[:, :, columns, self.features :] += dv


def _gather_sequence(x: Tensor, group: Group) -> Tensor:
    """Gather ``[b, n, s, d]`` over the ring and put the zigzag pieces in order of position."""
    pieces = all_gather(x.unsqueeze(0), group).chunk(2, dim=3)
    return torch.cat([*pieces[0].unbind(0), *reversed(pieces[1].unbind(0))], dim=2)


def _scatter_sequence(x: Tensor, group: Group) -> Tensor:
    """Sum over the ring and keep the two pieces of this rank: the mirror of gathering."""
    size = group.size
    pieces = x.chunk(2 * size, dim=2)
    whole = torch.stack(
        [torch.cat([pieces[r], pieces[2 * size - 1 - r]], dim=2) for r in range(size)]
    )
    return reduce_scatter(whole, group).squeeze(0)


class _GatheredAttention(Function):
    """Attention to K and V gathered over the ring; what is kept is this rank's part of them."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, how: _How
    ) -> Tensor:
        total = _Accumulator(q, v.shape[-1])
        kv = _gather_sequence(torch.cat([k, v], dim=-1), how.ring)
        _attend_blocks(total, q, *_halves(kv, k), _gathered_blocks(q, how), how.scores)
        total.add_sinks(sinks)
        out = total.out.to(q.dtype)
        ctx.save_for_backward(q, k, v, sinks, out, total.lse)
        ctx.how = how
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, out, lse = ctx.saved_tensors
        how: _How = ctx.how
        kv = _gather_sequence(torch.cat([k, v], dim=-1), how.ring)
        found = _Gradients(
            torch.zeros(q.shape, dtype=lse.dtype, device=q.device),
            torch.zeros(kv.shape, dtype=lse.dtype, device=q.device),
            k.shape[-1],
        )
        found.add(grad, q, *_halves(kv, k), out, lse, _gathered_blocks(q, how), how.scores)
        own = _scatter_sequence(found.kv.to(k.dtype), how.ring)
        of_sinks = _sinks_gradient(sinks, grad, out, lse)
        return found.q.to(q.dtype), *_halves(own, k), of_sinks, None


def _gathered_blocks(q: Tensor, how: _How) -> list[_Block]:
    """Return the blocks of queries and keys: each of my two pieces, then what lies before it."""
    half, group, window = q.shape[2] // 2, how.ring, how.window
    found: list[_Block] = []
    for part, piece in enumerate((group.index, 2 * group.size - 1 - group.index)):
        rows, start = slice(part * half, (part + 1) * half), piece * half
        if window:
            first = max(0, start - window + 1)
            columns = slice(first, start + half)
            seen = visible(half, half + start - first, start - first, window, q.device)
            found.append(_Block(rows, columns, Sight(seen=seen)))
            continue
        found.append(_Block(rows, slice(start, start + half), Sight(causal=True)))
        if piece:
            found.append(_Block(rows, slice(0, start), Sight()))
    return found
