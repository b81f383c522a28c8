"""Context parallelism: the sequence of one sample spread over ranks, attention exact.

``p2p`` passes K and V round a ring (arXiv:2310.01889) with the zigzag split that balances the
causal triangle: of 2R equal pieces rank r holds piece r and piece 2R-1-r. ``all_gather`` gathers
K and V. ``a2a`` exchanges tokens for heads (Ulysses, arXiv:2309.14509). ``a2a+p2p`` does ``a2a``
inside groups of A ranks and ``p2p`` among them (USP, arXiv:2405.07719); R = CP / A.
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
from meshwright.runtime.attention import attend, block_backward, block_forward, expand_heads, merge
from meshwright.runtime.collectives import all_gather, reduce_scatter
from meshwright.runtime.groups import Group


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
    """Attention over a sequence that is spread over ``inner`` and ``outer`` ranks."""

    comm: CpComm
    inner: Group
    outer: Group

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int) -> Tensor:
        """Return this rank's tokens of causal attention over the whole sequence.

        ``q`` is ``[b, n, s, d]`` with this rank's tokens; V may have fewer features than K.
        """
        if self.inner.size > 1:
            q, k, v = self._gather_tokens(q, k, v)
        if self.outer.size == 1:
            out = attend(q, k, v, scale, window)
        else:
            width = v.shape[-1]
            if width < q.shape[-1]:
                v = torch.nn.functional.pad(v, (0, q.shape[-1] - width))
            function = _gathered if self.comm == CpComm.all_gather else _RingAttention.apply
            out = function(q, k, v, scale, self.outer)[..., :width]
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


class _Accumulator:
    """Partial attention of the query tokens, joined block by block in at least float32."""

    def __init__(self, q: Tensor) -> None:
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        self.out = torch.zeros(q.shape, dtype=wide, device=q.device)
        self.lse = torch.full(q.shape[:3], -math.inf, dtype=wide, device=q.device)

    def add(self, rows: slice, out: Tensor, lse: Tensor) -> None:
        """Join a block that the query tokens of ``rows`` see."""
        self.out[:, :, rows], self.lse[:, :, rows] = merge(
            self.out[:, :, rows], self.lse[:, :, rows], out, lse
        )


def _blocks(mine: int, other: int, tokens: int) -> tuple[slice, slice, bool]:
    """Return which of my query tokens see which keys of ring rank ``other``, and if causally.

    Of the two pieces that each rank holds, mine are ``mine`` and the last but ``mine``.
    """
    half = tokens // 2
    everything = slice(0, tokens)
    if other == mine:
        return everything, everything, True
    if other < mine:
        return everything, slice(0, half), False
    return slice(half, tokens), everything, False


class _Ring:
    """Sends a tensor to the next rank while receiving the previous one's."""

    def __init__(self, group: Group) -> None:
        self.group = group
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
        return arriving, handles


def _wait(handles: list[Any]) -> None:
    for handle in handles:
        handle.wait()


