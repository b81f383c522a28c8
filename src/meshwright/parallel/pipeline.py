"""What follows from a schedule: that it runs, how long it takes, and what it holds in memory.

An action needs the one before it on its rank, and

    F(stage s, i)     needs  F(s-1, i)
    B or I(s, i)      needs  B or I(s+1, i), the last stage its own F
    W(s, i)           needs  I(s, i)

where i is the micro-batch. ``order`` sorts the actions (or draws the deadlock), ``simulate`` adds
times to that order for any number of rows at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, pairwise
from typing import cast

import numpy as np
from numpy.typing import NDArray

from meshwright.errors import LayoutError
from meshwright.parallel.actions import (
    KINDS,
    Action,
    Floats,
    Kind,
    Schedule,
    build_schedule,
    check_numbers,
    schedule_module,
)
from meshwright.parallel.layout import Ints, Pipeline

MOST_CELLS = 2**22
"""Numbers of one array of a simulation; more rows are simulated in turns."""


@dataclass(frozen=True, eq=False)
class Order:
    """All A actions of a schedule, each after everything it needs, in levels.

    The actions of one level need none of each other, so a whole level is computed at once.
    Arrays of length A, in this order: ``kind`` (place in ``KINDS``), ``stage``, ``microbatch``,
    ``rank`` and ``crosses`` (what it needs comes from another rank). ``needs`` [2, A] are the
    places of the action before it on its rank and of the action of the other stage; A: none.
    ``starts`` are the first places of the levels, and A.
    """

    kind: Ints
    stage: Ints
    microbatch: Ints
    rank: Ints
    needs: Ints
    crosses: NDArray[np.bool_]
    starts: list[int]


@lru_cache(maxsize=64)
def order(schedule: Schedule) -> Order:
    """Return the actions of a schedule sorted by what they need: the proof that it runs.

    Raises ``LayoutError`` with a picture when ranks wait for each other for ever, and when an
    action is missing or doubled.
    """
    rank, kind, stage, microbatch = _columns(schedule)
    stages, m = schedule.pp * schedule.vpp, schedule.num_microbatches
    # A node is (forward | backward | weights, stage, micro-batch); B and I are both "backward".
    phase = np.array([0, 1, 1, 2])[kind]
    node = (phase * stages + stage) * m + microbatch
    _check_complete(schedule, kind, node, stages * m)
    needed = np.select(
        [kind == 0, kind == 3, stage == stages - 1],
        [np.where(stage == 0, -1, node - m), node - stages * m, node - stages * m],
        node + m,
    )
    at = np.full(3 * stages * m, -1)
    at[node] = np.arange(len(node))
    awaits = np.where(needed < 0, -1, at[needed])
    level = _levels(schedule, awaits)
    place = np.argsort(level, kind="stable")
    sorted_at = np.empty(len(place) + 1, dtype=np.int64)
    sorted_at[place] = np.arange(len(place))
    sorted_at[-1] = len(place)
    first_of_rank = np.flatnonzero(np.diff(rank, prepend=-1))
    before = np.arange(-1, len(rank) - 1)
    before[first_of_rank] = -1
    return Order(
        kind=kind[place],
        stage=stage[place],
        microbatch=microbatch[place],
        rank=rank[place],
        needs=sorted_at[np.stack([before, awaits])][:, place],
        crosses=((awaits >= 0) & (rank[awaits] != rank))[place],
        starts=[0, *np.cumsum(np.bincount(level)[1:]).tolist()],
    )


def _columns(schedule: Schedule) -> tuple[Ints, Ints, Ints, Ints]:
    """Return rank, kind, stage and micro-batch of all actions, rank after rank."""
    m, vpp = schedule.num_microbatches, schedule.vpp
    code = {
        Action(cast("Kind", kind), chunk, i): (k * vpp + chunk) * m + i
        for k, kind in enumerate(KINDS)
        for chunk in range(vpp)
        for i in range(m)
    }
    try:
        codes = np.fromiter(map(code.__getitem__, chain(*schedule.ranks)), dtype=np.int64)
    except KeyError as error:
        action = error.args[0]
        rule = f"It has {vpp} chunks and {m} micro-batches, and an action {tuple(action)}."
        raise LayoutError("schedule", schedule.name, rule, "Leave the action out.") from None
    rank = np.repeat(np.arange(schedule.pp), [len(actions) for actions in schedule.ranks])
    stage_at = np.array(
        [[schedule.stage(r, chunk) for chunk in range(vpp)] for r in range(schedule.pp)]
    )
    return rank, codes // (vpp * m), stage_at[rank, codes // m % vpp], codes % m


def _check_complete(schedule: Schedule, kind: Ints, node: Ints, per_phase: int) -> None:
    count = np.bincount(node, minlength=3 * per_phase)
    split = np.bincount(node[kind == 2] - per_phase, minlength=per_phase)
    if (count[: 2 * per_phase] != 1).any() or (count[2 * per_phase :] != split).any():
        rule = "Every stage does F and B (or I and W) of every micro-batch exactly once."
        raise LayoutError("schedule", schedule.name, rule, "Correct the order of its actions.")


def _levels(schedule: Schedule, awaits: Ints) -> list[int]:
    """Return the level of every action: 1 + the highest level among what it needs.

    Walks each rank until it must wait, and goes on with a rank when what it waits for is done.
    """
    needed: list[int] = awaits.tolist()
    ends = np.cumsum([len(actions) for actions in schedule.ranks]).tolist()
    next_at = [0, *ends[:-1]]
    reached = [0] * schedule.pp
    level = [0] * len(needed)
    waiting: dict[int, int] = {}
    ready = list(range(schedule.pp))
    while ready:
        rank = ready.pop()
        at, depth = next_at[rank], reached[rank]
        while at < ends[rank]:
            need = needed[at]
            if need >= 0:
                if not level[need]:
                    waiting[need] = rank
                    break
                depth = max(depth, level[need])
            depth += 1
            level[at] = depth
            if at in waiting:
                ready.append(waiting.pop(at))
            at += 1
        next_at[rank], reached[rank] = at, depth
    if next_at != ends:
        done = [at - end + len(a) for at, end, a in zip(next_at, ends, schedule.ranks, strict=True)]
        raise LayoutError(
            "schedule",
            schedule.name,
            "Its ranks wait for each other for ever:\n" + _picture(schedule, done) + "\n",
            "Put what others wait for first.",
        )
    return level


def _picture(schedule: Schedule, done: list[int]) -> str:
    lines: list[str] = []
    for rank, (actions, at) in enumerate(zip(schedule.ranks, done, strict=True)):
        shown = [schedule.name_of(action) for action in actions[max(0, at - 6) : at + 1]]
        before = ["..."] if at > 6 else []
        stuck = ["<-- stuck here"] if at < len(actions) else []
        lines.append(" ".join([f"rank {rank}:", *before, *shown, *stuck]))
    return "\n".join(lines)


@dataclass(frozen=True, eq=False)
class Simulation:
    """What a schedule costs: N rows, P pipeline ranks.

    ``step_s`` [N] is the time until the last rank is done, ``busy_s`` [N, P] the work of each rank,
    ``rank_end_s`` [N, P] when each is done. ``start_s``, if asked for, holds per rank an array
    [N, actions of the rank] in the order of ``Schedule.ranks``.
    """

    step_s: Floats
    busy_s: Floats
    rank_end_s: Floats
    start_s: tuple[Floats, ...] | None = None


def simulate(
    schedule: Schedule,
    fwd_s: Floats,
    bwd_s: Floats,
    p2p_s: Floats,
    wgrad_s: Floats | None = None,
    *,
    starts: bool = False,
) -> Simulation:
    """Run a schedule on the clock, for N rows at once.

    start(action) = max(end of the action before it on its rank,
                        end of what it needs + p2p_s where that is on another rank)

    ``fwd_s``, ``bwd_s`` [N, S] are the seconds of one micro-batch on each virtual stage in model
    order, ``bwd_s`` the whole backward; ``wgrad_s`` [N, S] is the weight part of it, which
    schedules that split the backward run as ``W``; ``p2p_s`` [N] passes one micro-batch on.
    Row i equals the one-row result bit for bit.

    Left out: contention between transfers, and ranks that wait to send.
    Raises ``LayoutError`` when a split schedule is given no ``wgrad_s``.
    """
    sorted_actions = order(schedule)
    if wgrad_s is None:
        if (sorted_actions.kind > 1).any():
            rule = f"{schedule.name} splits the backward pass."
            raise LayoutError("wgrad_s", None, rule, "Give the seconds of the weight gradients.")
        wgrad_s = bwd_s
    rows = len(fwd_s)
    turn = max(1, MOST_CELLS // (2 * len(sorted_actions.kind)))
    parts = [
        _simulate_rows(
            schedule,
            sorted_actions,
            np.concatenate([fwd_s[i : i + turn], bwd_s[i : i + turn]], axis=1),
            wgrad_s[i : i + turn],
            p2p_s[i : i + turn],
            starts,
        )
        for i in range(0, max(rows, 1), turn)
    ]
    ends = np.concatenate([part[0] for part in parts])
    work = schedule.num_microbatches * (fwd_s + bwd_s)
    busy = np.zeros((rows, schedule.pp))
    for stage, rank in enumerate(schedule.rank_of_stage):
        busy[:, rank] += work[:, stage]
    start_s = tuple(np.concatenate(of_rank) for of_rank in zip(*(p[1] for p in parts), strict=True))
    return Simulation(ends.max(axis=1), busy, ends, start_s if starts else None)


def _simulate_rows(
    schedule: Schedule,
    sorted_actions: Order,
    fwd_bwd_s: Floats,
    wgrad_s: Floats,
    p2p_s: Floats,
    starts: bool,
) -> tuple[Floats, tuple[Floats, ...]]:
    x = sorted_actions
    count, rows = len(x.kind), len(p2p_s)
    stages = schedule.pp * schedule.vpp
    bwd_s = fwd_bwd_s[:, stages:]
    seconds = np.concatenate([fwd_bwd_s, bwd_s - wgrad_s, wgrad_s], axis=1).T
    duration = seconds[x.kind * stages + x.stage]
    # Row a: when action a ends. Row count: time 0. Row count+1+a: when its result is elsewhere.
    clock = np.zeros((2 * count + 1, rows))
    needs = x.needs.copy()
    needs[1] += np.where(x.crosses, count + 1, 0)
    for a, b in pairwise(x.starts):
        ready = clock.take(needs[:, a:b], axis=0)
        end = clock[a:b]
        np.add(np.maximum(ready[0], ready[1]), duration[a:b], out=end)
        np.add(end, p2p_s, out=clock[count + 1 + a : count + 1 + b])
    last = np.zeros(schedule.pp, dtype=np.int64)
    last[x.rank] = np.arange(count)
    ends = clock[last].T
    if not starts:
        return ends, ()
    began = clock[:count] - duration
    return ends, tuple(began[x.rank == rank].T for rank in range(schedule.pp))


@lru_cache(maxsize=4096)
def bound_coefficients(
    kind: Pipeline | str, pp: int, vpp: int, num_microbatches: int
) -> tuple[Floats, Floats, Floats]:
    """Return R chains of actions that wait for each other: fwd [R, S], bwd [R, S], p2p [R].

    max over R of fwd . fwd_s + bwd . bwd_s + p2p * p2p_s is never above ``simulate(...).step_s``,
    whatever the stages cost and however a backward is split. The chains are those of the
    schedule's ``critical_paths``. On even stages without transfers the maximum is the closed form
    (m*vpp + pp - 1) * (fwd_s + bwd_s) of 1F1B and interleaving.

    Left out: ``I`` without its ``W`` in split schedules, and interleaving's group size.
    """
    check_numbers(pp, vpp, num_microbatches, 0)
    paths = schedule_module(kind).critical_paths(pp, vpp, num_microbatches)
    distinct = {(row := np.hstack(path)).tobytes(): row for path in paths}
    rows = np.stack(list(distinct.values()))
    rows.flags.writeable = False
    return rows[:, : pp * vpp], rows[:, pp * vpp : -1], rows[:, -1]


@lru_cache(maxsize=4096)
def held_microbatches(
    kind: Pipeline | str,
    pp: int,
    vpp: int,
    num_microbatches: int,
    microbatch_group_size: int = 0,
) -> tuple[Ints, ...]:
    """Return, per pipeline rank, what is held at once: micro-batches per chunk [K, vpp].

    A micro-batch of a chunk is held from its F until its B, or its W where the backward is split.
    The K rows are the combinations that no other exceeds in every chunk; whatever a micro-batch of
    a chunk weighs, the peak is at one of them. 1F1B holds min(m, pp - r).

    Raises ``LayoutError`` when the schedule does not exist for these numbers.
    """
    check_numbers(pp, vpp, num_microbatches, microbatch_group_size)
    enough = schedule_module(kind).enough_microbatches(
        pp, vpp, num_microbatches, microbatch_group_size
    )
    return _held_by_rank(kind, pp, vpp, enough, microbatch_group_size)


@lru_cache(maxsize=4096)
def _held_by_rank(
    kind: Pipeline | str, pp: int, vpp: int, num_microbatches: int, microbatch_group_size: int
) -> tuple[Ints, ...]:
    schedule = build_schedule(kind, pp, vpp, num_microbatches, microbatch_group_size)
    frees = "W" if schedule_module(kind).SPLITS_BACKWARD else "B"
    distinct = {id(actions): actions for actions in schedule.ranks}
    held = {key: _held(actions, vpp, frees) for key, actions in distinct.items()}
    return tuple(held[id(actions)] for actions in schedule.ranks)


def _held(actions: tuple[Action, ...], vpp: int, frees: str) -> Ints:
    kinds, chunks, _ = zip(*actions, strict=True)
    effect = {"F": 1, frees: -1}
    change = np.array([effect.get(kind, 0) for kind in kinds])
    held = np.cumsum(change[:, None] * (np.array(chunks)[:, None] == np.arange(vpp)), axis=0)
    # More is held after the next F than before it.
    last = (change > 0) & (np.append(change[1:], 0) <= 0)
    rows: list[list[int]] = held[last].tolist()
    held = np.array(sorted({tuple(row) for row in rows}), dtype=np.int64)
    exceeded = (held[:, None] <= held).all(axis=2).sum(axis=1) > 1
    held = held[~exceeded]
    held.flags.writeable = False
    return held
