"""GPipe: all forwards, then all backwards (Huang et al., arXiv:1811.06965)."""

from __future__ import annotations

import numpy as np

from meshwright.parallel.actions import Path, Schedule, actions_of, single_chunk

ALIASES = ("fill_drain", "schedulegpipe")
SPLITS_BACKWARD = False


def build(pp: int, vpp: int, num_microbatches: int, microbatch_group_size: int = 0) -> Schedule:
    """Return the schedule F0 ... Fm-1 B0 ... Bm-1 on every rank.

    The backward order is that of PyTorch's ``ScheduleGPipe``. Micro-batches held: m.
    """
    single_chunk("gpipe", vpp)
    places = [(0, i) for i in range(num_microbatches)]
    actions = (*actions_of("F", places), *actions_of("B", places))
    return Schedule("gpipe", pp, vpp, num_microbatches, (actions,) * pp)


def enough_microbatches(
    pp: int, vpp: int, num_microbatches: int, microbatch_group_size: int = 0
) -> int:
    """Return all of them: GPipe holds every micro-batch."""
    return num_microbatches


def critical_paths(pp: int, vpp: int, num_microbatches: int) -> list[Path]:
    """Return, for every stage, one pass through all others and all of its own work."""
    single_chunk("gpipe", vpp)
    through = np.ones((pp, pp)) + np.eye(pp) * (num_microbatches - 1)
    return [(row, row, 2.0 * (pp - 1)) for row in through]