class _RingAttention(Function):
    """Ring attention with double buffering: the next K and V travel while one is worked on."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, group: Group) -> Tensor:
        ring, total = _Ring(group), _Accumulator(q)
        kv = torch.stack([k, v])
        for step in range(group.size):
            other = (group.index - step) % group.size
            arriving, handles = kv, []
            if step < group.size - 1:
                arriving, handles = ring.start(kv)
            rows, columns, causal = _blocks(group.index, other, q.shape[2])
            total.add(
                rows,
                *block_forward(
                    q[:, :, rows],
                    kv[0][:, :, columns],
                    kv[1][:, :, columns],
                    causal=causal,
                    scale=scale,
                ),
            )
            _wait(handles)
            kv = arriving
        out = total.out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, total.lse)
        ctx.scale, ctx.group = scale, group
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, out, lse = ctx.saved_tensors
        group: Group = ctx.group
        ring, grad = _Ring(group), grad.contiguous()
        wide = lse.dtype
        kv = torch.stack([k, v])
        dq = torch.zeros(q.shape, dtype=wide, device=q.device)
        # The gradient of K and V travels one step behind them and arrives home at the end.
        travelling, travel_handles = torch.zeros(kv.shape, dtype=wide, device=q.device), []
        for step in range(group.size):
            other = (group.index - step) % group.size
            arriving, handles = kv, []
            if step < group.size - 1:
                arriving, handles = ring.start(kv)
            rows, columns, causal = _blocks(group.index, other, q.shape[2])
            block_dq, dk, dv = block_backward(
                grad[:, :, rows],
                q[:, :, rows],
                kv[0][:, :, columns],
                kv[1][:, :, columns],
                out[:, :, rows],
                lse[:, :, rows],
                causal=causal,
                scale=ctx.scale,
            )
            dq[:, :, rows] += block_dq
            _wait(travel_handles)
            travelling[0][:, :, columns] += dk
            travelling[1][:, :, columns] += dv
            _wait(handles)
            kv = arriving
            travelling, travel_handles = ring.start(travelling)
        _wait(travel_handles)
        return (
            dq.to(q.dtype),
            travelling[0].to(k.dtype),
            travelling[1].to(v.dtype),
            None,
            None,
        )


class _GatherSequence(Function):
    """Gather ``[b, n, s, d]`` over the ring and put the zigzag pieces in order of position."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        pieces = all_gather(x.unsqueeze(0), group).chunk(2, dim=3)
        return torch.cat([*pieces[0].unbind(0), *reversed(pieces[1].unbind(0))], dim=2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        size = ctx.group.size
        pieces = grad.chunk(2 * size, dim=2)
        whole = torch.stack(
            [torch.cat([pieces[r], pieces[2 * size - 1 - r]], dim=2) for r in range(size)]
        )
        return reduce_scatter(whole, ctx.group).squeeze(0), None


class _BlockAttention(Function):
    """Attention of two pieces of queries to keys in order of position, as causal blocks."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, group: Group) -> Tensor:
        total = _Accumulator(q)
        for rows, columns, causal in _visible(q.shape[2], group):
            block = block_forward(
                q[:, :, rows], k[:, :, columns], v[:, :, columns], causal=causal, scale=scale
            )
            total.add(rows, *block)
        out = total.out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, total.lse)
        ctx.scale, ctx.group = scale, group
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, out, lse = ctx.saved_tensors
        grads = [torch.zeros(x.shape, dtype=lse.dtype, device=x.device) for x in (q, k, v)]
        for rows, columns, causal in _visible(q.shape[2], ctx.group):
            found = block_backward(
                grad[:, :, rows].contiguous(),
                q[:, :, rows],
                k[:, :, columns],
                v[:, :, columns],
                out[:, :, rows],
                lse[:, :, rows],
                causal=causal,
                scale=ctx.scale,
            )
            for whole, part, where in zip(grads, found, (rows, columns, columns), strict=True):
                whole[:, :, where] += part
        dq, dk, dv = grads
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None


def _visible(tokens: int, group: Group) -> list[tuple[slice, slice, bool]]:
    """Return the blocks of queries and keys: what lies before a piece, then the piece itself."""
    half = tokens // 2
    found: list[tuple[slice, slice, bool]] = []
    for part, piece in enumerate((group.index, 2 * group.size - 1 - group.index)):
        rows = slice(part * half, (part + 1) * half)
        if piece:
            found.append((rows, slice(0, piece * half), False))
        found.append((rows, slice(piece * half, (piece + 1) * half), True))
    return found


def _gathered(q: Tensor, k: Tensor, v: Tensor, scale: float, group: Group) -> Tensor:
    k, v = _GatherSequence.apply(k, group), _GatherSequence.apply(v, group)
    return _BlockAttention.apply(q, k, v, scale, group)
