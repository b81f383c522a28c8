"""Layers go where they make the slowest pipeline rank fast, told as shortly as a layout can."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.describe.cluster import load_cluster
from meshwright.describe.job import Job
from meshwright.describe.models import load_model
from meshwright.parallel.layout import Pipeline, to_text
from meshwright.parallel.placement import place, place_by
from meshwright.search import read_space, search
from meshwright.search.placements import Work, choice_for, slowest_rank_s, spread

EVEN: dict[str, Any] = {"first": 0, "last": 0, "account_for_loss": 0, "pipeline_layout": None}


@st.composite
def works(draw: st.DrawFn) -> Work:
    layers = draw(st.lists(st.sampled_from([1.0, 0.4]), min_size=4, max_size=9))
    ends = st.sampled_from([0.0, 0.3, 1.2, 2.5])
    return Work(np.array(layers), draw(ends), draw(ends))


@settings(max_examples=100)
@given(works(), st.integers(2, 4))
def test_no_other_split_has_a_much_faster_slowest_stage(work: Work, stages: int) -> None:
    n = len(work.layers)
    found = spread(work, stages)
    assert sum(found) == n
    assert all(count > 0 for count in found[1:-1])
    others = [
        tuple(int(d) for d in np.diff((0, *cuts, n)))
        for cuts in combinations(sorted([*range(n + 1)]), stages - 1)
    ]
    one_f_one_b = Pipeline.one_f_one_b
    least = min(slowest_rank_s(work, c, stages, one_f_one_b) for c in others)
    # The sum of eighth powers of four stages is at most four times that of the slowest.
    assert slowest_rank_s(work, found, stages, one_f_one_b) <= least * 4 ** (1 / 8)


def test_a_heavy_head_takes_layers_off_the_last_stage() -> None:
    assert spread(Work(np.ones(16), 0.0, 2.0), 3) == (6, 6, 4)
    assert spread(Work(np.ones(16), 2.0, 0.0), 3) == (4, 6, 6)
    assert spread(Work(np.ones(16), 0.0, 0.0), 4) == (4, 4, 4, 4)


@given(
    st.lists(st.integers(1, 9), min_size=2, max_size=8),
    st.sampled_from([1, 2]),
    st.integers(0, 1),
)
def test_what_is_told_places_the_layers_so(counts: list[int], vpp: int, mtp: int) -> None:
    pp = max(len(counts) // vpp, 2)
    counts = (counts * vpp)[: pp * vpp]
    schedule = Pipeline.interleaved if vpp > 1 else Pipeline.one_f_one_b
    told = choice_for(tuple(counts), pp, schedule, mtp)
    placed = place_by(told, sum(counts), mtp)
    assert [len(layers) for layers in placed.layers] == counts


@pytest.mark.parametrize(
    ("counts", "told"),
    [
        ((4, 4, 4, 4), {}),
        ((4, 4, 4, 3), {"account_for_loss": 1}),
        ((3, 4, 4, 3), {"account_for_embedding": 1, "account_for_loss": 1}),
        ((4, 4, 4, 2), {"last": 2}),
        ((5, 4, 4, 2), {"first": 5, "last": 2}),
        ((5, 4, 4, 4, 3, 0), {"pipeline_layout": "Et*5|(t*4|)*3t*3|L"}),
    ],
)
def test_a_placement_is_told_as_shortly_as_can_be(
    counts: tuple[int, ...], told: dict[str, Any]
) -> None:
    found = vars(choice_for(counts, len(counts), Pipeline.one_f_one_b, 0))
    shape = {"pp": len(counts), "vpp": 1, "schedule": Pipeline.one_f_one_b}
    assert {name: value for name, value in found.items() if value} == shape | told


def test_a_large_vocabulary_is_planned_with_fewer_layers_on_the_last_stage() -> None:
    model, cluster = load_model("llama3-8b"), load_cluster("16xH100")
    space = read_space(["pp=4", "vpp=1", "schedule=1f1b", "tp=2", "recompute=none"])
    found = search(model, cluster, Job(seq_len=4096, gbs=64), space=space, top=1000).best
    best = found[0].layout
    placed = place(32, 4, 1, first=best.first, last=best.last, pipeline_layout=best.pipeline_layout)
    assert len(placed.layers[-1]) < 8
    even = next(r for r in found if to_text(r.layout) == to_text(replace(r.layout, **EVEN)))
    assert found[0].step_time_s < 0.97 * even.step_time_s
