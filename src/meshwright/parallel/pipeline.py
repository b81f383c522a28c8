"""Pipeline schedules: what each rank does in which order, whether that runs, and how long it takes.

A schedule gives every pipeline rank an ordered list of actions. ``F`` is a forward pass, ``B`` a
whole backward pass; schedules that split the backward write ``I`` (gradient of the input) and ``W``
(gradient of the weights) for ``B``. An action needs the one before it on its rank, and

    F(stage s, i)     needs  F(s-1, i)
    B or I(s, i)      needs  B or I(s+1, i), the last stage its own F
    W(s, i)           needs  I(s, i)

where i is the micro-batch. ``order`` sorts the actions (or draws the deadlock), ``simulate`` adds
times to that order for any number of rows at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import import_module
from itertools import chain
from typing import Literal, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from meshwright import registry
from meshwright.errors import LayoutError
from meshwright.parallel.layout import Ints, Pipeline, whole_number
from meshwright.parallel.placement import stage_ranks

Floats = NDArray[np.float64]
Kind = Literal["F", "B", "I", "W"]
KINDS = "FBIW"

SCHEDULES = "meshwright.parallel.schedules"
MOST_ACTIONS = 2**24
"""The largest schedule that is written out action by action."""
MOST_CELLS = 2**22
"""Numbers of one array of a simulation; more rows are simulated in turns."""


class Action(NamedTuple):
    """One step of one pipeline rank: what, on which of its chunks, for which micro-batch."""

    kind: Kind
    chunk: int
    microbatch: int


@dataclass(frozen=True, eq=False)
class Schedule:
    """The ordered actions of every pipeline rank.

    ``v_shape``: odd chunks run from the last rank back to the first.
    """

    name: str
    pp: int
    vpp: int
    num_microbatches: int
    ranks: tuple[tuple[Action, ...], ...]
    v_shape: bool = False

    @property
    def rank_of_stage(self) -> tuple[int, ...]:
        """The pipeline rank of every virtual stage, in model order."""
        return stage_ranks(self.pp, self.vpp, self.v_shape)

    def stage(self, rank: int, chunk: int) -> int:
        """Return the virtual stage, in model order, that is chunk ``chunk`` of ``rank``."""
        place = self.pp - 1 - rank if self.v_shape and chunk % 2 else rank
        return chunk * self.pp + place

    def text(self) -> list[str]:
        """Return one line per rank: ``F0 F1 B0``, with chunks ``F1.0`` (chunk.micro-batch)."""
        return [" ".join(self.name_of(action) for action in actions) for actions in self.ranks]

    def name_of(self, action: Action) -> str:
        """Return the text form of one action."""
        chunk = f"{action.chunk}." if self.vpp > 1 else ""
        return f"{action.kind}{chunk}{action.microbatch}"


def actions_of(kind: Kind, places: Sequence[tuple[int, int]]) -> list[Action]:
    """Return the actions of one kind at ``(chunk, microbatch)`` places."""
    return [Action(kind, chunk, microbatch) for chunk, microbatch in places]


def one_forward_one_backward(
    forwards: Sequence[Action], backwards: Sequence[Action], warmup: int
) -> tuple[Action, ...]:
    """Return ``warmup`` forwards, then a forward and a backward in turns, then what is left."""
    warmup = min(warmup, len(forwards))
    turns = chain.from_iterable(zip(forwards[warmup:], backwards, strict=False))
    return (*forwards[:warmup], *turns, *backwards[len(forwards) - warmup :])


def single_chunk(name: str, vpp: int) -> None:
    """Raise ``LayoutError`` unless there is one chunk a rank."""
    if vpp != 1:
        rule = f"{name} runs one chunk per pipeline rank."
        raise LayoutError("layout.vpp", vpp, rule, "Use vpp=1, or schedule=interleaved.")


@cache
def aliases() -> dict[str, str]:
    """Return the other spellings of the schedules, from the ``ALIASES`` of their files."""
    found: dict[str, str] = {}
    for name in registry.names(SCHEDULES):
        spellings = cast("Sequence[str]", import_module(f"{SCHEDULES}.{name}").ALIASES)
        found |= {spelling: name for spelling in spellings}
    return found


def schedule_name(kind: Pipeline | int | str) -> str:
    """Return the registered name of a schedule. Raises ``MeshwrightError`` when unknown."""
    if not isinstance(kind, str):
        return Pipeline(kind).name
    name = kind.lower().replace("-", "_")
    registry.load(SCHEDULES, name, field="layout.schedule", aliases=aliases())
    return aliases().get(name, name)


def build_schedule(
    kind: Pipeline | str,
    pp: int,
    vpp: int,
    num_microbatches: int,
    microbatch_group_size: int = 0,
) -> Schedule:
    """Return the schedule called ``kind``. ``microbatch_group_size`` 0 means ``pp``.

    Raises ``LayoutError`` when the schedule does not exist for these numbers.
    """
    pp, vpp = whole_number("layout.pp", pp), whole_number("layout.vpp", vpp)
    num_microbatches = whole_number("num_microbatches", num_microbatches)
    group = whole_number("layout.microbatch_group_size", microbatch_group_size, low=0)
    return _build(schedule_name(kind), pp, vpp, num_microbatches, group)


@lru_cache(maxsize=256)
def _build(name: str, pp: int, vpp: int, num_microbatches: int, group: int) -> Schedule:
    if pp * vpp * num_microbatches * 2 > MOST_ACTIONS:
        most = max(1, MOST_ACTIONS // (2 * pp * vpp))
        rule = f"Schedules are written out up to {MOST_ACTIONS} actions."
        raise LayoutError("num_microbatches", num_microbatches, rule, f"Use at most {most}.")
    build = cast("Callable[..., Schedule]", import_module(f"{SCHEDULES}.{name}").build)
    return build(pp, vpp, num_microbatches, group)


def schedule_order(
    pp: int,
    num_microbatches: int,
    vpp: int | None = 1,
    name: str | None = None,
    microbatch_group_size: int | None = None,
) -> list[str]:
    """Return, per pipeline rank, the order of its actions as text.

    ``F0 F1 B0`` with one chunk a rank, ``F<chunk>.<microbatch>`` with more. ``name`` left out means
    interleaved when ``vpp`` > 1, else 1F1B: what Megatron-LM runs.

    Raises ``LayoutError`` when the schedule does not exist for these numbers.
    """
    vpp = 1 if vpp is None else whole_number("layout.vpp", vpp)
    if name is None:
        name = "interleaved" if vpp > 1 else "one_f_one_b"
    return build_schedule(name, pp, vpp, num_microbatches, microbatch_group_size or 0).text()


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
        shown = [schedule.name_of(action) for action in actions[max(0, at - 6) : at]]
        stuck = f" {schedule.name_of(actions[at])} <-- stuck here" if at < len(actions) else ""
        lines.append(f"rank {rank}: {'... ' if at > 6 else ''}{' '.join(shown)}{stuck}")
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
    for a, b in zip(x.starts[:-1], x.starts[1:], strict=True):
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
