"""1F1B: one forward, one backward (PipeDream-Flush; Narayanan et al., arXiv:2104.04473)."""

from __future__ import annotations

import numpy as np

from meshwright.parallel.actions import (
    Path,
    Schedule,
    actions_of,
    one_forward_one_backward,
    own_work_paths,
    single_chunk,
)

ALIASES = ("1f1b", "schedule1f1b")
SPLITS_BACKWARD = False


def build(pp: int, vpp: int, num_microbatches: int, microbatch_group_size: int = 0) -> Schedule:
    """Return the schedule in which rank r warms up with pp - 1 - r forwards.

    Micro-batches held: min(m, pp - r). Bubble over work on even stages: (pp - 1) / m.
    """
    single_chunk("one_f_one_b", vpp)
    places = [(0, i) for i in range(num_microbatches)]
    forwards, backwards = actions_of("F", places), actions_of("B", places)
    ranks = tuple(one_forward_one_backward(forwards, backwards, pp - 1 - r) for r in range(pp))
    return Schedule("one_f_one_b", pp, vpp, num_microbatches, ranks)


def enough_microbatches(
    pp: int, vpp: int, num_microbatches: int, microbatch_group_size: int = 0
) -> int:
    """Return at most pp: the first rank holds no more."""
    return min(num_microbatches, pp)


def critical_paths(pp: int, vpp: int, num_microbatches: int) -> list[Path]:
    """Return every rank's own work, and chains that go from it down to the last and back.

    The forward after the backward of micro-batch i on rank r is that of i + pp - r, so a chain may
    go down and back once every pp - r micro-batches. Going twice (at the start and the end, the
    rank's own work between) and as often as possible are the extremes.
    """
    single_chunk("one_f_one_b", vpp)
    paths = own_work_paths(pp, vpp, num_microbatches)
    for rank in range(pp - 1):
        below = pp - 1 - rank
        paths += _twice(pp, num_microbatches, rank, below)
        if rank < 2:
            paths.append(_as_often_as_possible(pp, num_microbatches, rank, below))
    return paths


def _twice(pp: int, m: int, rank: int, below: int) -> list[Path]:
    fwd = np.ones(pp)
    if m < below + 2:  # the warm-up is too short to return: once, at its start or at its end
        few, all_of_them = fwd.copy(), fwd.copy()
        all_of_them[rank] = m
        hops = 2.0 * (rank + below)
        return [(few, all_of_them, hops), (all_of_them, few, hops)]
    fwd[rank + 1 :] = 2
    fwd[rank] = m - below
    return [(fwd, fwd, 2.0 * rank + 4.0 * below)]


def _as_often_as_possible(pp: int, m: int, rank: int, below: int) -> Path:
    returns, left = divmod(m - 1, below + 1)
    fwd = np.ones(pp)
    fwd[rank:] = returns + 1
    fwd[-1] += left
    return fwd, fwd, 2.0 * rank + 2.0 * below * (returns + 1)
