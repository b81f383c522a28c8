"""Collectives on local tensors, along dim 0; a group of one returns what it is given.

Each comes in two forms: ``start_*`` returns a ``Pending`` to wait for, so that compute can run
meanwhile, and the plain one waits. Over gloo they are direct messages between the ranks: on
one host these cost half of gloo's own rings, and a fifth for small tensors.
"""

# torch annotates some functions only in part.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportIncompatibleMethodOverride=false
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from meshwright.runtime.groups import Group

WHOLE_BYTES = 65536
"""Up to here an all-reduce sends whole tensors to everybody: one round instead of two."""

Combine = Callable[..., Tensor]
"""``torch.add`` or ``torch.maximum``, which give both ranks of a pair the same bits."""

_Into = Callable[..., Any]


def _newest(name: str, before: str) -> _Into:
    """Return a collective by the name it has since torch 2.13, where the older one warns."""
    return cast("_Into", getattr(dist, name, None) or getattr(dist, before))


_gather_into = _newest("all_gather_single", "all_gather_into_tensor")
_reduce_scatter_into = _newest("reduce_scatter_single", "reduce_scatter_tensor")


class Pending:
    """A collective under way; ``wait`` returns its result, and must be called once."""

    def __init__(self, works: Sequence[Any], finish: Callable[[], Tensor]) -> None:
        self.works, self.finish = works, finish

    def wait(self) -> Tensor:
        """Return the result when it has arrived."""
        for work in self.works:
            work.wait()
        return self.finish()


def all_reduce(x: Tensor, group: Group, op: Any = dist.ReduceOp.SUM) -> Tensor:
    """Reduce ``x`` in place over the group and return it."""
    return x if group.handle is None else start_all_reduce(x, group, op).wait()


def all_gather(x: Tensor, group: Group, out: Tensor | None = None) -> Tensor:
    """Return the ranks' tensors one after the other along dim 0, in ``out`` if given."""
    return x if group.handle is None and out is None else start_all_gather(x, group, out).wait()


def reduce_scatter(x: Tensor, group: Group) -> Tensor:
    """Return this rank's block, along dim 0, of the sum over ranks."""
    return x if group.handle is None else start_reduce_scatter(x, group).wait()


def start_all_reduce(x: Tensor, group: Group, op: Any = dist.ReduceOp.SUM) -> Pending:
    """Begin to reduce ``x``, which is contiguous, in place (sum or maximum)."""
    if group.handle is None:
        return Pending((), lambda: x)
    if not group.direct:
        work = dist.all_reduce(x, op=op, group=group.handle, async_op=True)
        return Pending((work,), lambda: x)
    combine = torch.maximum if op == dist.ReduceOp.MAX else torch.add
    if group.size == 2:
        return _reduce_pair(x, x, group, combine)
    if x.numel() * x.element_size() <= WHOLE_BYTES:
        return _reduce_whole(x, group, combine)
    return _reduce_pieces(x, group, combine)


def start_sum(x: Tensor, group: Group) -> Pending:
    """Begin to add up over ranks into a new tensor."""
    x = x.contiguous()
    if group.direct and group.size == 2:
        return _reduce_pair(x, None, group, torch.add)
    return start_all_reduce(x.clone(), group)


def _reduce_pair(x: Tensor, out: Tensor | None, group: Group, combine: Combine) -> Pending:
    arrived = torch.empty_like(x)
    works = _exchange([x, x], [arrived, arrived], group)
    return Pending(works, lambda: combine(x, arrived, out=out))


def _reduce_whole(x: Tensor, group: Group, combine: Combine) -> Pending:
    arrived = [torch.empty_like(x) for _ in group.ranks]
    works = _exchange([x] * group.size, arrived, group)
    arrived[group.index] = x

    def finish() -> Tensor:
        return x.copy_(_combined(arrived, combine))

    return Pending(works, finish)


def _reduce_pieces(x: Tensor, group: Group, combine: Combine) -> Pending:
    pieces = list(x.view(-1).tensor_split(group.size))
    mine = pieces[group.index]
    arrived = [torch.empty_like(mine) for _ in group.ranks]
    works = _exchange(pieces, arrived, group)
    arrived[group.index] = mine

    def finish() -> Tensor:
        mine.copy_(_combined(arrived, combine))
        for work in _exchange([mine] * group.size, pieces, group):
            work.wait()
        return x

    return Pending(works, finish)


