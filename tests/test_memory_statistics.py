"""Which memory is asked for: live, reserved or all; of which rank and after which iteration."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from meshwright.cost.detail import Estimate, estimate
from meshwright.cost.factors import fitted
from meshwright.cost.memory import spare_fraction, weights_bytes_per_param
from meshwright.describe.cluster import load_cluster
from meshwright.describe.job import Execution, Job
from meshwright.describe.models import load_model
from meshwright.fit.documents import load_models, load_runs, shipped
from meshwright.fit.predict import predict
from meshwright.parallel.layout import Recompute, Zero, layout, table


def job(**changes: Any) -> Job:
    return Job(seq_len=4096, gbs=64, execution=Execution(**changes))


def priced(j: Job) -> Estimate:
    return estimate(load_model("llama3-8b"), load_cluster("8xH100"), j, layout(gpus=8, tp=2))


def row(**changes: str) -> dict[str, str]:
    cells = {"id": "run", "model": "llama3-8b", "gpu": "H100-SXM-80GB", "n_gpus": "8"}
    cells |= {"gbs": "64", "mbs": "1", "seq_len": "4096", "precision": "bf16", "tp": "2"}
    cells |= {"task": "pretrain", "recompute": "none", "peak_memory_stat": "allocated"}
    return cells | changes


def peak(**changes: str) -> float:
    (found,) = predict([row(**changes)], load_models(shipped("models.json.gz")))
    assert found.peak_bytes is not None, found.why
    return found.peak_bytes


def test_segments_that_can_grow_leave_a_quarter_of_what_others_leave_unused() -> None:
    plain, growing = (priced(job(expandable_segments=grows)) for grows in (False, True))
    come_and_go = plain.memory["logits_bytes"] + plain.memory["buffers_bytes"]
    share = fitted().fragmentation_fraction - fitted().expandable_fraction
    assert plain.peak_bytes - growing.peak_bytes == pytest.approx(share * come_and_go, rel=1e-9)


def test_reserved_memory_is_live_tensors_and_the_blocks_that_short_lived_ones_left() -> None:
    found = priced(job())
    come_and_go = found.memory["logits_bytes"] + found.memory["buffers_bytes"]
    spare = spare_fraction(job(), fitted()) * come_and_go
    software = fitted().framework_bytes + 2 * fitted().communicator_bytes  # tp and dp
    assert found.memory["framework_bytes"] == pytest.approx(software + spare, rel=1e-9)


@pytest.mark.parametrize(
    ("words", "fraction"),
    [
        ({}, "fragmentation_fraction"),
        ({"env_vars": {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}}, "expandable"),
        ({"env_vars": {"PYTORCH_ALLOC_CONF": "expandable_segments:False"}}, "fragmentation"),
        ({"framework": "torchtitan (FSDP2)"}, "expandable"),
    ],
)
def test_a_run_says_how_its_allocator_grows(words: dict[str, Any], fraction: str) -> None:
    asked = {"other_settings": json.dumps(words)}
    allocated, reserved = (peak(peak_memory_stat=s, **asked) for s in ("allocated", "reserved"))
    (found,) = predict([row(**asked)], load_models(shipped("models.json.gz")))
    assert found.estimate is not None
    come_and_go = found.estimate.memory["logits_bytes"] + found.estimate.memory["buffers_bytes"]
    used = getattr(fitted(), f"{fraction.removesuffix('_fraction')}_fraction")
    assert reserved - allocated == pytest.approx(used * come_and_go, rel=1e-9)


def test_pytorchs_fsdp_keeps_no_16_bit_shards_beside_the_fp32_ones() -> None:
    x = table([layout(gpus=8, zero=z) for z in (Zero.optim_grads, Zero.optim_grads_params)])
    kept = weights_bytes_per_param(job(), x).dense
    cast = weights_bytes_per_param(job(gathers_from_master=True), x).dense
    assert np.array_equal(kept, [2.0, 0.25])
    assert np.array_equal(cast, [2.0, 0.0])


def test_in_the_first_iteration_the_moments_come_after_backward() -> None:
    # Micro-batches large enough that forward and backward hold more than the update.
    kinds = (f"peak GB after iteration {n}" for n in (2, 1))
    usual, first = (peak(mbs="8", peak_memory_kind=kind) for kind in kinds)
    (found,) = predict([row(mbs="8")], load_models(shipped("models.json.gz")))
    assert found.estimate is not None
    moments = found.estimate.memory["optimizer_bytes"] * 8 / 12
    assert usual - first == pytest.approx(moments, rel=1e-9)


def test_a_peak_of_no_named_statistic_is_megatrons_own_report_after_its_first_iteration() -> None:
    report = {"peak_memory_stat": "unnamed", "peak_memory_kind": "peak GB"}
    assert peak(**report) == peak(peak_memory_kind="after iteration 1")
    assert peak(peak_memory_stat="unnamed", peak_memory_kind="iteration 2") == peak()
    titan = json.dumps({"framework": "torchtitan"})
    assert peak(**report, other_settings=titan) == peak(other_settings=titan)


def test_rank_0_of_a_mixture_gets_its_mean_share_of_tokens() -> None:
    mixture = {"model": "mixtral-8x7b", "tp": "1", "ep": "8", "etp": "1"}
    free = json.dumps({"moe_router_force_load_balancing": False})
    forced = json.dumps({"moe_router_force_load_balancing": True})
    any_rank = peak(**mixture, other_settings=free, peak_memory_kind="allocated GiB rank 0")
    assert any_rank == peak(**mixture, other_settings=forced)
    assert any_rank < peak(**mixture, other_settings=free)


def test_torchtitan_cuts_the_batch_of_a_pipeline_into_a_micro_batch_a_stage() -> None:
    cells = {"pp": "4", "vpp": "1", "mbs": "", "gbs": "64", "tp": "1"}
    titan = json.dumps({"framework": "torchtitan", "pp_schedule": "1f1b"})
    # 64 sequences on 2 ranks of data parallelism in 4 micro-batches: 8 each.
    eight = {**cells, "mbs": "8"}
    assert peak(**cells, other_settings=titan) == peak(**eight, other_settings=titan)


def test_torchtitan_compiles_its_loss_on_cards_that_came_with_it() -> None:
    # The release may not be read; software for Blackwell is of 2025, when the loss is compiled.
    titan = json.dumps({"framework": "torchtitan", "torch_compile": True})
    eager = json.dumps({"framework": "torchtitan", "torch_compile": False})
    logits = 4096 * 128256 / 2
    # Plain: 4 bytes kept and 8 in backward; compiled: 2 and 2, when layers may need more.
    compiled, plain = (peak(gpu="B200", other_settings=words) for words in (titan, eager))
    assert plain - compiled > 7.5 * logits
    assert peak(other_settings=titan, release="2026") == peak(other_settings=titan, release="2024")


def test_reserved_memory_of_runs_that_were_not_fitted_is_within_7_percent() -> None:
    # torchtitan's table 1 and 3 of 2024-12: fitted were SimuMax and Megatron-Bridge alone.
    rows = [
        r
        for r in load_runs(shipped("memory.csv.gz"))
        if "llama3.1-8b" in r["id"] and r["peak_memory_stat"] == "reserved"
    ]
    found = predict(rows, load_models(shipped("models.json.gz")))
    errors = [abs((p.peak_bytes or 0) / (p.measured_peak_bytes or 1) - 1) for p in found]
    assert len(errors) >= 7
    assert max(errors) < 0.07
    assert np.median(errors) < 0.02


def test_deepspeeds_first_stage_sums_fp16_gradients_as_they_are_and_bf16_ones_in_fp32_beside() -> (
    None
):
    models, deepspeed = load_models(shipped("models.json.gz")), {"framework": "Megatron-DeepSpeed"}
    words = json.dumps({**deepspeed, "zero_stage": 1})
    rows = [row(precision=p, other_settings=words) for p in ("fp16", "bf16")]
    half, brain = (p.estimate.memory for p in predict(rows, models) if p.estimate)
    assert half["grads_bytes"] == half["weights_bytes"]
    assert brain["grads_bytes"] == 3 * brain["weights_bytes"]


def test_a_frameworks_buckets_are_held_beside_weights_and_gradients() -> None:
    without, flat = (priced(job(bucket_bytes=size)) for size in (0.0, 2e9))
    more = 2e9 * (1 + fitted().fragmentation_fraction)
    assert flat.peak_bytes - without.peak_bytes == pytest.approx(more, rel=1e-9)


def test_layers_that_are_run_again_come_and_go() -> None:
    j, cluster = job(), load_cluster("8xH100")
    x = layout(gpus=8, tp=2, mbs=8, recompute=Recompute.full)
    found = estimate(load_model("llama3-8b"), cluster, j, x)
    (rank,) = found.stages
    # Kept are the inputs of 32 layers and of the last norm and head, nothing of the layer at work.
    inputs = 8 * 4096 * 4096 * 2 / 2
    assert rank["activations_bytes"] <= 34 * inputs
    assert rank["buffers_bytes"] > 4 * inputs


def test_composers_fused_loss_keeps_logits_in_16_bit() -> None:
    # llm-foundry's default loss_fn is flash-attention's cross-entropy, which works in place.
    composer = json.dumps({"framework": "composer"})
    (found,) = predict([row(other_settings=composer)], load_models(shipped("models.json.gz")))
    assert found.estimate is not None
    first = found.estimate.stages[0]
    assert first["logits_bytes"] in (0, 2 * 4096 * 128256 / 2)
