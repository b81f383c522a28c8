"""The search is exact, keeps to its limits, and says what is closest when nothing fits."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.checks import Case, illegal
from meshwright.cost.detail import BAND_FRACTION, capacity_bytes, estimate
from meshwright.cost.step import bounds, prepare, simulated_step_s
from meshwright.describe.cluster import Cluster, load_cluster
from meshwright.describe.job import Job
from meshwright.describe.model import Model
from meshwright.describe.models import load_model
from meshwright.errors import LayoutError
from meshwright.parallel.layout import Layout, num_rows, row, to_dict, to_text
from meshwright.parallel.layout import table as as_table
from meshwright.search import Found, Space, candidate_tables, read_space, search
from strategies import dense_model, hybrid_model, moe_model

JOB = Job(seq_len=4096, gbs=64)


@cache
def problem(name: str) -> tuple[Model, Cluster, Job]:
    return {
        "dense": (dense_model(), load_cluster("16xH100"), JOB),
        "moe": (moe_model(dense_first=2, num_experts=8), load_cluster("8xA100-40GB"), JOB),
        "uneven": (dense_model(num_layers=13, tied=True), load_cluster("8xH100"), JOB),
        "hybrid": (hybrid_model(), load_cluster("8xB200"), JOB),
        "lora": (dense_model(), load_cluster("8xH100"), Job(seq_len=4096, gbs=64, task="lora")),
    }[name]


@cache
def exhaustive(name: str) -> list[tuple[float, float, str]]:
    """Return (step time, peak, text) of every legal layout, each table simulated whole."""
    model, cluster, job = problem(name)
    out: list[tuple[float, float, str]] = []
    for x in candidate_tables(model, cluster, job, Space())[1]:
        t = prepare(model, cluster, job, x)
        seconds, peak = simulated_step_s(t), bounds(t).peak_bytes
        texts = [to_text(row(x, i)) for i in range(num_rows(x))]
        out += zip(seconds.tolist(), peak.tolist(), texts, strict=True)
    return out


NAMES = ("dense", "moe", "uneven", "hybrid", "lora")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("limit", [None, 6e9])
def test_the_best_layouts_are_those_of_simulating_everything(
    name: str, limit: float | None
) -> None:
    model, cluster, job = problem(name)
    found = search(model, cluster, job, top=10, max_memory_bytes=limit)
    most = min(capacity_bytes(cluster, job), limit or np.inf) * (1 - BAND_FRACTION)
    rows = exhaustive(name)
    fitting = sorted(r for r in rows if r[1] <= most)
    assert found.legal == len(rows)
    assert found.fit == len(fitting)
    assert [r.step_time_s for r in found.best] == [r[0] for r in fitting[:10]]
    times = {text: (time, peak) for time, peak, text in fitting}
    for one in found.best:
        assert times[to_text(one.layout)] == (one.step_time_s, one.peak_bytes)
    assert 0 < found.simulated <= found.fit


@pytest.mark.parametrize("name", NAMES)
def test_the_search_simulates_few_of_the_layouts_that_fit(name: str) -> None:
    found = search(*problem(name), top=3)
    assert found.simulated <= max(64, found.fit // 3)


@pytest.mark.parametrize("name", NAMES)
def test_what_the_search_reports_is_what_an_estimate_says(name: str) -> None:
    model, cluster, job = problem(name)
    for one in search(model, cluster, job, top=3).best:
        e = estimate(model, cluster, job, one.layout)
        assert e.step_time_s == pytest.approx(one.step_time_s, rel=1e-12)
        assert e.peak_bytes == pytest.approx(one.peak_bytes, rel=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_every_layout_of_a_search_is_legal_and_fills_the_cluster(name: str) -> None:
    model, cluster, job = problem(name)
    candidates, tables = candidate_tables(model, cluster, job, Space())
    assert candidates >= sum(map(num_rows, tables)) > 0
    for x in tables:
        assert not illegal(Case(model=model, job=job, x=x, cluster=cluster)).any()
        assert (x.world_size == cluster.num_gpus).all()
        assert (job.gbs % (x.dp * x.mbs) == 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_no_layout_is_looked_at_twice(name: str) -> None:
    texts = [text for _, _, text in exhaustive(name)]
    assert len(texts) == len(set(texts))


@settings(max_examples=30)
@given(
    st.sampled_from(["dense", "moe"]),
    st.sampled_from(
        [
            ("tp=2", "tp", {2}),
            ("tp=2,4", "tp", {2, 4}),
            ("pp=2..8", "pp", {2, 4, 8}),
            ("cp=1", "cp", {1}),
            ("dp=4..16", "dp", {4, 8, 16}),
            ("vpp=1", "vpp", {1}),
            ("ep=1", "ep", {1}),
            ("etp=1", "etp", {1}),
            ("mbs=2", "mbs", {2}),
            ("sp=true", "sp", {True}),
            ("zero=optim_grads_params", "zero", {"optim_grads_params"}),
            ("recompute=full", "recompute", {"full"}),
            ("recompute=none,core_attn", "recompute", {"none", "core_attn"}),
            ("schedule=1f1b,zb_h1", "schedule", {"1f1b", "zb_h1"}),
            ("cp_comm=p2p", "cp_comm", {"p2p"}),
        ]
    ),
)
def test_limits_hold_for_every_layout(name: str, limit: tuple[str, str, set[object]]) -> None:
    text, key, values = limit
    found = search(*problem(name), top=5, space=read_space([text]))
    assert found.best
    for one in found.best:
        assert to_dict(one.layout)[key] in values


def test_several_limits_hold_together() -> None:
    found = search(*problem("dense"), top=5, space=read_space(["tp=4 pp=2", "mbs=1,2"]))
    assert {(r.layout.tp, r.layout.pp) for r in found.best} == {(4, 2)}


def test_a_limit_may_allow_what_the_search_would_not_try() -> None:
    model, cluster, job = dense_model(), load_cluster("4x4xH100"), JOB
    free = search(model, cluster, job, top=1000)
    assert max(r.layout.tp for r in free.best) <= 4
    forced = search(model, cluster, job, top=1, space=read_space(["tp=8"]))
    assert forced.best[0].layout.tp == 8


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("tp", "fix"),
        ("tp=", "fix"),
        ("=2", "fix"),
        ("tp=0", "fix.tp"),
        ("tp=-2", "fix.tp"),
        ("tp=two", "fix.tp"),
        ("tp=8..2", "fix.tp"),
        ("tp=1..99999999999", "fix.tp"),
        ("tp=2..", "fix.tp"),
        ("tp=1.5", "fix.tp"),
        ("tp=2 tp=4", "fix.tp"),
        ("width=2", "fix"),
        ("pipeline_layout=Et|tL", "fix"),
        ("sp=1", "fix.sp"),
        ("zero=4", "fix.zero"),
        ("schedule=fastest", "fix.schedule"),
        ("recompute=everything", "layout.recompute"),
        ("recompute=full:block:2", "fix.recompute"),
    ],
)
def test_a_limit_that_cannot_be_names_its_key(text: str, field: str) -> None:
    with pytest.raises(LayoutError) as caught:
        read_space([text])
    assert caught.value.field == field
    assert caught.value.rule
    assert caught.value.remedy


def test_a_wide_limit_costs_no_more_than_its_divisors() -> None:
    wide = search(*problem("dense"), top=3, space=read_space(["tp=1..1048576 mbs=1..1048576"]))
    assert {r.layout.tp for r in wide.best} <= {1, 2, 4, 8, 16}


def test_when_nothing_fits_the_closest_is_the_layout_with_the_lowest_peak() -> None:
    model, cluster, job = problem("dense")
    found = search(model, cluster, job, max_memory_bytes=1e9)
    assert (found.best, found.fit) == ([], 0)
    assert found.closest is not None
    assert found.closest.peak_bytes == min(peak for _, peak, _ in exhaustive("dense"))


def test_layouts_inside_the_error_band_count_when_no_other_fits() -> None:
    model, cluster, job = problem("dense")
    lowest = min(peak for _, peak, _ in exhaustive("dense"))
    found = search(model, cluster, job, max_memory_bytes=lowest * 1.01)
    assert found.best
    assert all(lowest <= r.peak_bytes <= lowest * 1.01 for r in found.best)


def test_a_space_without_legal_layouts_finds_nothing() -> None:
    found = search(*problem("dense"), space=read_space(["tp=3"]))
    assert found == Found([], [], None, found.candidates, 0, 0, 0, found.seconds, found.limit_bytes)


@pytest.mark.parametrize("name", NAMES)
def test_the_front_of_memory_against_time_holds_nothing_that_another_beats(name: str) -> None:
    model, cluster, job = problem(name)
    found = search(model, cluster, job, top=1, with_pareto=True)
    front = found.pareto
    assert front
    sizes, seconds = ([getattr(r, k) for r in front] for k in ("peak_bytes", "step_time_s"))
    assert sizes == sorted(set(sizes))
    assert seconds == sorted(set(seconds), reverse=True)
    assert front[-1].step_time_s == found.best[0].step_time_s


def test_progress_is_reported_and_never_goes_back() -> None:
    said: list[tuple[str, int, int]] = []
    search(*problem("dense"), progress=lambda *args: said.append(args))
    assert {what for what, _, _ in said} >= {"enumerating", "pricing", "simulating"}
    for what in ("pricing", "simulating"):
        done = [d for w, d, _ in said if w == what]
        assert done == sorted(done)
        assert all(d <= of for w, d, of in said if w == what)


def test_equal_searches_have_equal_answers() -> None:
    def once() -> list[str]:
        return [to_text(r.layout) for r in search(*problem("moe"), top=20).best]

    assert once() == once()


def test_layers_that_do_not_divide_are_placed_unevenly() -> None:
    found = search(*problem("uneven"), top=500)
    uneven = [r.layout for r in found.best if 13 % (r.layout.pp * r.layout.vpp)]
    assert uneven
    model, cluster, job = problem("uneven")
    for x in uneven[:5]:
        assert sum(s["layers"] for s in estimate(model, cluster, job, x).stages) == 13


def as_row(x: Layout[int]) -> str:
    return to_text(row(as_table([x]), 0))


def test_a_found_layout_is_one_layout_and_not_a_column() -> None:
    best = search(*problem("dense"), top=1).best[0].layout
    assert type(best.tp) is int
    assert as_row(best) == to_text(best)


@pytest.mark.parametrize(("seq_len", "mbs"), [(512, 32), (1024, 16), (4096, 8)])
def test_short_sequences_are_batched_until_a_pass_is_long(seq_len: int, mbs: int) -> None:
    job, cluster = Job(seq_len=seq_len, gbs=64), load_cluster("1xH100")
    assert search(load_model("gpt2"), cluster, job, top=1).best[0].layout.mbs == mbs
