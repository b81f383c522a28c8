"""From blocks to ranks: what is pruned never wins, what is recomputed, what is held twice."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings

from meshwright.cost.detail import estimate
from meshwright.cost.factors import fitted
from meshwright.cost.stages import PipelineKey, Stages, layer_facts, stages
from meshwright.cost.step import (
    MEMORY_TERMS,
    Group,
    Table,
    beside_pipeline_s,
    by_pipeline,
    memory_of_candidates,
    peak_bytes,
    prepare,
    simulated_step_s,
)
from meshwright.describe.cluster import load_cluster
from meshwright.describe.job import Job
from meshwright.describe.model import Model
from meshwright.parallel.layout import (
    Layout,
    Layouts,
    Pipeline,
    Recompute,
    Zero,
    layout,
    num_rows,
)
from meshwright.parallel.layout import table as as_table
from strategies import (
    Situation,
    changed,
    dense_model,
    gpt_model,
    moe_model,
    situations_with_layout,
    situations_with_rows,
)

JOB = Job(seq_len=4096, gbs=64)


def group_of(
    model: Model, x: Layouts, job: Job = JOB, cluster: str = "64xH100"
) -> tuple[Table, Group]:
    t = prepare(model, load_cluster(cluster), job, x)
    (g,) = by_pipeline(job, t.x, t.priced)
    return t, g


def with_every_rank(t: Table, g: Group) -> Group:
    """Return a group that looks at every rank and every candidate peak."""
    whole = stages(t.priced.facts, g.key, every_rank=True)
    return replace(g, stages=replace(whole, dp_ranks=tuple(range(g.key.pp))))


@settings(max_examples=15)
@given(situations_with_rows())
def test_ranks_that_are_not_looked_at_are_never_the_fullest_or_the_slowest(
    drawn: tuple[Situation, list[int]],
) -> None:
    s, rows = drawn
    x = s.rows(rows)
    t = prepare(s.model, s.cluster, s.job, x)
    for g in by_pipeline(s.job, x, t.priced):
        every = with_every_rank(t, g)
        assert np.array_equal(peak_bytes(t, g), peak_bytes(t, every))
        for few, all_of_them in zip(
            beside_pipeline_s(t, g), beside_pipeline_s(t, every), strict=True
        ):
            assert np.array_equal(few, all_of_them)


@settings(max_examples=15)
@given(situations_with_rows(min_rows=20))
def test_groups_hold_every_row_once_and_share_their_pipeline(
    drawn: tuple[Situation, list[int]],
) -> None:
    s, rows = drawn
    x = s.rows(rows)
    t = prepare(s.model, s.cluster, s.job, x)
    seen: list[int] = []
    for g in by_pipeline(s.job, x, t.priced):
        seen += g.rows.tolist()
        assert np.array_equal(g.slices[g.slice_of], t.priced.inverse[g.rows])
        assert set(x.pp[g.rows].tolist()) == {g.key.pp}
        assert set((s.job.gbs // (x.dp * x.mbs)[g.rows]).tolist()) == {g.key.num_microbatches}
    assert sorted(seen) == list(range(num_rows(x)))


def test_full_recomputation_runs_layers_again_and_not_the_head() -> None:
    x = layout(tp=2, pp=2, gpus=64, recompute=Recompute.full)
    small, large = (
        estimate(dense_model(vocab_size=v), load_cluster("64xH100"), JOB, x)
        for v in (16_000, 256_000)
    )
    assert small.time["recompute_s"] == large.time["recompute_s"] > 0


def test_full_recomputation_in_blocks_runs_the_first_layers_of_each_stage_again() -> None:
    cluster = load_cluster("64xH100")
    model = dense_model(num_layers=16)

    def recompute_s(recompute: Recompute, layers: int) -> float:
        x = layout(pp=4, gpus=64, recompute=recompute, recompute_num_layers=layers)
        return estimate(model, cluster, JOB, x).time["recompute_s"]

    block = Recompute.full | Recompute.block
    whole = recompute_s(Recompute.full, 0)
    for layers in (1, 2, 4):
        assert recompute_s(block, layers) == pytest.approx(whole * layers / 4, rel=1e-9)
    assert recompute_s(block, 8) == pytest.approx(whole, rel=1e-9)


@settings(max_examples=15)
@given(situations_with_layout())
def test_full_recomputation_keeps_no_more_on_any_rank(
    drawn: tuple[Situation, Layout[int]],
) -> None:
    s, x = drawn

    def activations(recompute: Recompute) -> list[float]:
        y = changed(x, recompute=int(recompute), recompute_num_layers=0)
        t = prepare(s.model, s.cluster, s.job, y)
        (g,) = by_pipeline(s.job, y, t.priced)
        every = with_every_rank(t, g)
        found = list(memory_of_candidates(t, every))
        return [float(m["activations_bytes"][0]) for m in found]

    for less, more in zip(activations(Recompute.full), activations(Recompute.none), strict=True):
        assert less <= more * (1 + 1e-12)


def matrices(model: Model, *, every_rank: bool = False, **key: int) -> Stages:
    plain = {
        "schedule": int(Pipeline.one_f_one_b),
        "pp": 4,
        "vpp": 1,
        "num_microbatches": 16,
        "microbatch_group_size": 0,
        "first": 0,
        "last": 0,
        "account_for_embedding": 0,
        "account_for_loss": 0,
        "recompute_block": 0,
        "recompute_num_layers": 0,
    }
    made = PipelineKey(**plain | key, pipeline_layout=None)
    return stages(layer_facts(model), made, every_rank=every_rank)


def test_stages_run_every_block_once() -> None:
    s = matrices(dense_model(num_layers=16))
    layers, embedding, head = s.runs.T
    assert layers.tolist() == [4, 4, 4, 4]
    assert embedding.tolist() == [1, 0, 0, 0]
    assert head.tolist() == [0, 0, 0, 1]


def test_a_tied_table_is_held_at_both_ends_of_a_pipeline() -> None:
    tied, untied = (
        matrices(dense_model(num_layers=16, tied=t)).params[:, 1] for t in (True, False)
    )
    assert tied.tolist() == [1, 0, 0, 1]
    assert untied.tolist() == [1, 0, 0, 0]
    alone = matrices(dense_model(num_layers=16, tied=True), pp=1)
    assert alone.params[:, 1].tolist() == [1]


def test_a_token_prediction_layer_embeds_and_runs_the_head_once_more_but_holds_neither_twice() -> (
    None
):
    s = matrices(moe_model(num_layers=16, mtp=1))
    embedding, head, mtp = s.runs[:, 1], s.runs[:, 2], s.runs[:, 3]
    assert head.tolist() == [0, 0, 0, 2]
    assert mtp.tolist() == [0, 0, 0, 1]
    assert embedding.tolist() == [1, 0, 0, 1]
    assert s.params[:, 2].tolist() == [0, 0, 0, 1]


def held_layers(s: Stages) -> dict[int, float]:
    """Return the most layers' activations that each pipeline rank holds."""
    out: dict[int, float] = {}
    for rank, held in zip(s.candidate_rank, s.held[:, 0], strict=True):
        out[rank] = max(out.get(rank, 0.0), float(held))
    return out


