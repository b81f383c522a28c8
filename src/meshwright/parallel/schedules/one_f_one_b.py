"""1F1B: one forward, one backward (PipeDream-Flush; Narayanan et al., arXiv:2104.04473)."""

from __future__ import annotations

from meshwright.parallel.pipeline import (
    Schedule,
    actions_of,
    one_forward_one_backward,
    single_chunk,
)

ALIASES = ("1f1b", "schedule1f1b")


def build(pp: int, vpp: int, num_microbatches: int, microbatch_group_size: int = 0) -> Schedule:
    """Return the schedule in which rank r warms up with pp - 1 - r forwards.

    Micro-batches held: min(m, pp - r). Bubble over work on even stages: (pp - 1) / m.
    """
    single_chunk("one_f_one_b", vpp)
    places = [(0, i) for i in range(num_microbatches)]
    forwards, backwards = actions_of("F", places), actions_of("B", places)
    ranks = tuple(one_forward_one_backward(forwards, backwards, pp - 1 - r) for r in range(pp))
    return Schedule("one_f_one_b", pp, vpp, num_microbatches, ranks)
