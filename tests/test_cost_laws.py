"""Laws that every cost obeys, whatever the model, the cluster, the job and the fitted factors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import strategies
from meshwright.checks import Case, illegal
from meshwright.cost.columns import Floats
from meshwright.cost.data_parallel import Line
from meshwright.cost.detail import TIME_TERMS, Estimate, estimate
from meshwright.cost.memory import BytesPerParam
from meshwright.cost.step import (
    MEMORY_TERMS,
    Table,
    bounds,
    by_pipeline,
    memory_of_candidates,
    prepare,
    simulated_step_s,
)
from meshwright.describe.cluster import load_cluster
from meshwright.describe.job import Job, precision
from meshwright.describe.model import Model
from meshwright.parallel.layout import Layout, Layouts, Recompute, Zero, layout, num_rows, row, take
from meshwright.parallel.layout import table as as_table
from strategies import Situation, changed, situations_with_layout, situations_with_rows

ROUNDING = 1e-12
"""Sums in another order differ by this at most, relative."""


def priced(s: Situation, x: Layouts) -> Table:
    return prepare(s.model, s.cluster, s.job, x)


def column_values(t: Table) -> Iterator[tuple[str, Floats]]:
    """Yield every column [N] that pricing made, by name."""
    yield "message_s", t.message_s
    yield "framework_bytes", t.framework_bytes
    for name in ("weights", "grads", "optimizer"):
        per_param: BytesPerParam = getattr(t, name)
        yield f"{name}.dense", per_param.dense
        yield f"{name}.expert", per_param.expert
    for part in fields(t.dp):
        value = getattr(t.dp, part.name)
        if isinstance(value, Line):
            yield f"dp.{part.name}.start_s", value.start_s
            yield f"dp.{part.name}.s_per_byte", value.s_per_byte
        elif isinstance(value, np.ndarray):
            yield f"dp.{part.name}", value
    for part in fields(t.priced):
        value = getattr(t.priced, part.name)
        if isinstance(value, np.ndarray) and part.name != "inverse":
            yield f"priced.{part.name}", value[t.priced.inverse]
    found = bounds(t)
    yield "peak_bytes", found.peak_bytes
    yield "bound_s", found.bound_s
    yield "simulated_step_s", simulated_step_s(t)
    for term, values in memory_columns(t).items():
        yield f"fullest rank: {term}", values


def memory_columns(t: Table) -> dict[str, Floats]:
    """Return each memory term [N] of the fullest rank."""
    out = {term: np.zeros(num_rows(t.x)) for term in MEMORY_TERMS}
    for g in by_pipeline(t.job, t.x, t.priced):
        of_rank = list(memory_of_candidates(t, g))
        total = np.array([sum(terms.values()) for terms in of_rank])
        fullest = np.argmax(total, axis=0)
        for term in MEMORY_TERMS:
            values = np.array([terms[term] for terms in of_rank])
            out[term][g.rows] = values[fullest, np.arange(len(g.rows))]
    return out


@settings(max_examples=3)
@given(situations_with_rows(min_rows=50, max_rows=60))
def test_a_row_of_a_table_costs_bit_for_bit_what_it_costs_alone(
    drawn: tuple[Situation, list[int]],
) -> None:
    s, rows = drawn
    x = s.rows(rows)
    together = dict(column_values(priced(s, x)))
    for i in range(num_rows(x)):
        for name, alone in column_values(priced(s, take(x, np.array([i])))):
            same = np.array_equal(together[name][i], alone[0])
            assert same, f"{name}: {together[name][i]} in the table, {alone[0]} alone"


@settings(max_examples=15)
@given(situations_with_rows())
def test_a_bound_is_never_above_what_the_simulation_finds(
    drawn: tuple[Situation, list[int]],
) -> None:
    s, rows = drawn
    x = s.rows(rows)
    t = priced(s, x)
    bound, simulated = bounds(t).bound_s, simulated_step_s(t)
    assert np.all(bound <= simulated * (1 + ROUNDING))


@settings(max_examples=15)
@given(situations_with_rows())
def test_costs_are_finite_and_not_negative(drawn: tuple[Situation, list[int]]) -> None:
    s, rows = drawn
    x = s.rows(rows)
    for name, values in column_values(priced(s, x)):
        assert np.all(np.isfinite(values)), name
        assert np.all(values >= 0), name


def priced_in_full(s: Situation, x: Layout[int]) -> Estimate:
    return estimate(s.model, s.cluster, s.job, x)


@settings(max_examples=15)
@given(situations_with_layout())
def test_the_terms_of_an_estimate_add_up_and_none_is_negative(
    drawn: tuple[Situation, Layout[int]],
) -> None:
    s, x = drawn
    e = priced_in_full(s, x)
    assert tuple(e.time) == TIME_TERMS
    assert tuple(e.memory) == MEMORY_TERMS
    assert sum(e.time.values()) == pytest.approx(e.step_time_s, rel=ROUNDING)
    assert sum(e.memory.values()) == pytest.approx(e.peak_bytes, rel=ROUNDING)
    assert min(*e.time.values(), *e.memory.values()) >= 0
    assert max(stage["peak_bytes"] for stage in e.stages) == e.peak_bytes
    for stage in e.stages:
        terms = sum(stage[term] for term in MEMORY_TERMS)
        assert terms == pytest.approx(stage["peak_bytes"], rel=ROUNDING)
    assert sum(stage["layers"] for stage in e.stages) == s.model.num_layers


@settings(max_examples=15)
@given(situations_with_layout())
def test_an_estimate_equals_the_row_of_a_table(drawn: tuple[Situation, Layout[int]]) -> None:
    s, x = drawn
    e, t = priced_in_full(s, x), priced(s, as_table([x]))
    assert e.peak_bytes == pytest.approx(bounds(t).peak_bytes[0], rel=ROUNDING)
    assert e.step_time_s == pytest.approx(simulated_step_s(t)[0], rel=ROUNDING)


@settings(max_examples=15)
@given(
    model=strategies.models(),
    name=st.sampled_from(["8xH100", "8xA100-40GB", "16xGB200", "8xV100-32GB", "16xMI300X"]),
    recipe=st.sampled_from(["bf16", "fp16", "fp32", "fp8", "fp8-mx", "nvfp4"]),
    tp=st.sampled_from([1, 2, 4]),
    pp=st.sampled_from([1, 2]),
    recompute=st.sampled_from([Recompute.none, Recompute.core_attn, Recompute.full]),
)
def test_any_model_on_any_cluster_in_any_precision_has_finite_costs(
    model: Model, name: str, recipe: str, tp: int, pp: int, recompute: Recompute
) -> None:
    cluster = load_cluster(name)
    job = Job(seq_len=2048, gbs=32, precision=precision(recipe))
    x = layout(tp=tp, pp=pp, gpus=cluster.num_gpus, recompute=recompute)
    assume(not illegal(Case(model=model, job=job, x=as_table([x]), cluster=cluster)).any())
    e = estimate(model, cluster, job, x)
    numbers = [e.step_time_s, e.peak_bytes, e.mfu_fraction, *e.time.values(), *e.memory.values()]
    assert all(np.isfinite(numbers))
    assert min(numbers) >= 0
    assert 0 < e.mfu_fraction < 1


def static_bytes(terms: dict[str, Floats]) -> Floats:
    """Return what a rank holds whatever the micro-batch: weights, gradients, optimizer."""
    return terms["weights_bytes"] + terms["grads_bytes"] + terms["optimizer_bytes"]


def of_every_rank(s: Situation, x: Layouts, job: Job | None = None) -> list[dict[str, Floats]]:
    """Return the memory terms of every candidate peak of a table of one row."""
    t = prepare(s.model, s.cluster, job or s.job, x)
    (g,) = by_pipeline(t.job, t.x, t.priced)
    return list(memory_of_candidates(t, g))


def most(s: Situation, x: Layouts, terms: tuple[str, ...], job: Job | None = None) -> float:
    """Return the most that any rank holds of the sum of some terms."""
    return max(float(sum(m[t][0] for t in terms)) for m in of_every_rank(s, x, job))


STATIC = ("weights_bytes", "grads_bytes", "optimizer_bytes")
ACTIVATIONS = ("activations_bytes", "logits_bytes")


@settings(max_examples=15)
@given(situations_with_layout(), st.sampled_from([2, 3, 4]))
def test_more_data_parallelism_never_holds_more_optimizer_bytes(
    drawn: tuple[Situation, Layout[int]], times: int
) -> None:
    s, x = drawn
    job = replace(s.job, gbs=s.job.gbs * times)
    few = changed(x, zero=int(Zero.optim), dp_replicate=1)
    many = changed(x, zero=int(Zero.optim), dp_replicate=1, dp=x.dp * times)
    held = most(s, few, ("optimizer_bytes",), job)
    assert most(s, many, ("optimizer_bytes",), job) == pytest.approx(held / times, rel=0.5)
    assert most(s, many, ("optimizer_bytes",), job) <= held


@settings(max_examples=15)
@given(situations_with_layout())
def test_each_stage_of_sharding_holds_less_or_the_same(
    drawn: tuple[Situation, Layout[int]],
) -> None:
    s, x = drawn
    held = [most(s, changed(x, zero=int(z)), STATIC) for z in Zero]
    assert held == sorted(held, reverse=True)


@settings(max_examples=15)
@given(situations_with_layout())
def test_sharding_over_dp_times_cp_ranks_divides_exactly_what_its_stage_says(
    drawn: tuple[Situation, Layout[int]],
) -> None:
    s, x = drawn
    plain = {"ep": 1, "etp": 1, "dp_replicate": 1}
    shards = x.dp * x.cp
    whole = of_every_rank(s, changed(x, zero=0, **plain))
    for stage, terms in enumerate((("optimizer",), ("grads",), ("weights",)), 1):
        sharded = of_every_rank(s, changed(x, zero=stage, **plain))
        (term,) = (f"{t}_bytes" for t in terms)
        if not s.model.is_moe:
            for a, b in zip(whole, sharded, strict=True):
                assert b[term][0] == pytest.approx(a[term][0] / shards, rel=ROUNDING)


@settings(max_examples=15)
@given(situations_with_layout(), st.sampled_from([r for r in Recompute if 0 < r < Recompute.block]))
def test_recomputing_never_saves_time_and_never_keeps_more(
    drawn: tuple[Situation, Layout[int]], module: Recompute
) -> None:
    s, x = drawn
    without = changed(x, recompute=0, recompute_num_layers=0)
    with_it = changed(x, recompute=int(module), recompute_num_layers=0)
    assert most(s, with_it, ACTIVATIONS) <= most(s, without, ACTIVATIONS) * (1 + ROUNDING)
    slow, fast = (simulated_step_s(priced(s, y))[0] for y in (with_it, without))
    assert slow >= fast * (1 - ROUNDING)


@settings(max_examples=15)
@given(situations_with_layout())
def test_a_larger_micro_batch_never_keeps_less(drawn: tuple[Situation, Layout[int]]) -> None:
    s, x = drawn
    job = replace(s.job, gbs=s.job.gbs * 4)
    small, large = (most(s, changed(x, mbs=x.mbs * n), ACTIVATIONS, job) for n in (1, 2))
    assert small <= large * (1 + ROUNDING)


@settings(max_examples=15)
@given(situations_with_layout())
def test_a_longer_sequence_never_keeps_less_and_never_takes_less_time(
    drawn: tuple[Situation, Layout[int]],
) -> None:
    s, x = drawn
    y = as_table([x])
    longer = replace(s.job, seq_len=2 * s.job.seq_len)
    assert most(s, y, ACTIVATIONS) <= most(s, y, ACTIVATIONS, longer)
    times = [simulated_step_s(prepare(s.model, s.cluster, j, y))[0] for j in (s.job, longer)]
    assert times[0] <= times[1]


@settings(max_examples=15)
@given(situations_with_layout())
def test_tensor_parallelism_divides_the_weights_but_for_what_every_rank_holds(
    drawn: tuple[Situation, Layout[int]],
) -> None:
    s, x = drawn
    assume(s.model.num_heads % (2 * x.tp) == 0)
    keep = {"zero": int(Zero.no_shard), "dp_replicate": 1, "etp": 1}
    half, whole = (most(s, changed(x, tp=tp, **keep), STATIC) for tp in (2 * x.tp, x.tp))
    assert whole / 2 <= half * (1 + 1e-9)
    assert half < whole


@settings(max_examples=15)
@given(situations_with_rows())
def test_a_faster_network_is_never_slower(drawn: tuple[Situation, list[int]]) -> None:
    s, rows = drawn
    x = s.rows(rows)
    faster = replace(
        s.cluster,
        inter_node=replace(s.cluster.inter_node, bytes_per_s=2 * s.cluster.inter_node.bytes_per_s),
        intra_node=replace(s.cluster.intra_node, bytes_per_s=2 * s.cluster.intra_node.bytes_per_s),
    )
    slow = simulated_step_s(priced(s, x))
    fast = simulated_step_s(prepare(s.model, faster, s.job, x))
    assert np.all(fast <= slow * (1 + ROUNDING))


def test_a_table_of_no_rows_costs_nothing() -> None:
    s = strategies.all_situations()[0]
    t = priced(s, take(s.pool, np.zeros(0, dtype=np.intp)))
    assert bounds(t).peak_bytes.shape == simulated_step_s(t).shape == (0,)


def test_rows_are_the_layouts_they_were_made_of() -> None:
    s = strategies.all_situations()[0]
    one = row(s.pool, 3)
    assert bounds(priced(s, as_table([one]))).bound_s[0] == bounds(priced(s, s.pool)).bound_s[3]
