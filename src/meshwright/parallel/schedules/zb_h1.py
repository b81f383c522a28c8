"""ZB-H1: weight gradients fill the bubble, at 1F1B's memory (Qi et al., arXiv:2401.10241).

PyTorch's ``ScheduleInterleavedZeroBubble``, which also runs it on several chunks a rank.
"""

from __future__ import annotations

from meshwright.errors import LayoutError
from meshwright.parallel.actions import (
    Action,
    Path,
    Schedule,
    actions_of,
    one_forward_one_backward,
    own_work_paths,
)

ALIASES = ("zbh1", "zb1p", "interleavedzerobubble", "scheduleinterleavedzerobubble")
SPLITS_BACKWARD = True


def build(pp: int, vpp: int, num_microbatches: int, microbatch_group_size: int = 0) -> Schedule:
    """Return the order in which rank r runs the W of a micro-batch r backwards after its I.

    Rounds of g = m / max(1, m // pp) micro-batches go through all chunks in turn; rank r warms up
    with pp - 1 - r + (vpp - 1) * g forwards.

    Raises ``LayoutError`` unless max(1, m // pp) divides m, and for any other group size.
    """
    m = num_microbatches
    group = round_size(pp, m)
    if microbatch_group_size not in (0, group):
        rule = f"ZB-H1 makes its own groups, of {group} micro-batches."
        raise LayoutError("layout.microbatch_group_size", microbatch_group_size, rule, "Use 0.")
    turns = [range(start, start + group) for start in range(0, m, group)]
    places = [(chunk, i) for turn in turns for chunk in range(vpp) for i in turn]
    backward_places = [(vpp - 1 - chunk, i) for chunk, i in places]
    forwards, inputs = actions_of("F", places), actions_of("I", backward_places)
    weights = actions_of("W", backward_places)
    ranks = tuple(
        _delay_weights(one_forward_one_backward(forwards, inputs, warmup), weights, rank)
        for rank, warmup in enumerate(pp - 1 - r + (vpp - 1) * group for r in range(pp))
    )
    return Schedule("zb_h1", pp, vpp, m, ranks)


def _delay_weights(
    actions: tuple[Action, ...], weights: list[Action], delay: int
) -> tuple[Action, ...]:
    """Put the weights of an earlier micro-batch, ``delay`` backwards ago, after each ``I``."""
    mixed: list[Action] = []
    inputs = 0
    for action in actions:
        mixed.append(action)
        if action.kind == "I":
            inputs += 1
            if inputs > delay:
                mixed.append(weights[inputs - 1 - delay])
    return (*mixed, *weights[max(0, inputs - delay) :])


def round_size(pp: int, num_microbatches: int) -> int:
    """Return how many micro-batches go through all chunks in turn: m / max(1, m // pp)."""
    rounds = max(1, num_microbatches // pp)
    if num_microbatches % rounds:
        near = [num_microbatches // pp * pp, (num_microbatches // pp + 1) * pp]
        rule = f"Its {rounds} rounds (num_microbatches // pp) must have equal sizes."
        remedy = f"Use {near[0]} or {near[1]}."
        raise LayoutError("num_microbatches", num_microbatches, rule, remedy)
    return num_microbatches // rounds


def enough_microbatches(
    pp: int, vpp: int, num_microbatches: int, microbatch_group_size: int = 0
) -> int:
    """Return four rounds: later ones repeat them."""
    group = round_size(pp, num_microbatches)
    return min(num_microbatches, 4 * group)


def critical_paths(pp: int, vpp: int, num_microbatches: int) -> list[Path]:
    """Return the chain of every rank's own work."""
    return own_work_paths(pp, vpp, num_microbatches, split=True)