@pytest.mark.parametrize(
    ("key", "micro_batches"),
    [
        ({}, [4, 3, 2, 1]),
        ({"schedule": int(Pipeline.gpipe)}, [16, 16, 16, 16]),
        ({"num_microbatches": 2}, [2, 2, 2, 1]),
        # Chunks of half a stage: 11, 9, 7, 5 of them with Megatron-LM's warm-up.
        ({"schedule": int(Pipeline.interleaved), "vpp": 2}, [5.5, 4.5, 3.5, 2.5]),
    ],
)
def test_ranks_hold_the_micro_batches_of_their_schedule(
    key: dict[str, int], micro_batches: list[float]
) -> None:
    held = held_layers(matrices(dense_model(num_layers=16), every_rank=True, **key))
    assert [held[r] / 4 for r in range(4)] == micro_batches


def test_sharded_experts_are_divided_by_ep_and_etp_and_dense_weights_by_tp_alone() -> None:
    model = moe_model(num_layers=16)
    fixed = {"gpus": 64, "zero": Zero.no_shard}

    def weights(x: Layout[int]) -> float:
        t, g = group_of(model, as_table([x]))
        return float(next(memory_of_candidates(t, g))["weights_bytes"][0])

    one, ep4, ep4_etp2 = (
        weights(layout(**fixed, **d)) for d in ({}, {"ep": 4}, {"ep": 4, "etp": 2})
    )
    experts = 2.0 * model.num_expert_params
    assert one - ep4 == pytest.approx(experts * (1 - 1 / 4), rel=1e-9)
    assert one - ep4_etp2 == pytest.approx(experts * (1 - 1 / 8), rel=1e-9)


def test_a_lora_job_keeps_gradients_and_optimizer_for_its_adapters_alone() -> None:
    x = as_table([layout(gpus=8, zero=Zero.no_shard)])
    full, lora = (
        next(memory_of_candidates(*group_of(dense_model(), x, replace(JOB, task=task), "8xH100")))
        for task in ("sft", "lora")
    )
    assert lora["weights_bytes"] == full["weights_bytes"]
    rank, h, kv, ffn = 16, 1024, 512, 2816
    per_layer = rank * ((h + h + 2 * kv) + (h + h) + (h + 2 * ffn) + (ffn + h))
    assert lora["grads_bytes"][0] == 4 * 16 * per_layer
    assert lora["optimizer_bytes"][0] == 12 * 16 * per_layer
    slow, fast = (
        simulated_step_s(group_of(dense_model(), x, replace(JOB, task=task), "8xH100")[0])[0]
        for task in ("sft", "lora")
    )
    assert fast < slow


def test_memory_terms_of_a_rank_are_those_that_are_named() -> None:
    t, g = group_of(gpt_model(), as_table([layout(pp=4, gpus=64)]))
    assert tuple(next(memory_of_candidates(t, g))) == MEMORY_TERMS


def test_other_factors_change_the_price() -> None:
    cluster = load_cluster("8xH100")
    x = layout(gpus=8)
    usual = estimate(dense_model(), cluster, JOB, x)
    roomy = replace(fitted(), framework_bytes=fitted().framework_bytes + 1e9)
    assert estimate(dense_model(), cluster, JOB, x, roomy).peak_bytes == usual.peak_bytes + 1e9
