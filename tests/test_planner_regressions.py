"""Defects found in the planner, kept fixed. Provenance: ours."""

from __future__ import annotations

import pytest

import meshwright as mw
from meshwright import api
from meshwright.cost import step
from meshwright.cost.step import prepare, simulated_step_s
from meshwright.describe.cluster import build_cluster, load_cluster
from meshwright.describe.job import Job
from meshwright.errors import MeshwrightError
from meshwright.parallel.layout import from_text, table

LLAMA = mw.load_model("llama3-8b")


def test_full_sharding_gathers_frozen_weights_too() -> None:
    cluster, layout = load_cluster("64xA100"), "zero=optim_grads_params"
    sft = api.job(LLAMA, 4096, 64, task="sft")
    lora = api.job(LLAMA, 4096, 64, task="lora")
    whole = api.estimate(LLAMA, cluster, sft, layout).estimate.time["dp_comm_s"]
    frozen = api.estimate(LLAMA, cluster, lora, layout).estimate.time["dp_comm_s"]
    assert frozen > 0.2 * whole


@pytest.mark.parametrize("cluster", ["64xH20", "8xH100", "8xA100", "8xMI250X"])
@pytest.mark.parametrize("task", ["pretrain", "lora"])
def test_no_layout_computes_faster_than_the_card(cluster: str, task: str) -> None:
    plans = api.plan(LLAMA, load_cluster(cluster), api.job(LLAMA, 8192, 512, task=task))
    best = (plans.plans or [plans.closest])[0]
    assert best is not None
    assert 0 < best.estimate.mfu_fraction < 0.9


@pytest.mark.parametrize("text", ["pp=4", "pp=8 vpp=2", "pp=4 schedule=zb_h1", "pp=4 vpp=2"])
def test_a_long_pipeline_takes_what_simulating_all_of_it_says(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster, x = load_cluster("8xH100"), table([from_text(text, gpus=8)])
    long = prepare(LLAMA, cluster, Job(seq_len=4096, gbs=4096), x)
    quick = simulated_step_s(long)[0]
    monkeypatch.setattr(step, "MOST_SIMULATED", 10**9)
    assert simulated_step_s(long)[0] == pytest.approx(quick, rel=1e-9)


def test_a_split_backward_keeps_a_recomputed_micro_batch_whole() -> None:
    cluster, job = load_cluster("8xH100"), Job(seq_len=8192, gbs=64)
    text = "tp=2 pp=4 mbs=4 recompute=full schedule="
    split, joined = (
        sum(stage[term] for term in ("activations_bytes", "buffers_bytes"))
        for name in ("zb_h1", "1f1b")
        for stage in api.estimate(LLAMA, cluster, job, text + name).estimate.stages[:1]
    )
    assert split > 1.5 * joined


def test_copies_of_a_shard_add_their_gradients_once_a_step() -> None:
    cluster, job = load_cluster("64xH100"), Job(seq_len=8192, gbs=1024)
    text = "zero=optim_grads_params dp_replicate="
    whole, copies = (
        api.estimate(LLAMA, cluster, job, text + n).estimate.time["dp_comm_s"] for n in ("1", "8")
    )
    assert copies <= 1.05 * whole


def test_small_batches_have_legal_layouts() -> None:
    model = mw.load_model("llama3-70b")
    plans = api.plan(model, load_cluster("64xH100"), api.job(model, 8192, 1))
    assert plans.plans


def test_a_measured_factor_of_a_cluster_counts(tmp_path: object) -> None:
    from dataclasses import replace

    usual = load_cluster("8xH100")
    slow = replace(usual, fitted={"matmul_fraction": 0.2})
    job = Job(seq_len=4096, gbs=64)
    times = [api.estimate(LLAMA, c, job, "tp=2").estimate.step_time_s for c in (usual, slow)]
    assert times[1] > 1.5 * times[0]
    wrong = replace(usual, fitted={"matmul_fractoin": 0.2})
    with pytest.raises(MeshwrightError, match="matmul_fraction"):
        api.estimate(LLAMA, wrong, job, "tp=2")


def test_the_smallest_cluster_can_be_planned() -> None:
    one = build_cluster("H100", 1)
    plans = api.plan(LLAMA, one, api.job(LLAMA, 8192, 64))
    assert not plans.plans
    small = plans.smallest_cluster
    assert small is not None
    again = api.plan(LLAMA, load_cluster(small.cluster.name), api.job(LLAMA, 8192, 64), top=1)
    fastest = again.plans[0].estimate.step_time_s
    assert fastest == pytest.approx(small.estimate.step_time_s)


@pytest.mark.parametrize("change", ["pp=1", "pp=8", "schedule=1f1b", "tp=8"])
def test_the_common_questions_have_a_price(change: str) -> None:
    model = mw.load_model("llama3-70b")
    job = api.job(model, 8192, 512)
    told = api.why_not(model, load_cluster("64xH100"), job, "tp=4 pp=4 vpp=5 cp=2", change)
    assert told.other is not None
    assert "takes" in told.verdict()


@pytest.mark.parametrize(
    "text", ["recompute=full:block:99999999999999999999", "recompute=full:uniform:²"]
)
def test_numbers_of_layers_that_cannot_be_are_refused(text: str) -> None:
    with pytest.raises(MeshwrightError):
        from_text(text, gpus=8)


def test_a_device_is_no_config() -> None:
    with pytest.raises(MeshwrightError):
        mw.load_model("/dev/zero")
