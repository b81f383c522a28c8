"""Direct exchanges over gloo give what the library's collectives give. Provenance: oracle."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.distributed as dist

from meshwright.runtime.collectives import (
    Pending,
    gather_blocks,
    start_all_gather,
    start_all_reduce,
    start_reduce_scatter,
    start_scatter_blocks,
)
from meshwright.runtime.groups import Group
from meshwright.runtime.launch import run_ranks

SIZES = (1, 5, 30_000)
"""Rows: a scalar's worth, an odd number, and more than is sent whole to everybody."""


def _everything(rank: int, world: int) -> list[bool]:
    direct = Group(tuple(range(world)), rank, dist.group.WORLD, direct=True)
    library = Group(tuple(range(world)), rank, dist.group.WORLD)
    generator = torch.Generator().manual_seed(rank)
    found: list[bool] = []
    for rows in SIZES:
        x = torch.randint(-1000, 1000, (rows * world, 3), generator=generator).double()
        for op in (dist.ReduceOp.SUM, dist.ReduceOp.MAX):
            pair = [start_all_reduce(x.clone(), group, op) for group in (direct, library)]
            found.append(_equal(pair))
        found.append(_equal([start_all_gather(x[:rows], group) for group in (direct, library)]))
        found.append(_equal([start_reduce_scatter(x, group) for group in (direct, library)]))
    return found


def _equal(pair: list[Pending]) -> bool:
    ours, theirs = (pending.wait() for pending in pair)
    return torch.equal(ours, theirs)


@pytest.mark.parity
@pytest.mark.parametrize("world", [2, 3])
def test_direct_exchanges_equal_the_collectives_of_gloo(world: int) -> None:
    assert all(all(found) for found in run_ranks(world, _everything, world, timeout_s=60.0))


def _sums_of_floats(rank: int) -> list[bytes]:
    group = Group((0, 1, 2), rank, dist.group.WORLD, direct=True)
    generator = torch.Generator().manual_seed(rank)
    return [
        start_all_reduce(torch.randn(rows, generator=generator), group).wait().numpy().tobytes()
        for rows in (100, 100_000)
    ]


@pytest.mark.parity
def test_every_rank_holds_the_same_sum_to_the_last_bit() -> None:
    first, *others = run_ranks(3, _sums_of_floats, timeout_s=60.0)
    assert all(other == first for other in others)


def _copy(to: torch.Tensor, x: torch.Tensor, rows: slice) -> None:
    to[rows] = x[rows]


def _in_blocks(rank: int, world: int, direct: bool) -> list[bool]:
    """Gather, and reduce and scatter, while the caller works on what is there."""
    library = Group(tuple(range(world)), rank, dist.group.WORLD)
    group = Group(library.ranks, rank, library.handle, direct=direct)
    generator = torch.Generator().manual_seed(rank)
    x = torch.randint(-1000, 1000, (5 * world, 3), generator=generator).double()
    out, seen = torch.empty_like(x), torch.zeros_like(x)
    for rows in gather_blocks(x[:5], group, out):
        seen[rows] = out[rows]
    whole = torch.empty_like(x)
    summed = start_scatter_blocks(whole, partial(_copy, whole, x), group).wait()
    return [
        torch.equal(seen, start_all_gather(x[:5], library).wait()),
        torch.equal(summed, start_reduce_scatter(x, library).wait()),
    ]


@pytest.mark.parity
@pytest.mark.parametrize(("world", "direct"), [(2, True), (3, True), (2, False)])
def test_rows_that_are_worked_on_while_others_travel_are_the_right_ones(
    world: int, direct: bool
) -> None:
    assert all(all(found) for found in run_ranks(world, _in_blocks, world, direct, timeout_s=60.0))
