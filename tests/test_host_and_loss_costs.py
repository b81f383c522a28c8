"""What the host, the loss, attention and experts cost: laws, and measured times."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from meshwright.cost.comm import Span, dispatch_s, network
from meshwright.cost.detail import Estimate, estimate
from meshwright.cost.factors import fitted
from meshwright.cost.ops import LOSS_BYTES, op_seconds
from meshwright.cost.pricing import pricing
from meshwright.cost.slices import slices
from meshwright.describe.cluster import load_cluster
from meshwright.describe.job import Execution, Job, precision
from meshwright.describe.model import Model, OpKind
from meshwright.describe.models import load_model
from meshwright.parallel.layout import Recompute, layout, table

LLAMA = load_model("llama3-8b")
MOONLIGHT = load_model("moonlight-16b-a3b")
HOPPER = load_cluster("8xH100")

LOSSES = {
    "vendor": Execution(),
    "compiled": Execution(compiled_cross_entropy=True),
    "in_place": Execution(fused_cross_entropy=False),
    "plain": Execution(fused_cross_entropy=False, in_place_cross_entropy=False),
}


def loss_s(execution: Execution) -> float:
    """Return the seconds of the loss of one micro-batch, both ways."""
    asked = Job(seq_len=4096, gbs=8, execution=execution)
    part = slices(LLAMA, HOPPER, asked, table([layout(gpus=8)]))
    ops = [op for block in LLAMA.block_kinds for op in block.ops]
    loss = next(op for op in ops if op.kind is OpKind.cross_entropy)
    forward, backward, _ = op_seconds(loss, pricing(part, asked, HOPPER, fitted()))
    return float(forward[0] + backward[0])


@pytest.mark.parametrize("kind", LOSSES)
def test_a_loss_moves_the_bytes_of_its_kind(kind: str) -> None:
    execution = LOSSES[kind]
    logits, peak = 4096 * LLAMA.vocab_size, HOPPER.gpu.hbm_bytes_per_s
    moved_s = sum(LOSS_BYTES[execution.cross_entropy]) * logits / (peak * fitted().hbm_fraction)
    assert loss_s(execution) == pytest.approx(moved_s + 2 * fitted().kernel_s, rel=1e-6)


def test_steps_in_fp32_take_several_times_a_fused_loss() -> None:
    assert loss_s(LOSSES["vendor"]) * 4 < loss_s(LOSSES["in_place"])
    assert loss_s(LOSSES["vendor"]) < loss_s(LOSSES["compiled"]) < loss_s(LOSSES["in_place"])


def small_step(model: Model, **changes: object) -> Estimate:
    """Return a step of one micro-batch on 8 GPUs, which the host bounds."""
    x = layout(tp=2, ep=8, gpus=8, **changes)  # pyright: ignore[reportArgumentType]
    asked = Job(seq_len=4096, gbs=4, execution=Execution(forced_balance=False))
    return estimate(model, HOPPER, asked, x)


def test_each_stretch_that_is_run_again_costs_the_host_what_was_measured() -> None:
    # Megatron-Bridge, Moonlight on 8 H100: attention run again adds 18 ms to a step of 27 layers,
    # norms and the activation of experts 49 ms.
    base = small_step(MOONLIGHT).step_time_s
    attention = small_step(MOONLIGHT, recompute=Recompute.core_attn).step_time_s - base
    several = Recompute.layernorm | Recompute.moe_act
    norms = small_step(MOONLIGHT, recompute=several).step_time_s - base
    assert attention == pytest.approx(0.0176, rel=0.4)
    assert norms == pytest.approx(0.0494, rel=0.4)


def test_graphs_save_the_host_what_it_takes_to_run_layers_again() -> None:
    graphs = Execution(cuda_graphs="full", forced_balance=False)
    asked = Job(seq_len=4096, gbs=4, execution=graphs)
    times = [
        estimate(MOONLIGHT, HOPPER, asked, layout(tp=2, ep=8, gpus=8, recompute=r)).step_time_s
        for r in (Recompute.none, Recompute.moe_act)
    ]
    assert 0 < times[1] - times[0] < 0.005


def test_handling_tokens_does_not_load_the_network() -> None:
    net = network(load_cluster("64xH100"), fitted())
    size, topk, nothing = np.asarray([1e8]), np.asarray([8.0]), np.asarray([0.0])
    nodes, node = (
        Span(np.asarray([64.0]), np.asarray([1.0])),
        Span(np.asarray([8.0]), np.asarray([8.0])),
    )
    far = [dispatch_s(size, handled, topk, nodes, net)[0] for handled in (nothing, size / 10)]
    near = [dispatch_s(size, handled, topk, node, net)[0] for handled in (nothing, size / 10)]
    assert far[0] == far[1]
    assert near[0] < near[1]


def test_the_async_tensor_parallelism_of_pytorch_hides_less_than_user_buffers() -> None:
    x, cluster = layout(tp=8, gpus=8), HOPPER

    def exposed_s(**switches: bool) -> float:
        asked = Job(seq_len=8192, gbs=8, execution=Execution(**switches))  # pyright: ignore[reportArgumentType]
        return estimate(LLAMA, cluster, asked, x).time["tp_comm_s"]

    none, whole = exposed_s(overlap_tp_comm=False), exposed_s()
    some = exposed_s(asynchronous_tp=True)
    assert whole < some < none
    # torchtitan with and without, 8B on 64 and 70B on 256 H100: 0.33 and 0.26 of it go.
    assert 0.25 < 1.0 - some / none < 0.34


def test_the_fullest_rank_gets_a_share_of_what_it_would_get_if_all_chose_it() -> None:
    share = fitted().imbalance_fraction
    asked = Job(seq_len=4096, gbs=8, execution=Execution(cuda_graphs="full"))
    deepseek = load_model("deepseek-v3")
    cluster = load_cluster("64xH200")

    def grouped_s(*, balanced: bool) -> float:
        switches = replace(asked, execution=replace(asked.execution, forced_balance=balanced))
        part = slices(deepseek, cluster, switches, table([layout(ep=16, gpus=64)]))
        ops = [op for block in deepseek.block_kinds for op in block.ops]
        fc1 = next(op for op in ops if op.kind is OpKind.grouped_matmul)
        return float(op_seconds(fc1, pricing(part, switches, cluster, fitted()))[0][0])

    assert grouped_s(balanced=False) == pytest.approx(
        grouped_s(balanced=True) * (1 + share * (16 - 1)), rel=1e-9
    )


def test_attention_in_fp8_is_faster_both_ways() -> None:
    def attention_s(*, fp8: bool) -> tuple[float, float]:
        asked = Job(seq_len=8192, gbs=8, execution=Execution(fp8_attention=fp8))
        part = slices(LLAMA, HOPPER, asked, table([layout(gpus=8)]))
        ops = [op for block in LLAMA.block_kinds for op in block.ops]
        attention = next(op for op in ops if op.kind is OpKind.attention)
        forward, backward, _ = op_seconds(attention, pricing(part, asked, HOPPER, fitted()))
        return float(forward[0]), float(backward[0])

    wide, narrow = attention_s(fp8=False), attention_s(fp8=True)
    assert 0.5 < narrow[0] / wide[0] < 0.9
    assert 0.5 < narrow[1] / wide[1] < 0.9


@pytest.mark.parametrize("recipe", ["bf16", "fp8-cs", "fp8-mx", "nvfp4"])
def test_fused_experts_save_what_passes_between_their_products(recipe: str) -> None:
    qwen, rack = load_model("qwen3-30b-a3b"), load_cluster("8xGB200")

    def experts_s(*, fused: bool) -> float:
        execution = Execution(fused_experts=fused, cuda_graphs="full")
        asked = Job(seq_len=4096, gbs=64, precision=precision(recipe), execution=execution)
        part = slices(qwen, rack, asked, table([layout(ep=8, gpus=8)]))
        priced = pricing(part, asked, rack, fitted())
        names = ("experts_fc1", "experts_activation", "experts_fc2")
        ops = {op.name: op for block in qwen.block_kinds for op in block.ops}
        return sum(float(sum(s[0] for s in op_seconds(ops[name], priced))) for name in names)

    if recipe in ("bf16", "fp8-cs"):
        # Transformer Engine, fuse_grouped_mlp_ops: block-scaled recipes alone have the kernels.
        assert experts_s(fused=True) == experts_s(fused=False)
    else:
        assert 0.7 < experts_s(fused=True) / experts_s(fused=False) < 0.95
