"""What follows from a schedule: its order, its time, its bound, what it holds."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.errors import LayoutError
from meshwright.parallel import pipeline
from meshwright.parallel.actions import (
    Action,
    Floats,
    Schedule,
    build_schedule,
    schedule_module,
    schedule_order,
)
from meshwright.parallel.pipeline import (
    bound_coefficients,
    held_microbatches,
    order,
    simulate,
)
from oracles import rows

KINDS = ("gpipe", "one_f_one_b", "interleaved", "zb_h1", "zb_v")
CHUNKS = {"interleaved": (2, 3, 4), "zb_h1": (1, 2, 3), "zb_v": (2,)}


@st.composite
def schedules(draw: st.DrawFn) -> tuple[str, int, int, int, int]:
    """A schedule that exists: kind, pp, vpp, micro-batches, group size."""
    kind = draw(st.sampled_from(KINDS))
    pp = draw(st.integers(2 if kind == "interleaved" else 1, 6))
    vpp = draw(st.sampled_from(CHUNKS.get(kind, (1,))))
    m, group = draw(st.integers(1, 14)), 0
    if kind == "interleaved":
        group = draw(st.sampled_from([0, pp, pp + 1, 2 * pp]))
        whole = draw(st.integers(1, 4)) * (group or pp)
        m = whole + draw(st.sampled_from([0, pp if group > pp else 0]))
    if kind == "zb_h1" and m % max(1, m // pp):
        m = m // pp * pp
    return kind, pp, vpp, m, group


def times(seed: int, num_rows: int, stages: int) -> tuple[Floats, Floats, Floats, Floats]:
    """Uneven seconds per stage, transfers, and a weight part between nothing and all."""
    rng = np.random.default_rng(seed)
    fwd_s, bwd_s = rng.exponential(1, (2, num_rows, stages)) * (rng.random((num_rows, 1)) < 0.9)
    wgrad_s = bwd_s * rng.choice([0.0, 0.3, 0.5, 1.0], (num_rows, stages))
    p2p_s = rng.exponential(0.3, num_rows) * (rng.random(num_rows) < 0.7)
    return fwd_s, bwd_s, p2p_s, wgrad_s


def even(num_stages: int, fwd: float = 1.0, bwd: float = 2.0) -> tuple[Floats, Floats, Floats]:
    return np.full((1, num_stages), fwd), np.full((1, num_stages), bwd), np.zeros(1)


def needs_of(schedule: Schedule, stage: int, action: Action) -> tuple[int, tuple[str, ...]] | None:
    """The stage and the kinds of what an action needs from elsewhere, straight from the rules."""
    last = schedule.pp * schedule.vpp - 1
    if action.kind == "F":
        return (stage - 1, ("F",)) if stage else None
    if action.kind == "W":
        return stage, ("I",)
    return (stage, ("F",)) if stage == last else (stage + 1, ("B", "I"))


def step_by_step(
    schedule: Schedule, fwd_s: Floats, bwd_s: Floats, p2p_s: float, wgrad_s: Floats
) -> float:
    """Run one row action by action: the definition, without levels and arrays."""
    ends: dict[tuple[str, int, int], tuple[float, int]] = {}
    at, free = [0] * schedule.pp, [0.0] * schedule.pp
    while any(at[r] < len(schedule.ranks[r]) for r in range(schedule.pp)):
        for rank, actions in enumerate(schedule.ranks):
            if at[rank] == len(actions):
                continue
            action = actions[at[rank]]
            stage, ready = schedule.stage(rank, action.chunk), free[rank]
            need = needs_of(schedule, stage, action)
            if need is not None:
                done = [ends.get((kind, need[0], action.microbatch)) for kind in need[1]]
                arrived = next((end for end in done if end is not None), None)
                if arrived is None:
                    continue
                end, home = arrived
                ready = max(ready, end + (p2p_s if home != rank else 0.0))
            seconds = {
                "F": fwd_s[stage],
                "B": bwd_s[stage],
                "I": bwd_s[stage] - wgrad_s[stage],
                "W": wgrad_s[stage],
            }[action.kind]
            free[rank] = ready + seconds
            ends[action.kind, stage, action.microbatch] = free[rank], rank
            at[rank] += 1
    return max(free)


@settings(max_examples=60)
@given(schedules(), st.integers(0, 2**31))
def test_simulation_equals_running_the_actions_one_by_one(
    shape: tuple[str, int, int, int, int], seed: int
) -> None:
    """Provenance: law."""
    schedule = build_schedule(*shape)
    fwd_s, bwd_s, p2p_s, wgrad_s = times(seed, 2, schedule.pp * schedule.vpp)
    run = simulate(schedule, fwd_s, bwd_s, p2p_s, wgrad_s)
    for i in range(2):
        one = step_by_step(schedule, fwd_s[i], bwd_s[i], float(p2p_s[i]), wgrad_s[i])
        assert run.step_s[i] == pytest.approx(one, rel=1e-12)


@settings(max_examples=40)
@given(schedules(), st.integers(0, 2**31))
def test_a_row_of_a_batch_equals_the_row_alone(
    shape: tuple[str, int, int, int, int], seed: int
) -> None:
    """Provenance: ours. Bit for bit."""
    schedule = build_schedule(*shape)
    columns = times(seed, 5, schedule.pp * schedule.vpp)
    run = simulate(schedule, *columns, starts=True)
    assert run.start_s is not None
    for i in range(5):
        alone = simulate(schedule, *(column[i : i + 1] for column in columns), starts=True)
        assert alone.start_s is not None
        assert alone.step_s[0] == run.step_s[i]
        assert (alone.busy_s[0] == run.busy_s[i]).all()
        assert (alone.rank_end_s[0] == run.rank_end_s[i]).all()
        for ours, all_rows in zip(alone.start_s, run.start_s, strict=True):
            assert (ours[0] == all_rows[i]).all()


def test_many_rows_are_simulated_in_turns_with_the_same_result(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Provenance: ours."""
    schedule = build_schedule("interleaved", 4, 2, 8)
    columns = times(3, 50, 8)
    at_once = simulate(schedule, *columns)
    monkeypatch.setattr(pipeline, "MOST_CELLS", 1500)
    in_turns = simulate(schedule, *columns)
    assert (at_once.step_s == in_turns.step_s).all()
    assert (at_once.busy_s == in_turns.busy_s).all()
    nothing = simulate(schedule, *(column[:0] for column in columns))
    assert nothing.step_s.shape == (0,)


