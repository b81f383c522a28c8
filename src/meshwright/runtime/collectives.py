"""Collectives on local tensors, along dim 0; a group of one returns what it is given."""

# torch annotates some functions only in part.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportIncompatibleMethodOverride=false
from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch.distributed as dist
from torch import Tensor

from meshwright.runtime.groups import Group

_Into = Callable[..., Any]


def _newest(name: str, before: str) -> _Into:
    """Return a collective by the name it has since torch 2.13, where the older one warns."""
    return cast("_Into", getattr(dist, name, None) or getattr(dist, before))


_gather_into = _newest("all_gather_single", "all_gather_into_tensor")
_reduce_scatter_into = _newest("reduce_scatter_single", "reduce_scatter_tensor")


def all_reduce(x: Tensor, group: Group, op: Any = dist.ReduceOp.SUM) -> Tensor:
    """Reduce ``x`` in place over the group and return it."""
    if group.handle is not None:
        dist.all_reduce(x, op=op, group=group.handle)
    return x


def all_gather(x: Tensor, group: Group, out: Tensor | None = None) -> Tensor:
    """Return the ranks' tensors one after the other along dim 0, in ``out`` if given."""
    if group.handle is None and out is None:
        return x
    if out is None:
        out = x.new_empty((x.shape[0] * group.size, *x.shape[1:]))
    if group.handle is None:
        return out.copy_(x)
    _gather_into(out, x.contiguous(), group=group.handle)
    return out


def reduce_scatter(x: Tensor, group: Group) -> Tensor:
    """Return this rank's block, along dim 0, of the sum over ranks."""
    if group.handle is None:
        return x
    out = x.new_empty((x.shape[0] // group.size, *x.shape[1:]))
    _reduce_scatter_into(out, x.contiguous(), group=group.handle)
    return out


def own_block(x: Tensor, group: Group) -> Tensor:
    """Return this rank's block of ``x`` along dim 0."""
    rows = x.shape[0] // group.size
    return x[group.index * rows : (group.index + 1) * rows]


def send(x: Tensor, to: int, group: Group | None = None) -> None:
    """Send to a rank of the world, and wait until it has left."""
    _wait(dist.isend(x.contiguous(), to, group=None if group is None else group.handle))


def receive(out: Tensor, source: int, group: Group | None = None) -> Tensor:
    """Fill ``out`` with what a rank of the world sends."""
    _wait(dist.irecv(out, source, group=None if group is None else group.handle))
    return out


def _wait(work: dist.Work | None) -> None:
    # A blocking gloo send is a rendezvous even for one element, so only the immediate ones serve.
    if work is not None:
        work.wait()
