"""The rules: that each can fire and says so, that Megatron-LM agrees, and that rows stand alone."""

from __future__ import annotations

import re
import subprocess
import sys
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_cases import case_of
from meshwright.checks import Case, Check, all_checks, illegal, judge, judge_one
from meshwright.checks.divisibility import legal_tps
from meshwright.describe.cluster import Cluster, build_cluster, load_cluster
from meshwright.describe.job import Execution, Job, Task, precision
from meshwright.describe.model import Model
from meshwright.describe.models import load_model
from meshwright.findings import Finding
from meshwright.parallel.actions import schedule_order
from meshwright.parallel.cp_levels import exchanging_ranks
from meshwright.parallel.layout import (
    CpComm,
    Layouts,
    Pipeline,
    Recompute,
    Zero,
    layout,
    minimum_world_size,
    num_rows,
    table,
    take,
    with_columns,
)
from oracles import rows

CHECKS = {check.name: check for check in all_checks()}
TABLE_WIDE = ("order", "pipeline_layout", "hierarchical_cp")


@cache
def model_called(name: str) -> Model:
    return load_model(name)


@cache
def cluster_called(text: str) -> Cluster:
    return load_cluster(text)


def case(
    model: str = "llama3-70b",
    cluster: str | Cluster | None = None,
    *,
    seq_len: int = 8192,
    gbs: int = 512,
    precision_name: str = "bf16",
    task: Task = "pretrain",
    execution: dict[str, Any] | None = None,
    peak_bytes: float | None = None,
    **columns: Any,
) -> Case:
    """Return the case of one layout: tp=4 pp=4 dp=4 with sp unless told otherwise."""
    shared = {key: columns.pop(key) for key in TABLE_WIDE if key in columns}
    usual = {"tp": 4, "pp": 4, "dp": 4, "sp": 1, "vpp": 1, "schedule": 1}
    return Case(
        model=model_called(model),
        job=Job(
            seq_len=seq_len,
            gbs=gbs,
            task=task,
            precision=precision(precision_name),
            execution=Execution(**(execution or {})),
        ),
        x=with_columns(table([layout(**shared)]), **(usual | columns)),
        cluster=cluster_called(cluster) if isinstance(cluster, str) else cluster,
        peak_bytes=None if peak_bytes is None else np.array([peak_bytes]),
        capacity_bytes=None if peak_bytes is None else 80e9,
    )


def moe(model: str = "mixtral-8x7b", cluster: str | None = None, **changes: Any) -> Case:
    """Return the guides' Mixtral layout on 64 GPUs, or what the changes make of it."""
    usual: dict[str, Any] = {
        "tp": 1,
        "pp": 4,
        "dp": 16,
        "ep": 8,
        "sp": 0,
        "seq_len": 4096,
        "gbs": 256,
    }
    return case(model, cluster, **(usual | changes))


def said(case: Case, name: str) -> Finding:
    """Return what the rule called ``name`` says about the only row."""
    assert CHECKS[name].fires(case)[0], f"{name} is silent"
    return CHECKS[name].finding(case, 0)


def ids(case: Case, severity: str = "error") -> set[str]:
    return {f.id for f in judge_one(case) if f.severity == severity}


def recompute(*modules: Recompute) -> int:
    return int(sum(modules))