@settings(max_examples=60)
@given(schedules(), st.integers(0, 2**31))
def test_no_run_is_faster_than_the_bound(shape: tuple[str, int, int, int, int], seed: int) -> None:
    """Provenance: law."""
    schedule = build_schedule(*shape)
    fwd_s, bwd_s, p2p_s, wgrad_s = times(seed, 20, schedule.pp * schedule.vpp)
    run = simulate(schedule, fwd_s, bwd_s, p2p_s, wgrad_s)
    fwd, bwd, p2p = bound_coefficients(*shape[:4])
    bound_s = (fwd_s @ fwd.T + bwd_s @ bwd.T + p2p_s[:, None] * p2p).max(axis=1)
    assert (bound_s <= run.step_s * (1 + 1e-12)).all()
    assert (run.busy_s <= run.rank_end_s * (1 + 1e-12)).all()
    assert (run.rank_end_s.max(axis=1) == run.step_s).all()


@pytest.mark.parametrize(
    ("kind", "pp", "vpp", "m"),
    [
        ("gpipe", 4, 1, 8),
        ("one_f_one_b", 4, 1, 2),
        ("one_f_one_b", 4, 1, 4),
        ("one_f_one_b", 16, 1, 64),
        ("interleaved", 4, 2, 8),
        ("interleaved", 8, 4, 32),
    ],
)
def test_even_stages_take_the_published_time_and_bubble(
    kind: str, pp: int, vpp: int, m: int
) -> None:
    """Provenance: paper (Narayanan et al., arXiv:2104.04473, section 2.2): bubble (p-1)/(m v)."""
    columns = even(pp * vpp)
    step_s = simulate(build_schedule(kind, pp, vpp, m), *columns).step_s[0]
    assert step_s == (m * vpp + pp - 1) * 3
    work_s = m * vpp * 3
    assert (step_s - work_s) / work_s == pytest.approx((pp - 1) / (m * vpp))
    fwd, bwd, _ = bound_coefficients(kind, pp, vpp, m)
    assert (columns[0] @ fwd.T + columns[1] @ bwd.T).max() == step_s


@pytest.mark.parametrize(("fwd", "inputs", "weights"), [(1, 1, 1), (1, 1.25, 0.75), (2, 2, 1)])
def test_zb_h1_has_the_published_bubble(fwd: float, inputs: float, weights: float) -> None:
    """Provenance: paper (Qi et al., arXiv:2401.10241, table 2): (p-1)(T_F + T_B - T_W)."""
    pp, m = 4, 16
    fwd_s, bwd_s, p2p_s = even(pp, fwd, inputs + weights)
    schedule = build_schedule("zb_h1", pp, 1, m)
    step_s = simulate(schedule, fwd_s, bwd_s, p2p_s, np.full((1, pp), weights)).step_s[0]
    work_s = m * (fwd + inputs + weights)
    assert step_s - work_s == pytest.approx((pp - 1) * (fwd + inputs - weights))


