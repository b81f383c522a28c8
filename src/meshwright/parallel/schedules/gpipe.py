"""GPipe: all forwards, then all backwards (Huang et al., arXiv:1811.06965)."""

from __future__ import annotations

from meshwright.parallel.pipeline import Schedule, actions_of, single_chunk

ALIASES = ("fill_drain", "schedulegpipe")


def build(pp: int, vpp: int, num_microbatches: int, microbatch_group_size: int = 0) -> Schedule:
    """Return the schedule F0 ... Fm-1 B0 ... Bm-1 on every rank.

    The backward order is that of PyTorch's ``ScheduleGPipe``. Micro-batches held: m.
    """
    single_chunk("gpipe", vpp)
    places = [(0, i) for i in range(num_microbatches)]
    actions = (*actions_of("F", places), *actions_of("B", places))
    return Schedule("gpipe", pp, vpp, num_microbatches, (actions,) * pp)