def _combined(parts: list[Tensor], combine: Combine) -> Tensor:
    # In the order of ranks on every rank, so that copies stay equal to the last bit.
    total = parts[0]
    for part in parts[1:]:
        total = combine(total, part)
    return total


def start_all_gather(x: Tensor, group: Group, out: Tensor | None = None) -> Pending:
    """Begin to gather the ranks' tensors along dim 0 into ``out``, or into new memory."""
    if out is None:
        out = x.new_empty((x.shape[0] * group.size, *x.shape[1:]))
    whole = out
    if group.handle is None:
        return Pending((), lambda: whole.copy_(x))
    x = x.contiguous()
    if not group.direct:
        work = _gather_into(whole, x, group=group.handle, async_op=True)
        return Pending((work,), lambda: whole)
    blocks = list(whole.chunk(group.size))
    works = _exchange([x] * group.size, blocks, group)
    if blocks[group.index].data_ptr() != x.data_ptr():
        blocks[group.index].copy_(x)
    return Pending(works, lambda: whole)


def start_reduce_scatter(x: Tensor, group: Group) -> Pending:
    """Begin to sum over ranks and scatter the blocks along dim 0."""
    if group.handle is None:
        return Pending((), lambda: x)
    x = x.contiguous()
    if not group.direct:
        out = x.new_empty((x.shape[0] // group.size, *x.shape[1:]))
        work = _reduce_scatter_into(out, x, group=group.handle, async_op=True)
        return Pending((work,), lambda: out)
    blocks = list(x.chunk(group.size))
    arrived = [torch.empty_like(block) for block in blocks]
    works = _exchange(blocks, arrived, group)
    arrived[group.index] = blocks[group.index]
    return Pending(works, lambda: _combined(arrived, torch.add))


def gather_blocks(x: Tensor, group: Group, out: Tensor) -> Iterator[slice]:
    """Gather along dim 0 into ``out`` and yield the rows that are there, this rank's own first.

    The caller computes with some rows while others travel, and takes all that is yielded.
    """
    if not group.direct:
        start_all_gather(x, group, out).wait()
        yield slice(0, len(out))
        return
    rows, own = len(x), group.index
    works = _exchange([x.contiguous()] * group.size, list(out.split(rows)), group)
    out[own * rows : (own + 1) * rows] = x
    yield slice(own * rows, (own + 1) * rows)
    for index, work in zip(_others(group), works, strict=False):
        work.wait()
        yield slice(index * rows, (index + 1) * rows)
    for work in works[group.size - 1 :]:
        work.wait()


def start_scatter_blocks(whole: Tensor, fill: Callable[[slice], None], group: Group) -> Pending:
    """Begin to sum ``whole`` over ranks and scatter it along dim 0; ``fill`` computes rows of it.

    The rows that others wait for are computed and sent first, this rank's own block last.
    """
    if not group.direct:
        fill(slice(0, len(whole)))
        return start_reduce_scatter(whole, group)
    handle, rows = cast("Any", group.handle), len(whole) // group.size
    blocks = list(whole.split(rows))
    arrived = [torch.empty_like(block) for block in blocks]
    works = [handle.recv([arrived[i]], i, 0) for i in _others(group)]
    for i in _others(group):
        fill(slice(i * rows, (i + 1) * rows))
        works.append(handle.send([blocks[i]], i, 0))
    fill(slice(group.index * rows, (group.index + 1) * rows))
    arrived[group.index] = blocks[group.index]
    return Pending(works, lambda: _combined(arrived, torch.add))


def _others(group: Group) -> list[int]:
    return [i for i in range(group.size) if i != group.index]


def _exchange(sent: Sequence[Tensor], received: Sequence[Tensor], group: Group) -> list[Any]:
    """Send ``sent[i]`` to member i and fill ``received[i]`` from it, this rank's own left out."""
    handle = cast("Any", group.handle)
    others = _others(group)
    works = [handle.recv([received[i]], i, 0) for i in others]
    return works + [handle.send([sent[i]], i, 0) for i in others]


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