def test_zb_v_has_no_bubble_but_the_way_to_the_last_rank() -> None:
    """Provenance: paper (Qi et al., arXiv:2401.10241, section 6), F = I = W."""
    pp, m = 4, 12
    columns = even(2 * pp, 1, 2)
    run = simulate(build_schedule("zb_v", pp, 2, m), *columns, np.ones((1, 2 * pp)))
    assert run.step_s[0] == m * 2 * 3 + pp - 1
    assert (run.busy_s == m * 2 * 3).all()


def test_transfers_cost_only_between_different_ranks() -> None:
    """Provenance: law."""
    fwd_s, bwd_s, _ = even(2)
    wgrad_s, p2p_s = np.ones((1, 2)), np.full(1, 100.0)
    alone = simulate(build_schedule("zb_v", 1, 2, 3), fwd_s, bwd_s, p2p_s, wgrad_s)
    assert alone.step_s[0] == 3 * 2 * 3
    two = simulate(build_schedule("1f1b", 2, 1, 1), fwd_s, bwd_s, p2p_s)
    assert two.step_s[0] == 2 * 3 + 2 * 100


def test_a_split_backward_needs_the_seconds_of_its_weight_part() -> None:
    """Provenance: ours."""
    with pytest.raises(LayoutError, match="splits the backward"):
        simulate(build_schedule("zb_h1", 2, 1, 4), *even(2))


@settings(max_examples=40)
@given(schedules(), st.integers(0, 2**31))
def test_starts_leave_room_for_each_action_on_its_rank(
    shape: tuple[str, int, int, int, int], seed: int
) -> None:
    """Provenance: law."""
    schedule = build_schedule(*shape)
    fwd_s, bwd_s, p2p_s, wgrad_s = times(seed, 1, schedule.pp * schedule.vpp)
    run = simulate(schedule, fwd_s, bwd_s, p2p_s, wgrad_s, starts=True)
    assert run.start_s is not None
    seconds = {"F": fwd_s, "B": bwd_s, "I": bwd_s - wgrad_s, "W": wgrad_s}
    for rank, (actions, start_s) in enumerate(zip(schedule.ranks, run.start_s, strict=True)):
        assert start_s.shape == (1, len(actions))
        stages = [schedule.stage(rank, a.chunk) for a in actions]
        end_s = start_s[0] + [seconds[a.kind][0, s] for a, s in zip(actions, stages, strict=True)]
        assert (end_s[:-1] <= start_s[0, 1:] + 1e-9).all()
        assert end_s[-1] == pytest.approx(run.rank_end_s[0, rank])


@settings(max_examples=60)
@given(schedules())
def test_every_action_stands_after_what_it_needs(shape: tuple[str, int, int, int, int]) -> None:
    """Provenance: law. This is the proof that no schedule deadlocks."""
    schedule = build_schedule(*shape)
    sorted_actions = order(schedule)
    count = len(sorted_actions.kind)
    assert count == sum(len(actions) for actions in schedule.ranks)
    for a, b in pairwise(sorted_actions.starts):
        needs = sorted_actions.needs[:, a:b]
        assert ((needs < a) | (needs == count)).all()
        assert len(set(sorted_actions.rank[a:b].tolist())) == b - a


def changed(schedule: Schedule, rank: int, actions: tuple[Action, ...]) -> Schedule:
    ranks = list(schedule.ranks)
    ranks[rank] = actions
    return Schedule("mine", schedule.pp, schedule.vpp, schedule.num_microbatches, tuple(ranks))


def test_a_deadlock_is_drawn_with_the_place_where_each_rank_waits() -> None:
    """Provenance: ours (the picture is PyTorch's idea)."""
    schedule = build_schedule("1f1b", 2, 1, 8)
    first, second = Action("F", 0, 6), Action("B", 0, 6)
    swapped = {first: second, second: first}
    stuck = changed(schedule, 0, tuple(swapped.get(a, a) for a in schedule.ranks[0]))
    with pytest.raises(LayoutError) as error:
        order(stuck)
    picture = error.value.rule.splitlines()
    assert picture[1] == "rank 0: ... F3 B2 F4 B3 F5 B4 B6 <-- stuck here"
    assert picture[2] == "rank 1: ... F3 B3 F4 B4 F5 B5 F6 <-- stuck here"