FIRES: dict[str, Case] = {
    "degrees_at_least_one": case(dp=0),
    "world_holds_experts": moe("deepseek-v3", tp=2, pp=16, dp=8, ep=64, sp=1),
    "cluster_holds_whole_replicas": case(cluster="64xH100", tp=3),
    "layout_fills_cluster": case(cluster="128xH100"),
    "order_names_every_axis": case(order="tp-cp-ep-dp"),
    "meshes_share_pipelines": moe(order="tp-cp-ep-pp-dp"),
    "dp_replicate_divides_dp": case(dp_replicate=3),
    "dp_replicate_divides_edp": moe(dp_replicate=4),
    "tp_divides_heads": case(tp=3),
    "tp_fits_kv_heads": case("llama3-70b", tp=12),
    "tp_divides_sizes": case("qwen2.5-0.5b", tp=3, pp=1),
    "etp_divides_expert_size": moe(etp=3, ep=4),
    "tp_divides_mamba": case("nemotron-h-8b", tp=16, pp=1),
    "tp_and_cp_divide_delta_net": moe("qwen3-next-80b-a3b", tp=32, sp=1),
    "cp_divides_mamba": case("nemotron-h-8b", tp=1, cp=3, seq_len=8184, pp=1),
    "batch_splits_into_microbatches": case(gbs=510),
    "batch_fills_every_replica": case(gbs=2),
    "sequence_splits_over_cp": case(cp=3),
    "sequence_splits_over_tp": case(seq_len=8190),
    "a2a_divides_heads": case(cp=4, cp_comm=int(CpComm.a2a)),
    "levels_make_cp": case(cp=4, hierarchical_cp=(2, 4)),
    "ring_sees_whole_sequences": case("gpt-oss-20b", cp=2),
    "cp_has_long_sequences": case(cp=8),
    "positions_cover_the_sequence": case(seq_len=16384),
    "pp_divides_layers": case(pp=3),
    "vpp_divides_layers_of_a_rank": case(vpp=3, schedule=int(Pipeline.interleaved)),
    "uneven_stages_hold_all_layers": case(first=3),
    "vpp_needs_pp": case(pp=1, vpp=2, schedule=int(Pipeline.interleaved)),
    "schedule_runs_its_chunks": case(vpp=2),
    "only_interleaving_has_groups": case(microbatch_group_size=4),
    "interleaving_has_enough_microbatches": case(vpp=5, schedule=2, gbs=8),
    "last_group_feeds_every_stage": case(vpp=5, schedule=2, gbs=508),
    "zero_bubble_rounds_are_equal": case(schedule=int(Pipeline.zb_h1), gbs=36),
    "interleaving_two_ranks_needs_overlap": case(
        pp=2, vpp=5, schedule=2, execution={"overlap_pp_comm": False}
    ),
    "bubble_is_small": case(gbs=64),
    "every_stage_has_a_microbatch": case(gbs=8),
    "ep_needs_experts": case(ep=2),
    "ep_divides_experts": moe(ep=3, dp=12),
    "moe_with_tp_needs_sp": moe(tp=2, ep=4),
    "etp_needs_experts": case(etp=4),
    "ep_overlap_needs_interleaving": moe(execution={"overlap_ep_comm": True}),
    "ep_overlap_excludes_recomputing_experts": moe(
        execution={"overlap_ep_comm": True}, recompute=recompute(Recompute.full)
    ),
    "one_expert_a_rank": moe(),
    "experts_get_enough_tokens": moe("deepseek-v3", ep=1, dp=1, seq_len=2048),
    "zero_3_keeps_backward_whole": case(schedule=int(Pipeline.zb_h1), zero=3),
    "sp_needs_tp": case(tp=1),
    "tp_wants_sp": case(sp=0),
    "replicas_share_the_optimizer": case(zero=0),
    "expert_optimizer_is_whole": moe("deepseek-v3", tp=2, pp=16, dp=32, ep=64, sp=1),
    "zero_3_with_tp": case(zero=3),
    "sharded_stages_gather_every_microbatch": case(zero=3),
    "sharded_gradients_reduce_every_microbatch": case(zero=2),
    "sharded_gradients_are_whole_at_first": case(zero=2),
    "ep_is_for_eight_gpus": moe(pp=1, dp=4, ep=4),
    "pp_is_for_deep_models": case("llama3-8b"),
    "fine_tuning_pads_to_full_length": case(task="sft"),
    "full_excludes_modules": case(recompute=recompute(Recompute.full, Recompute.mlp)),
    "only_full_counts_layers": case(recompute=int(Recompute.mlp), recompute_num_layers=2),
    "mla_up_proj_needs_mla": case(recompute=int(Recompute.mla_up_proj)),
    "moe_act_needs_grouped_gemm": moe(
        recompute=int(Recompute.moe_act), execution={"grouped_gemm": False}
    ),
    "overlapped_shared_experts_stay": moe(
        "deepseek-v3",
        recompute=int(Recompute.shared_experts),
        execution={"shared_expert_overlap": True},
    ),
    "delayed_scaling_keeps_its_inputs": case(
        precision_name="fp8", recompute=int(Recompute.layernorm)
    ),
    "recomputed_modules_exist": case(recompute=recompute(Recompute.moe, Recompute.mlp)),
    "flash_attention_recomputes_already": case(recompute=int(Recompute.core_attn)),
    "recomputed_layers_exist": case(recompute=int(Recompute.full), recompute_num_layers=50),
    "uniform_recompute_frees_memory": case(recompute=int(Recompute.full), recompute_num_layers=20),
    "peak_fits": case(peak_bytes=90e9),
    "peak_is_clear_of_capacity": case(peak_bytes=79e9),
    "offload_excludes_pipelines": case(execution={"activation_offload_layers": 2}),
    "offload_excludes_recompute": case(
        recompute=int(Recompute.mlp), execution={"activation_offload_layers": 2}
    ),
    "offload_leaves_a_layer": case(execution={"activation_offload_layers": 80}),
    "tp_stays_inside_the_domain": case(cluster="64xH100", tp=16, pp=4, dp=1),
    "etp_stays_inside_the_domain": moe(cluster="64xH100", ep=1, etp=16),
    "ep_stays_inside_the_domain": moe("deepseek-v3", "1024xH100", tp=2, pp=16, dp=32, ep=64, sp=1),
    "a2a_stays_inside_the_domain": case(
        cluster="64xH100", cp=4, dp=1, tp=4, cp_comm=int(CpComm.a2a)
    ),
    "gpu_has_the_format": case(cluster="64xA100", precision_name="fp8"),
    "tp_leaves_wide_matmuls": case("llama3-8b", tp=8),
    "tp_is_for_wide_models": case("qwen2.5-0.5b", tp=2),
    "etp_leaves_wide_experts": moe("deepseek-v3", etp=4, ep=4),
    "quantised_slices_are_aligned": case("qwen2.5-0.5b", tp=16, precision_name="fp8-mx"),
    "one_connection_orders_kernels": case(cluster="64xH100"),
    "sharding_wants_connections": case(cluster="64xB200", zero=2),
    "connections_cannot_serve_both": case(cluster="64xH100", zero=2),
}
"""A layout for each rule on which it fires."""


