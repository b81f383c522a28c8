"""What frozen weights, adapters and fixed routing cost."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from meshwright.cost.detail import Estimate, estimate
from meshwright.cost.factors import fitted
from meshwright.cost.ops import op_seconds
from meshwright.cost.pricing import Pricing, pricing
from meshwright.cost.slices import slices
from meshwright.describe.cluster import load_cluster
from meshwright.describe.job import Execution, Job, Task, precision
from meshwright.describe.model import Op
from meshwright.describe.models import load_model
from meshwright.parallel.layout import Layout, layout, table

LLAMA = load_model("llama3-8b")
QKV = next(op for op in LLAMA.block_kinds[0].ops if op.name == "qkv")
NONE = frozenset({"nothing"})


def job(
    task: Task, recipe: str = "bf16", targets: frozenset[str] = NONE, **switches: object
) -> Job:
    return Job(
        seq_len=4096,
        gbs=64,
        task=task,
        lora_targets=targets,
        precision=precision(recipe),
        execution=Execution(**switches),  # pyright: ignore[reportArgumentType]
    )


def priced(made: Job, x: Layout[int]) -> Pricing:
    cluster = load_cluster("8xH100")
    return pricing(slices(LLAMA, cluster, made, table([x])), made, cluster, fitted())


def seconds(op: Op, made: Job, *, tp: int = 1) -> tuple[float, float, float]:
    parts = op_seconds(op, priced(made, layout(tp=tp, gpus=8)))
    fwd, dgrad, wgrad = (float(np.ravel(part)[0]) for part in parts)
    return fwd, dgrad, wgrad


def test_an_adapter_takes_what_its_traffic_and_its_kernels_take() -> None:
    plain, adapted = job("lora"), job("lora", targets=frozenset({"qkv"}))
    at = priced(plain, layout(gpus=8)).at
    fwd, bwd, _ = np.subtract(seconds(QKV, adapted), seconds(QKV, plain))
    k, n = QKV.in_features, QKV.out_features
    element_s = 4096 * 2.0 / at.hbm_bytes_per_s
    assert fwd == pytest.approx((k + 6 * n) * element_s + 4 * at.kernel_s)
    assert bwd == pytest.approx((5 * k + 4 * n) * element_s + 7 * at.kernel_s)


def test_a_divided_adapter_exchanges_its_low_rank_tensor() -> None:
    adapted = job("lora", targets=frozenset({"qkv"}))
    alone = replace(adapted, lora_targets=NONE)
    apart = [np.subtract(seconds(QKV, adapted, tp=t), seconds(QKV, alone, tp=t)) for t in (2, 4)]
    larger = replace(adapted, lora_rank=256)
    more = np.subtract(seconds(QKV, larger, tp=2), seconds(QKV, alone, tp=2))
    assert (more[:2] > apart[0][:2]).all()
    assert (apart[1][:2] > 40e-6).all()


@pytest.mark.parametrize(("recipe", "spared"), [("fp8", False), ("fp8-cs", True), ("bf16", False)])
def test_a_frozen_weight_spares_the_second_copy_unless_one_kernel_makes_both(
    recipe: str, spared: bool
) -> None:
    trained, frozen = seconds(QKV, job("sft", recipe)), seconds(QKV, job("lora", recipe))
    assert frozen[2] == 0.0 < trained[2]
    assert (frozen[1] < trained[1]) == spared
    assert (frozen[0] < trained[0]) == (recipe != "bf16")


def test_weights_that_are_not_kept_are_quantised_in_every_micro_batch() -> None:
    def step(recipe: str, task: Task, *, keeps: bool) -> Estimate:
        made = job(task, recipe, caches_quantised_weights=keeps)
        return estimate(LLAMA, load_cluster("8xH100"), made, layout(gpus=8))

    for task in ("sft", "lora"):
        kept, anew = (step("fp8-cs", task, keeps=k).step_time_s for k in (True, False))
        weights = sum(op.params for op in LLAMA.block_kinds[0].ops) * LLAMA.num_layers
        # Eight micro-batches of reading two bytes and writing two, less what is kept of them.
        most = 8 * weights * 4.0 / load_cluster("8xH100").gpu.hbm_bytes_per_s
        assert 0.3 * most < anew - kept < 1.2 * most
        assert step("bf16", task, keeps=True) == step("bf16", task, keeps=False)


def test_experts_that_follow_each_other_send_tokens_to_fewer_ranks() -> None:
    model = load_model("gpt-oss-120b")
    for gpus, ep in (("64xH100", 64), ("64xGB200", 64), ("64xH100", 8)):
        cluster, x = load_cluster(gpus), layout(gpus=64, ep=ep)
        waits = [
            estimate(model, cluster, made, x).time["ep_comm_s"]
            for made in (
                job("pretrain", dispatcher="deepep"),
                job("pretrain", dispatcher="deepep", neighbouring_experts=True),
            )
        ]
        assert 0.0 < waits[1] < waits[0]