def test_a_backward_before_its_own_forward_is_a_deadlock() -> None:
    """Provenance: law."""
    schedule = build_schedule("1f1b", 1, 1, 1)
    with pytest.raises(LayoutError, match="rank 0: B0 <-- stuck here"):
        order(changed(schedule, 0, schedule.ranks[0][::-1]))


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("1f1b", lambda actions: actions[:-1]),
        ("1f1b", lambda actions: (*actions, actions[0])),
        ("1f1b", lambda actions: (*actions, Action("W", 0, 0))),
        ("zb_h1", lambda actions: actions[:-1]),
        ("1f1b", lambda actions: (*actions, Action("F", 0, 99))),
        ("1f1b", lambda actions: (*actions, Action("F", 1, 0))),
    ],
)
def test_a_missing_doubled_or_foreign_action_is_refused(kind: str, change: Any) -> None:
    """Provenance: ours."""
    schedule = build_schedule(kind, 2, 1, 4)
    with pytest.raises(LayoutError, match="mine"):
        order(changed(schedule, 1, change(schedule.ranks[1])))


def held_in_full(schedule: Schedule) -> list[set[tuple[int, ...]]]:
    """Walk the whole schedule and keep every combination that no other exceeds."""
    frees = "W" if schedule_module(schedule.name).SPLITS_BACKWARD else "B"
    found: list[set[tuple[int, ...]]] = []
    for actions in schedule.ranks:
        held, seen = Counter[int](), set[tuple[int, ...]]()
        for action in actions:
            held[action.chunk] += (action.kind == "F") - (action.kind == frees)
            seen.add(tuple(held[chunk] for chunk in range(schedule.vpp)))
        found.append(
            {
                a
                for a in seen
                if not any(a != b and all(x <= y for x, y in zip(a, b, strict=True)) for b in seen)
            }
        )
    return found


@settings(max_examples=40)
@given(schedules(), st.sampled_from([1, 3, 7]))
def test_what_is_held_is_that_of_the_whole_schedule(
    shape: tuple[str, int, int, int, int], times_more: int
) -> None:
    """Provenance: law. Many micro-batches hold no more than the few that are looked at."""
    kind, pp, vpp, m, group = shape
    long = m * times_more if kind != "interleaved" else m + (times_more - 1) * (group or pp)
    if kind == "zb_h1":
        long = long // pp * pp or long
    held = held_microbatches(kind, pp, vpp, long, group)
    full = held_in_full(build_schedule(kind, pp, vpp, long, group))
    assert [{tuple(row) for row in rank.tolist()} for rank in held] == full


@pytest.mark.parametrize(
    ("kind", "vpp", "peaks"),
    [
        ("one_f_one_b", 1, [4, 3, 2, 1]),
        ("interleaved", 2, [11, 9, 7, 5]),
        ("zb_h1", 1, [4, 4, 4, 4]),
        ("zb_v", 2, [8, 8, 8, 8]),
        ("gpipe", 1, [4096, 4096, 4096, 4096]),
    ],
)
def test_peaks_are_the_published_ones_for_any_number_of_micro_batches(
    kind: str, vpp: int, peaks: list[int]
) -> None:
    """Provenance: paper (arXiv:2104.04473, arXiv:2401.10241) and spec (Megatron's warm-up)."""
    held = held_microbatches(kind, 4, vpp, 4096)
    assert [int(rank.sum(axis=1).max()) for rank in held] == peaks


def test_peaks_equal_those_of_megatron() -> None:
    """Provenance: spec (Megatron-LM)."""
    checked = 0
    for oracle in rows("schedules.jsonl.gz"):
        config = oracle["config"]
        if not oracle["accepted"] or "peak_in_flight" not in oracle["ranks"][0]:
            continue
        vpp = config["vpp"] or 1
        kind = "interleaved" if vpp > 1 else "one_f_one_b"
        group = config.get("microbatch_group_size", 0)
        held = held_microbatches(kind, config["pp"], vpp, config["num_microbatches"], group)
        for rank, truth in zip(held, oracle["ranks"], strict=True):
            if truth["peak_in_flight"] is not None:
                assert rank.sum(axis=1).max() == truth["peak_in_flight"]
                checked += 1
    assert checked > 200


def test_what_is_kept_for_later_calls_cannot_be_written() -> None:
    """Provenance: ours."""
    with pytest.raises(ValueError, match="read-only"):
        bound_coefficients("1f1b", 2, 1, 4)[0][0, 0] = 1
    with pytest.raises(ValueError, match="read-only"):
        held_microbatches("1f1b", 2, 1, 4)[0][0, 0] = 1


def test_bad_numbers_are_refused_before_anything_is_built() -> None:
    """Provenance: ours."""
    for function in (bound_coefficients, held_microbatches):
        with pytest.raises(LayoutError, match=r"layout\.pp"):
            function("1f1b", 0, 1, 4)
        with pytest.raises(LayoutError, match=r"layout\.vpp"):
            function("1f1b", 4, 2, 4)


def test_the_text_of_a_schedule_is_its_order() -> None:
    """Provenance: spec (the contract)."""
    assert build_schedule("interleaved", 2, 2, 4).text() == schedule_order(2, 4, vpp=2)