@pytest.mark.parametrize("check", all_checks(), ids=lambda check: check.name)
def test_every_rule_fires_where_it_must_and_tells_value_rule_and_remedy(check: Check) -> None:
    finding = said(FIRES[check.name], check.name)
    assert (finding.id, finding.severity) == (check.id, check.severity)
    assert finding.rule.endswith(".")
    assert finding.remedy.endswith((".", "L"))
    assert (
        finding.message == f"{finding.message.partition(': ')[0]}: {finding.rule} {finding.remedy}"
    )
    assert not re.search(r"[{}]|None|\b0 or\b", finding.message)
    assert finding in judge_one(FIRES[check.name]) or check.name == "degrees_at_least_one"


def test_layouts_of_the_guides_break_no_rule() -> None:
    for legal in (
        case(),
        case(cluster="64xH100"),
        case(cp=2, dp=2, cluster="64xH100", vpp=5, schedule=2),
        moe(cluster="64xH100"),
        moe("qwen3-30b-a3b", tp=4, pp=2, ep=4, sp=1, dp=8),
    ):
        assert not illegal(legal)[0]
        assert ids(legal) == set()


def test_rules_are_found_in_the_files_of_the_package_errors_first() -> None:
    severities = [check.severity for check in all_checks()]
    assert severities == sorted(severities, key=("error", "warning", "note").index)
    assert set(FIRES) == set(CHECKS)
    assert {check.topic for check in all_checks()} >= {"divisibility", "moe", "topology"}
    for check in all_checks():
        assert check.rule and check.remedy, check.name
        assert check.id == check.name or re.fullmatch(r"(MLM|MB)-[A-Z]+-\w+", check.id)


