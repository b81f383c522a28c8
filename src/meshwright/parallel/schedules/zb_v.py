"""ZB-V: two chunks a rank in a V, no bubble when F = I = W (Qi et al., arXiv:2401.10241, 6)."""

from __future__ import annotations

from itertools import count
from typing import cast

from meshwright.errors import LayoutError
from meshwright.parallel.actions import Action, Kind, Path, Schedule, own_work_paths

ALIASES = ("zbv", "zbvzerobubble", "schedulezbvzerobubble")
SPLITS_BACKWARD = True


def build(pp: int, vpp: int, num_microbatches: int, microbatch_group_size: int = 0) -> Schedule:
    """Return PyTorch's ``ScheduleZBVZeroBubble``: rank r holds stages r and 2*pp - 1 - r.

    With fewer than 2*pp - 1 micro-batches the order is that of 2*pp - 1 without the others.

    Raises ``LayoutError`` unless there are two chunks a rank, and when a group size is given.
    """
    if vpp != 2:
        raise LayoutError("layout.vpp", vpp, "ZB-V runs two chunks per pipeline rank.", "Use 2.")
    if microbatch_group_size:
        rule = "ZB-V has no groups of micro-batches."
        raise LayoutError("layout.microbatch_group_size", microbatch_group_size, rule, "Use 0.")
    ranks = tuple(_rank_actions(pp, rank, num_microbatches) for rank in range(pp))
    return Schedule("zb_v", pp, vpp, num_microbatches, ranks, v_shape=True)


def _rank_actions(pp: int, rank: int, num_microbatches: int) -> tuple[Action, ...]:
    planned = max(2 * pp - 1, num_microbatches)
    above = pp - rank
    first_forwards = 2 * above - 1 + rank
    steps = [
        *["F0"] * (2 * above - 1),
        *["F1", "F0"] * rank,
        *["F1", "I1", "W1"] * above,
        *["F0", "I0", "W0", "F1", "I1", "W1"] * (planned - first_forwards),
        *["I0", "W0", "F1", "I1", "W1"] * (first_forwards - pp),
        *["I0", "I1"] * rank,
        *["I0", "W0"] * above,
        *["W1"] * rank,
        *["W0"] * rank,
    ]
    numbers = {step: count() for step in ("F0", "F1", "I0", "I1", "W0", "W1")}
    actions = (Action(cast("Kind", s[0]), int(s[1]), next(numbers[s])) for s in steps)
    return tuple(action for action in actions if action.microbatch < num_microbatches)


def enough_microbatches(
    pp: int, vpp: int, num_microbatches: int, microbatch_group_size: int = 0
) -> int:
    """Return at most 2*pp: one more than fill the V."""
    return min(num_microbatches, 2 * pp)


def critical_paths(pp: int, vpp: int, num_microbatches: int) -> list[Path]:
    """Return the chain of every rank's own work."""
    return own_work_paths(pp, vpp, num_microbatches, split=True, v_shape=True)
