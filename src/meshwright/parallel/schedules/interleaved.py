"""Interleaved 1F1B: several chunks a rank (Narayanan et al., arXiv:2104.04473, section 2.2)."""

from __future__ import annotations

from meshwright.errors import LayoutError
from meshwright.parallel.actions import (
    Path,
    Schedule,
    actions_of,
    one_forward_one_backward,
    own_work_paths,
)

ALIASES = ("interleaved_1f1b", "interleaved1f1b", "scheduleinterleaved1f1b")
SPLITS_BACKWARD = False


def build(pp: int, vpp: int, num_microbatches: int, microbatch_group_size: int = 0) -> Schedule:
    """Return Megatron-LM's order: groups of g micro-batches go through all chunks in turn.

    Rank r warms up with 2 * (pp - 1 - r) + (vpp - 1) * g forwards; g = pp unless given.
    Bubble over work on even stages: (pp - 1) / (m * vpp).

    Raises ``LayoutError`` unless pp > 1, vpp > 1, pp <= g <= m, and m mod g is 0 or at least pp.
    """
    m, group = num_microbatches, microbatch_group_size or pp
    _check(pp, vpp, m, group)
    starts = range(0, m, group)
    turns = [range(start, min(start + group, m)) for start in starts]
    places = [(chunk, i) for turn in turns for chunk in range(vpp) for i in turn]
    forwards = actions_of("F", places)
    backwards = actions_of("B", [(vpp - 1 - chunk, i) for chunk, i in places])
    warmups = [2 * (pp - 1 - r) + (vpp - 1) * group for r in range(pp)]
    ranks = tuple(one_forward_one_backward(forwards, backwards, warmup) for warmup in warmups)
    return Schedule("interleaved", pp, vpp, m, ranks)


def _check(pp: int, vpp: int, m: int, group: int) -> None:
    if vpp < 2:
        rule = "Interleaving needs at least two chunks per pipeline rank."
        raise LayoutError("layout.vpp", vpp, rule, "Use vpp=2, or schedule=1f1b.")
    if pp < 2:
        rule = "Interleaving needs pipeline parallelism (pp > 1)."
        raise LayoutError("layout.pp", pp, rule, "Use pp=2, or vpp=1.")
    if m < pp:
        rule = f"Interleaving needs at least pp = {pp} micro-batches."
        raise LayoutError("num_microbatches", m, rule, f"Use {pp}, or vpp=1.")
    if not pp <= group <= m:
        rule = f"A group has between pp = {pp} and {m} (all) micro-batches."
        remedy = f"Use {pp if group < pp else m}."
        raise LayoutError("layout.microbatch_group_size", group, rule, remedy)
    if 0 < m % group < pp:
        low, high = m // group * group, (m // group + 1) * group
        rule = f"Over groups of {group} it must leave 0, or at least pp = {pp}, micro-batches."
        raise LayoutError("num_microbatches", m, rule, f"Use {low} or {high}.")


def enough_microbatches(
    pp: int, vpp: int, num_microbatches: int, microbatch_group_size: int = 0
) -> int:
    """Return four groups and what the last one has: later groups repeat the fourth."""
    group = microbatch_group_size or pp
    return min(num_microbatches, 4 * group + num_microbatches % group)


def critical_paths(pp: int, vpp: int, num_microbatches: int) -> list[Path]:
    """Return the chain of every rank's own work."""
    return own_work_paths(pp, vpp, num_microbatches)