def test_without_docstrings_the_rules_refuse_to_load() -> None:
    command = [sys.executable, "-OO", "-c", "import meshwright.checks"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "Run python without -OO" in result.stderr


# --- the search's view: masks over tables

DEGREES = st.sampled_from([1, 2, 3, 4, 6, 8, 16])
ROWS = st.fixed_dictionaries(
    {
        **dict.fromkeys(("tp", "cp", "dp", "pp", "ep", "etp"), DEGREES),
        "vpp": st.sampled_from([1, 2, 5]),
        "mbs": st.sampled_from([1, 2, 3]),
        "dp_replicate": st.sampled_from([1, 2]),
        "sp": st.sampled_from([0, 1]),
        "zero": st.sampled_from(list(map(int, Zero))),
        "schedule": st.sampled_from(list(map(int, Pipeline))),
        "cp_comm": st.sampled_from(list(map(int, CpComm))),
        "recompute": st.integers(0, 511),
        "recompute_num_layers": st.sampled_from([0, 1, 4]),
        "first": st.sampled_from([0, 0, 5]),
        "account_for_loss": st.sampled_from([0, 1]),
        "microbatch_group_size": st.sampled_from([0, 0, 8]),
    }
)


def table_of(chosen: list[dict[str, int]]) -> Layouts:
    start = take(table([layout()]), np.zeros(len(chosen), dtype=np.int64))
    return with_columns(start, **{key: [row[key] for row in chosen] for key in chosen[0]})


@given(st.lists(ROWS, min_size=1, max_size=6), st.sampled_from(["llama3-70b", "deepseek-v3"]))
def test_a_row_is_judged_as_if_it_were_alone(chosen: list[dict[str, int]], name: str) -> None:
    x, job = table_of(chosen), Job(seq_len=4096, gbs=96)
    cluster = cluster_called("64xH100")
    together = judge(Case(model_called(name), job, x, cluster))
    bad = illegal(Case(model_called(name), job, x, cluster))
    for i in range(num_rows(x)):
        alone = Case(model_called(name), job, take(x, np.array([i])), cluster)
        assert judge_one(alone) == together[i]
        assert bad[i] == any(f.severity == "error" for f in together[i])


def test_an_empty_table_has_no_findings() -> None:
    empty = take(case().x, np.zeros(0, dtype=np.int64))
    nothing = Case(model_called("llama3-70b"), Job(seq_len=8192, gbs=512), empty)
    assert judge(nothing) == []
    assert len(illegal(nothing)) == 0


def test_of_a_degree_below_one_only_that_is_said() -> None:
    assert ids(case(dp=0, tp=3)) == {"degrees_at_least_one"}
    assert ids(case(tp=-2, cluster="64xH100")) == {"degrees_at_least_one"}


# --- Megatron-LM's own answers (oracle)

ORACLE = [(row, case_of(row)) for row in rows("megatron_lm_validation.jsonl.gz")]
JUDGED = [(row, one) for row, one in ORACLE if one is not None]
INSIDE_TRANSFORMER_ENGINE = {"a2a_divides_heads"}
"""The oracle ran without Transformer Engine, which refuses these."""


def test_what_megatron_accepts_breaks_no_rule() -> None:
    accepted = [(row, one) for row, one in JUDGED if row["accepted"]]
    assert len(accepted) > 700
    for row, one in accepted:
        if illegal(one)[0]:
            assert ids(one) <= INSIDE_TRANSFORMER_ENGINE, row["id"]


def test_what_megatron_refuses_by_one_of_our_rules_we_refuse_by_it() -> None:
    ours = {check.id for check in all_checks() if check.severity == "error"}
    refused = [(row, one) for row, one in JUDGED if row.get("rule_id") in ours]
    assert len(refused) > 100
    assert len({row["rule_id"] for row, _ in refused}) > 25
    for row, one in refused:
        found = ids(one)
        assert row["rule_id"] in found or found == {"degrees_at_least_one"}, row["id"]


# --- the guides' rules that catch people


def test_tp_across_nodes_names_both_speeds() -> None:
    finding = said(FIRES["tp_stays_inside_the_domain"], "tp_stays_inside_the_domain")
    assert "2 fast domains of 8 GPUs" in finding.rule
    assert "50 GB/s a GPU instead of 450 GB/s" in finding.rule
    assert finding.remedy.startswith("Use tp=4 or 8")


def test_groups_that_do_not_divide_a_domain_of_72_spill_over() -> None:
    rack = build_cluster("GB200", 144)
    assert rack.scale_up_domain == 72
    spills = case("llama3.1-405b", rack, tp=16, pp=3, dp=3)
    assert "tp_stays_inside_the_domain" in ids(spills, "warning")
    assert "tp_stays_inside_the_domain" not in ids(
        case("llama3.1-405b", rack, tp=8, pp=3, dp=6), "warning"
    )


def test_a_pipeline_without_interleaving_is_told_its_bubble_and_the_cure() -> None:
    finding = said(case(gbs=64), "bubble_is_small")
    assert "(pp-1)/(m*vpp) = 3/16 = 19%" in finding.rule
    assert finding.remedy.startswith("Use vpp=2, 4 or 5")
    interleaved = case(gbs=64, vpp=5, schedule=int(Pipeline.interleaved))
    assert "bubble_is_small" not in ids(interleaved, "warning")


def test_sequence_parallelism_without_tensor_parallelism_is_switched_off() -> None:
    assert "MLM-ARG-sp_tp1" in ids(case(tp=1, dp=16), "warning")
    assert "MLM-ARG-sp_tp1" not in ids(case(tp=1, dp=16, sp=0), "warning")


def test_context_parallelism_needs_pieces_of_twice_its_size() -> None:
    assert ids(case(cp=2, seq_len=8190, tp=1, sp=0)) == {"MLM-ARG-seq_2cp"}
    assert ids(case(cp=2, seq_len=8192)) == set()
    # with sequence parallelism a multiple of cp * lcm(2, tp)
    assert ids(case(cp=2, seq_len=8196)) == {"MLM-SP-seq_split"}
    assert "multiples of 8" in said(case(cp=2, seq_len=8196), "sequence_splits_over_tp").remedy


def test_key_value_heads_may_be_a_multiple_or_a_divisor_of_tp() -> None:
    assert "MLM-TC-groups_tp" not in ids(case(tp=16))
    assert "MLM-TC-groups_tp" not in ids(case(tp=4))
    assert "MLM-TC-groups_tp" in ids(case(tp=12))


@pytest.mark.parametrize(
    "model", ["llama3-70b", "qwen2.5-0.5b", "nemotron-h-8b", "qwen3-next-80b-a3b", "deepseek-v3"]
)
def test_every_tp_that_a_remedy_offers_is_legal(model: str) -> None:
    def about_tp(tp: int) -> list[Finding]:
        return [f for f in judge_one(case(model, tp=tp)) if f.field == "layout.tp"]

    refused = {tp for tp in range(1, 130) if any(f.severity == "error" for f in about_tp(tp))}
    legal = set(range(1, 130)) - refused
    assert set(legal_tps(model_called(model))) == legal
    for tp in (3, 5, 12, 24, 48, 100):
        for finding in about_tp(tp):
            offered = re.findall(r"\d+", finding.remedy.partition(" with ")[0])
            assert set(map(int, offered)) <= legal, finding.message


def test_connections_are_advised_by_architecture_and_sharding() -> None:
    hopper = ids(case(cluster="64xH100"), "note")
    assert "MLM-ARG-conn" in hopper
    assert "MLM-ARG-conn" not in ids(case(cluster="64xB200"), "note")
    sharded = case(cluster="64xH100", tp=1, dp=16, zero=int(Zero.optim_grads_params), sp=0)
    assert "MLM-ARG-mfsdp_conn" in ids(sharded, "note")
    assert "MLM-ARG-conn" not in ids(sharded, "note")


def test_the_inner_level_of_hierarchical_cp_is_the_most_square_split() -> None:
    split = int(CpComm.a2a_p2p)
    x = table_of([{"cp": cp, "cp_comm": split} for cp in (1, 2, 4, 6, 8, 16, 36)])
    assert exchanging_ranks(x.cp, x.cp_comm, x.hierarchical_cp).tolist() == [1, 1, 2, 2, 2, 4, 6]
    assert not illegal(case(cp=4, cp_comm=split))[0]
    assert ids(case(cp=16, seq_len=65536, cp_comm=split)) == {"a2a_divides_heads"}


def test_uneven_stages_are_judged_by_what_they_hold() -> None:
    assert ids(case(first=20)) == set()
    assert ids(case(pipeline_layout="Et*19|t*21|t*21|t*19L")) == set()
    finding = said(case(pipeline_layout="Et*19|t*21|t*21|t*20L"), "uneven_stages_hold_all_layers")
    assert finding.field == "layout.pipeline_layout"
    assert "81 layers, the model 80" in finding.rule
    assert said(case(first=3), "uneven_stages_hold_all_layers").field == "layout.first"


def test_layers_that_do_not_divide_are_offered_a_layout() -> None:
    finding = said(case("deepseek-v3", pp=16), "pp_divides_layers")
    text = finding.remedy.rpartition("pipeline_layout=")[2].removesuffix(".")
    assert ids(moe("deepseek-v3", tp=2, pp=16, dp=32, ep=64, sp=1, pipeline_layout=text)) == set()


def test_memory_is_judged_by_the_margin() -> None:
    assert ids(case(peak_bytes=90e9)) == {"peak_fits"}
    assert ids(case(peak_bytes=79e9)) == set()
    assert "peak_is_clear_of_capacity" in ids(case(peak_bytes=79e9), "warning")
    assert "peak_is_clear_of_capacity" in ids(case(peak_bytes=81e9), "warning")
    assert "peak_is_clear_of_capacity" not in ids(case(peak_bytes=70e9), "warning")


# --- where the guides contradict each other or the arithmetic


@pytest.mark.parametrize(
    ("degrees", "gpus"),
    [
        ({"tp": 2, "cp": 1, "pp": 1, "ep": 8, "etp": 1}, 8),
        ({"tp": 4, "cp": 1, "pp": 1, "ep": 8, "etp": 1}, 8),
        ({"tp": 2, "cp": 2, "pp": 1, "ep": 8, "etp": 1}, 8),
        ({"tp": 2, "cp": 4, "pp": 1, "ep": 8, "etp": 1}, 8),
        ({"tp": 2, "cp": 1, "pp": 2, "ep": 8, "etp": 1}, 16),
        ({"tp": 2, "cp": 1, "pp": 1, "ep": 4, "etp": 2}, 8),
        ({"tp": 2, "cp": 1, "pp": 16, "ep": 64, "etp": 1}, 1024),
        ({"tp": 6, "cp": 1, "pp": 1, "ep": 4, "etp": 1}, 12),
    ],
)
def test_the_smallest_world_is_a_common_multiple(degrees: dict[str, Any], gpus: int) -> None:
    assert minimum_world_size(**degrees) == gpus
    replica = degrees["tp"] * degrees["cp"] * degrees["pp"]
    for world in range(replica, gpus + 1, replica):
        fires = CHECKS["world_holds_experts"].fires(moe(dp=world // replica, **degrees))
        assert fires[0] == (world != gpus)


def test_above_the_minimum_both_grids_must_hold() -> None:
    worlds = [layout(tp=2, ep=8, gpus=gpus) for gpus in (8, 16, 32)]
    assert [(x.dp, x.edp) for x in worlds] == [(4, 1), (8, 2), (16, 4)]


def test_six_by_four_is_twelve_and_neither_degree_is_one() -> None:
    x = layout(tp=6, ep=4, gpus=12)
    assert (x.dp, x.edp) == (2, 3)


def test_deepseek_v3_runs_on_1024_gpus_not_on_the_product_of_its_degrees() -> None:
    x = layout(tp=2, pp=16, ep=64, gpus=1024)
    assert (x.dp, x.edp) == (32, 1)
    assert x.world_size == 1024 != x.tp * x.pp * x.ep * x.dp


def test_deepseek_v3_on_256_gpus_is_refused_with_both_ways_out() -> None:
    finding = said(FIRES["world_holds_experts"], "world_holds_experts")
    assert finding.id == "MLM-PS-world_expert"
    assert "edp = 0.25" in finding.rule
    assert "16*lcm(2, 64) = 1024" in finding.rule
    assert finding.remedy == "Use 1024 GPUs, or ep=16 on 256."


def test_pp_before_dp_needs_equal_meshes_in_dense_models_too() -> None:
    inner = "tp-cp-ep-pp-dp"
    assert "MLM-PS-pp_last" in ids(case(cp=2, order=inner))
    assert "MLM-PS-pp_last" not in ids(case(order=inner))
    assert "MLM-PS-pp_last" not in ids(case(cp=2, pp=1, order=inner))
    assert "MLM-PS-pp_last" in ids(moe(order=inner))
    assert "MLM-PS-pp_last" not in ids(moe(tp=8, ep=8, sp=1, order=inner))


def test_mixtral_with_tp_and_without_sp_is_refused() -> None:
    guide = moe(tp=2, pp=4, ep=4, dp=8)
    assert ids(guide) == {"MLM-MOE-forward_sp"}
    assert ids(moe(tp=2, pp=4, ep=4, dp=8, sp=1)) == set()


def test_a_layout_of_32_ranks_is_refused_on_8_processes() -> None:
    finding = said(case(cluster="8xH100", cp=2, dp=1), "cluster_holds_whole_replicas")
    assert "tp*pp*cp = 4*4*2 = 32" in finding.rule
    assert finding.remedy.startswith("Use 32 GPUs")


def test_more_expert_parallelism_means_fewer_experts_a_rank() -> None:
    experts = model_called("mixtral-8x7b").num_experts
    assert [experts // ep for ep in (1, 2, 4, 8)] == [8, 4, 2, 1]
    assert "one_expert_a_rank" in ids(moe(ep=8), "note")
    assert "one_expert_a_rank" not in ids(moe(ep=4), "note")


def test_expert_communication_is_two_exchanges_a_layer_each_way() -> None:
    model = model_called("mixtral-8x7b")
    for block in model.layer_kinds:
        kinds = [comm.kind for op in block.ops for comm in op.comm]
        assert (kinds.count("dispatch"), kinds.count("combine")) == (1, 1)
    crossing = moe("deepseek-v3", "1024xH100", tp=2, pp=16, dp=32, ep=64, sp=1)
    assert "ep_stays_inside_the_domain" in ids(crossing, "warning")


def test_only_the_experts_of_mixtral_divide_by_ep() -> None:
    model = model_called("mixtral-8x7b")
    assert model.num_params == pytest.approx(46.7e9, rel=1e-3)
    rest = model.num_params - model.num_expert_params
    assert rest + model.num_expert_params / 4 == pytest.approx(12.9e9, rel=0.01)


def test_training_keeps_keys_and_values_as_activations_not_as_a_cache() -> None:
    model = model_called("llama3-70b")
    per_token = 2 * model.num_kv_heads * model.head_dim * 2
    assert model.num_layers * 32768 * per_token == pytest.approx(10.7e9, rel=5e-3)


def test_a_16_bit_adam_is_not_what_mixed_precision_holds() -> None:
    held = precision("bf16")
    unsharded = held.param_bytes + held.grad_bytes + held.master_bytes + held.moment_bytes
    assert (held.param_bytes, held.grad_bytes) == (2.0, 4.0)
    assert (held.master_bytes, held.moment_bytes, unsharded) == (4.0, 8.0, 18.0)
    guide = {"params": 2, "grads": 2, "optimizer": 4}
    assert [70 * b for b in guide.values()] == [140, 140, 280]
    share = 70e9 / 4 / 4
    assert share * held.param_bytes == pytest.approx(8.75e9)
    assert share * sum(guide.values()) + 3.0e9 == pytest.approx(38e9)
    assert share * unsharded == pytest.approx(78.75e9)


def test_the_first_stage_of_a_pipeline_holds_as_many_micro_batches_as_ranks() -> None:
    held, most = 0, 0
    for action in schedule_order(4, 16)[0].split():
        held += 1 if action.startswith("F") else -1
        most = max(most, held)
    assert most == 4
    assert most * 3.0 == 12.0
