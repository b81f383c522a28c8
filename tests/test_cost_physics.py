"""What a switch, a card or a setting does to the price: signs and laws of the physics."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from meshwright.cost.comm import Span, all_reduce_s, network
from meshwright.cost.compute import power_fraction, speeds
from meshwright.cost.detail import Estimate, estimate
from meshwright.cost.exchange import context_parallel_s
from meshwright.cost.factors import Factors, factors_of, fitted, most_specific
from meshwright.cost.memory import statistic_bytes
from meshwright.cost.ops import op_seconds
from meshwright.cost.pricing import pricing
from meshwright.cost.slices import slices
from meshwright.describe.cluster import load_cluster, load_gpu
from meshwright.describe.job import Execution, Job, precision
from meshwright.describe.models import load_model
from meshwright.fit.fitting import (
    LIMITS,
    Measured,
    fit,
    left_out_errors,
    log_errors,
    predicted_s,
    slopes_of,
    uninformed,
    value_of,
    with_values,
)
from meshwright.fit.rows import Run
from meshwright.parallel.layout import CpComm, Recompute, Zero, layout, table

LLAMA = load_model("llama3-8b")
DEEPSEEK = load_model("deepseek-v3")
RACK = load_cluster("64xGB200")
SPLIT = "Et*7|(t*8|)*6t*6mL"


def job(**execution: object) -> Job:
    switches = Execution(**execution)  # pyright: ignore[reportArgumentType]
    return Job(seq_len=4096, gbs=64, execution=switches)


def llama(**switches: object) -> Estimate:
    x = layout(tp=2, gpus=8)
    return estimate(LLAMA, load_cluster("8xH100"), job(**switches), x)


def deepseek(**switches: object) -> Estimate:
    x = layout(pp=8, ep=32, gpus=256, recompute=Recompute.full, pipeline_layout=SPLIT)
    cluster = load_cluster("256xH100")
    return estimate(DEEPSEEK, cluster, replace(job(**switches), gbs=512), x)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    "slower",
    [
        {"fused_kernels": False},
        {"flash_attention": False},
        {"overlap_tp_comm": False},
        {"overlap_grad_reduce": False, "overlap_param_gather": False},
        {"fused_wgrad_accumulation": False},
        {"recompute_every_second_matmul": True},
        {"tuned_attention": False},
    ],
)
def test_what_is_switched_off_costs_time(slower: dict[str, object]) -> None:
    assert llama(**slower).step_time_s > llama().step_time_s


def test_unfused_softmax_is_slower_still() -> None:
    fused = llama(flash_attention=False).step_time_s
    assert llama(flash_attention=False, fused_softmax=False).step_time_s > fused


@pytest.mark.parametrize(
    "slower",
    [
        {"dispatcher": "alltoall", "cuda_graphs": "full"},
        {"dispatcher": "deepep", "cuda_graphs": "none"},
        {"dispatcher": "deepep", "cuda_graphs": "full", "forced_balance": False},
        {"dispatcher": "deepep", "cuda_graphs": "full", "fused_permute": False},
    ],
)
def test_experts_run_best_balanced_graphed_and_sent_once(slower: dict[str, object]) -> None:
    best = deepseek(dispatcher="deepep", cuda_graphs="full")
    assert deepseek(**slower).step_time_s > best.step_time_s


def test_graphs_of_some_modules_save_part_of_what_whole_graphs_save() -> None:
    none, whole = deepseek(), deepseek(cuda_graphs="full")
    part = deepseek(cuda_graphs="partial", graphed_modules=frozenset({"attn", "moe_router"}))
    assert whole.step_time_s <= part.step_time_s <= none.step_time_s


def test_overlapping_the_exchange_of_experts_saves_part_of_it_beside_what_its_kernels_take() -> (
    None
):
    # As fitted: kernels that send tokens take multiprocessors from the compute they hide behind.
    apart = deepseek().time["ep_comm_s"]
    assert 0.3 * apart < deepseek(overlap_ep_comm=True).time["ep_comm_s"] < 0.7 * apart


def test_a_power_limit_slows_matmuls_less_than_in_proportion() -> None:
    full, limited = load_gpu("H100-SXM-80GB"), load_gpu("H100-SXM-80GB-500W", nearest=True)
    factors = with_values(fitted(), {"clock_fraction.H100-SXM-80GB": 1.0})
    share = power_fraction(limited, Execution(), factors) / power_fraction(
        full, Execution(), factors
    )
    assert 500 / 700 < share < 1.0


def test_boosting_the_cores_speeds_up_matmuls() -> None:
    assert llama(power_boost=True).step_time_s < llama().step_time_s


def test_short_heads_are_slower_per_flop() -> None:
    at = speeds(load_gpu("H100"), precision("bf16"), Execution(), fitted())
    per_flop = [
        (2.0 * d / at.attention_flops_per_s + 1.0 / at.exponentials_per_s) / d for d in (64, 128)
    ]
    assert per_flop[0] > per_flop[1]


def test_blackwell_ultra_takes_exponentials_twice_as_fast() -> None:
    recipe, factors = precision("bf16"), fitted()
    b200, b300 = (speeds(load_gpu(n), recipe, Execution(), factors) for n in ("B200", "B300"))
    clocks = [power_fraction(load_gpu(n), Execution(), factors) for n in ("B200", "B300")]
    ratio = b300.exponentials_per_s / b200.exponentials_per_s
    assert ratio == pytest.approx(2.0 * clocks[1] / clocks[0])


def test_the_most_specific_share_counts() -> None:
    table = {"hopper": 0.7, "hopper.fp8": 0.6, "fp4": 0.4}
    assert most_specific(table, "Hopper", "fp8", 0.1) == 0.6
    assert most_specific(table, "Hopper", "bf16", 0.1) == 0.7
    assert most_specific(table, "Blackwell Ultra", "fp4", 0.1) == 0.4
    assert most_specific(table, "Volta", "fp16", 0.1) == 0.1


def test_adapters_cost_less_than_training_every_weight() -> None:
    x, cluster = layout(tp=2, gpus=8), load_cluster("8xH100")
    whole = estimate(LLAMA, cluster, job(), x)
    lora = estimate(LLAMA, cluster, replace(job(), task="lora"), x)
    few = estimate(LLAMA, cluster, replace(job(), task="lora", lora_targets=frozenset({"qkv"})), x)
    assert few.step_time_s < lora.step_time_s < whole.step_time_s
    assert lora.memory["optimizer_bytes"] < 0.1 * whole.memory["optimizer_bytes"]


def test_packed_samples_attend_to_less() -> None:
    assert llama(packed_sample_tokens=256).step_time_s < llama().step_time_s


def test_checkpointing_by_op_keeps_about_half() -> None:
    whole = llama().memory["activations_bytes"]
    kept = llama(recompute_every_second_matmul=True).memory["activations_bytes"]
    assert 0.2 * whole < kept < 0.6 * whole


@pytest.mark.parametrize(
    ("less", "more"),
    [
        ({"compiled_cross_entropy": False}, {"compiled_cross_entropy": True}),
        ({"fused_cross_entropy": True}, {"fused_cross_entropy": False}),
        (
            {"fused_cross_entropy": False},
            {"fused_cross_entropy": False, "in_place_cross_entropy": False},
        ),
        ({"keeps_placeholders": False}, {"keeps_placeholders": True}),
    ],
)
def test_losses_and_placeholders_hold_memory(
    less: dict[str, object], more: dict[str, object]
) -> None:
    assert llama(**less).peak_bytes < llama(**more).peak_bytes


def test_kinds_of_memory_nest() -> None:
    terms = {"peak_bytes": 60e9, "framework_bytes": 5e9, "logits_bytes": 2e9, "buffers_bytes": 1e9}
    kinds = [statistic_bytes(terms, kind, 0.5) for kind in ("allocated", "reserved", "nvidia-smi")]
    assert kinds == [55e9, 56.5e9, 60e9]


def test_every_fitted_factor_is_within_what_it_may_be() -> None:
    for name, (low, high) in LIMITS.items():
        assert low <= value_of(fitted(), name) <= high * 1.001, name


def runs_of(factors: Factors, gpus: str = "8xH100") -> list[Measured]:
    cluster = load_cluster(gpus)
    found: list[Measured] = []
    for tp in (1, 2, 4, 8):
        run = Run(
            model=LLAMA,
            cluster=cluster,
            job=job(),
            layout=layout(tp=tp, gpus=8, zero=Zero.optim),
            statistic="allocated",
            rank="fullest",
            is_module=False,
            assumed=(),
        )
        found.append(Measured(run, predicted_s(run, factors)))
    return found


def test_the_fit_finds_a_planted_factor() -> None:
    names = ["matmul_fraction.hopper"]
    planted = with_values(fitted(), {names[0]: value_of(fitted(), names[0]) * 0.9})
    found = fit(runs_of(planted), fitted(), names, iterations=3)
    assert value_of(found, names[0]) == pytest.approx(value_of(planted, names[0]), rel=0.01)


def test_runs_left_out_of_a_consistent_fit_are_predicted_as_well() -> None:
    names = ["matmul_fraction.hopper", "hbm_fraction"]
    factors = with_values(fitted(), {"hbm_fraction": Factors().hbm_fraction})
    runs = runs_of(factors)
    errors = log_errors(runs, factors)
    slopes = slopes_of(runs, factors, names, errors)
    left_out = left_out_errors(errors, slopes, ["a", "a", "b", "b"], factors, names)
    assert np.allclose(left_out, 0.0, atol=1e-9)
    wrong = errors + np.array([0.0, 0.0, 0.3, 0.0])
    alone = left_out_errors(wrong, slopes, ["a", "a", "b", "a"], factors, names)
    assert alone[2] == pytest.approx(0.3)


def test_what_no_other_run_informs_goes_back_to_its_prior() -> None:
    names = ["clock_fraction.B200-SXM-180GB"]
    factors = with_values(fitted(), {names[0]: 0.9})
    runs = runs_of(factors, "8xB200")
    errors = log_errors(runs, factors)
    slopes = slopes_of(runs, factors, names, errors)
    left_out = left_out_errors(errors, slopes, ["a"] * 4, factors, names)
    assert np.all(left_out < 0.0)
    assert left_out[0] < -0.05
    assert uninformed(factors, names[0]) == 1.0
    assert uninformed(factors, "hbm_fraction") == Factors().hbm_fraction


def test_a_fit_without_some_runs_stays_within_the_limits_of_its_factors() -> None:
    names = ["hbm_fraction"]
    factors = with_values(fitted(), {names[0]: LIMITS[names[0]][1]})
    slopes = np.full((2, 1), -1.0)
    errors = np.array([0.5, 0.0])
    # The run that is kept asks for faster memory than any card has.
    left_out = left_out_errors(errors, slopes, ["a", "b"], factors, names)
    assert left_out[1] == pytest.approx(0.0, abs=1e-12)


def ring(cp: int, mbs: int, cp_comm: CpComm = CpComm.p2p, **hints: object) -> Estimate:
    x = layout(cp=cp, mbs=mbs, gpus=32, cp_comm=cp_comm, **hints)  # pyright: ignore[reportArgumentType]
    long = Job(seq_len=16384, gbs=64, execution=Execution())
    return estimate(LLAMA, load_cluster("32xH100"), long, x)


def test_splitting_a_sequence_costs_more_than_splitting_the_batch() -> None:
    # As many tokens a rank and micro-batch; the ring launches more and merges what it finds.
    for cp in (2, 4, 8):
        assert ring(cp, cp).step_time_s > ring(1, 1).step_time_s
        assert ring(cp, cp).time["cp_comm_s"] > 0.0


def test_levels_of_hierarchical_context_parallelism_move_its_price() -> None:
    both = {
        a2a: ring(16, 1, CpComm.a2a_p2p, hierarchical_cp=(a2a, 16 // a2a)).time["cp_comm_s"]
        for a2a in (1, 4, 8, 16)
    }
    assert both[1] == pytest.approx(ring(16, 1).time["cp_comm_s"])
    assert both[16] == pytest.approx(ring(16, 1, CpComm.a2a).time["cp_comm_s"])
    assert both[8] < both[4]
    most_square = ring(16, 1, CpComm.a2a_p2p).time["cp_comm_s"]
    assert most_square == pytest.approx(both[4])


def test_ranks_that_share_a_key_value_head_each_pass_it_on() -> None:
    # Of 8 key-value heads 16 ranks hold one each, as 8 do.
    x = table(
        [layout(tp=tp, cp=2, gpus=64, mbs=16, cp_comm=CpComm.all_gather) for tp in (4, 8, 16)]
    )
    at = job()
    p = pricing(slices(LLAMA, RACK, at, x), at, RACK, replace(fitted(), collective_s=0.0))
    (op,) = (o for o in LLAMA.layer_kinds[0].ops if o.num_kv_heads)
    (comm,) = (c for c in op.comm if c.kind == "cp_kv")
    four, eight, sixteen = context_parallel_s(op, comm, np.zeros(3), p)[0]
    assert four == pytest.approx(2.0 * eight, rel=0.1)
    assert sixteen == eight


def test_a_switch_that_reduces_halves_at_most_an_all_reduce_of_its_domain() -> None:
    cluster = load_cluster("16xH100")
    assert cluster.nvls
    plain, reducing = (network(replace(cluster, nvls=on), fitted()) for on in (False, True))
    size, one = np.array([1e9]), np.array([8.0])
    inside, across = Span(one, one), Span(2 * one, one)
    fast, slow = (all_reduce_s(size, inside, net)[0] for net in (reducing, plain))
    assert 0.5 * slow <= fast < slow
    assert all_reduce_s(size, across, reducing)[0] == all_reduce_s(size, across, plain)[0]


def test_delayed_weight_gradients_hide_what_is_left_of_the_exchange() -> None:
    overlapped = deepseek(overlap_ep_comm=True).time["ep_comm_s"]
    delayed = deepseek(overlap_ep_comm=True, delay_weight_grad=True).time["ep_comm_s"]
    assert 0.0 < delayed < overlapped
    assert deepseek(delay_weight_grad=True).step_time_s == deepseek().step_time_s


def test_offloaded_activations_wait_for_the_host_link_where_compute_is_shorter() -> None:
    x, slow = layout(tp=2, gpus=8), load_cluster("8xH100")
    slow = replace(slow, host=replace(slow.host, bytes_per_s=1e9))
    away = job(offloaded_modules=frozenset({"core_attn", "attn_norm"}))
    half, whole = (job(activation_offload_layers=n) for n in (16, 32))
    times = [estimate(LLAMA, slow, j, x).step_time_s for j in (job(), away, half, whole)]
    assert times[0] < min(times[1:])
    assert times[2] < times[3]
    fast = replace(slow, host=replace(slow.host, bytes_per_s=1e15))
    assert (
        estimate(LLAMA, fast, whole, x).step_time_s == estimate(LLAMA, fast, job(), x).step_time_s
    )


def test_modules_of_python_bound_the_step_of_a_small_model() -> None:
    tiny = Job(seq_len=128, gbs=8, execution=Execution())
    graphs = replace(tiny, execution=Execution(cuda_graphs="full"))
    x, cluster = layout(gpus=8), load_cluster("8xH100")
    slow, fast = (estimate(LLAMA, cluster, j, x).time["compute_s"] for j in (tiny, graphs))
    # Megatron-LM's tests of tiny models on H100: 2.75 ms a layer, forward and backward.
    per_layer = (slow / LLAMA.num_layers) * 1e3
    assert 1.5 < per_layer < 4.0
    assert fast < 0.7 * slow


def test_running_experts_in_turn_costs_little_with_one_a_rank_and_much_with_many() -> None:
    def times(model: str, ep: int) -> float:
        def step_s(*, grouped: bool) -> float:
            switches = replace(job(grouped_gemm=grouped, cuda_graphs="none"), gbs=512)
            x = layout(ep=ep, gpus=64)
            return estimate(load_model(model), load_cluster("64xH200"), switches, x).step_time_s

        return step_s(grouped=False) / step_s(grouped=True)

    assert 0.99 < times("mixtral-8x22b", 8) < 1.05
    assert times("qwen3-30b-a3b", 8) > 1.2


@pytest.mark.parametrize("recipe", ["bf16", "fp8", "fp8-mx"])
def test_a_frozen_weight_needs_fewer_copies_of_what_is_quantised(recipe: str) -> None:
    def forward_s(task: str) -> float:
        targets = frozenset({"qkv"})
        asked = Job(seq_len=4096, gbs=64, precision=precision(recipe), task=task)  # pyright: ignore[reportArgumentType]
        asked, cluster = replace(asked, lora_targets=targets), load_cluster("8xH100")
        part = slices(LLAMA, cluster, asked, table([layout(gpus=8)]))
        fc1 = next(op for block in LLAMA.block_kinds for op in block.ops if op.name == "fc1")
        return float(op_seconds(fc1, pricing(part, asked, cluster, fitted()))[0][0])

    if recipe == "bf16":
        assert forward_s("lora") == forward_s("pretrain")
    else:
        assert forward_s("lora") < forward_s("pretrain")


def test_what_a_cluster_measured_of_quantising_counts_for_every_recipe() -> None:
    cluster = replace(load_cluster("8xH100"), fitted={"quantise_traffic": 1.5})
    assert set(factors_of(cluster).quantise_traffic.values()) == {1.5}
    assert set(factors_of(cluster).quantise_traffic) == set(fitted().quantise_traffic)


def test_the_fullest_rank_of_experts_gets_at_most_every_token() -> None:
    def lost(model: str, ep: int, gpus: int) -> float:
        def step_s(*, balanced: bool) -> float:
            switches = replace(job(forced_balance=balanced, cuda_graphs="full"), gbs=512)
            x, cluster = layout(ep=ep, gpus=gpus), load_cluster(f"{gpus}xH200")
            time = estimate(load_model(model), cluster, switches, x).time
            return time["compute_s"]

        return step_s(balanced=False) / step_s(balanced=True)

    # Two of eight experts get a token: no rank gets more than four times the mean.
    assert lost("mixtral-8x22b", 8, 64) == pytest.approx(lost("mixtral-8x22b", 4, 64), rel=0.02)
    assert lost("deepseek-v3", 64, 512) > lost("deepseek-v3", 8, 512) > 1.0


def test_ranks_that_share_the_sending_of_a_message_send_it_faster() -> None:
    def message_s(*, scatters: bool, sp: bool) -> float:
        x = layout(tp=8, pp=2, gpus=16, sp=sp)
        time = estimate(LLAMA, load_cluster("16xA100"), job(scatters_messages=scatters), x).time
        return time["pp_comm_s"]

    assert message_s(scatters=True, sp=False) < 0.3 * message_s(scatters=False, sp=False)
    assert message_s(scatters=True, sp=True) == message_s(scatters=False, sp=True)
