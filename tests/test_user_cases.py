"""Problems that people reported: a check says, before the start, what the case's rule says.

Provenance: public issue threads; ``tests/data/user_cases.jsonl`` has the rule of each.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import pytest

import meshwright
from launches import CONNECTION, LLAMA_70B, bridge, megatron, titan, verl
from meshwright.cost.detail import Estimate
from meshwright.frameworks.check import CheckResult, check
from meshwright.frameworks.compare import compare

CASES = {
    row["id"]: row
    for row in map(
        json.loads, (Path(__file__).parent / "data" / "user_cases.jsonl").read_text().splitlines()
    )
}


@dataclass(frozen=True)
class Told:
    """A launch, the machine it runs on, and the findings that its case asks for."""

    launch: list[str]
    gpus: int
    findings: tuple[str, ...] = ()
    severity: str = "error"
    cluster: str | None = None
    env: Mapping[str, str] = field(default_factory=dict[str, str])


QWEN_30B = "actor_rollout_ref.model.path=Qwen/Qwen3-30B-A3B trainer.nnodes=4"
MOE_16 = "model.expert_model_parallel_size=16 train.global_batch_size=1024"
TOLD = {
    "MLM-783": Told(
        bridge("llama3_70b_pretrain", "model.tensor_model_parallel_size=2"),
        2,
        ("peak_fits",),
        cluster="2xH100",
    ),
    "MLM-1031": Told(
        megatron(
            f"{LLAMA_70B} --tensor-model-parallel-size 8 --pipeline-model-parallel-size 8"
            " --use-distributed-optimizer"
        ),
        128,
        ("tp_wants_sp",),
        "warning",
        env=CONNECTION,
    ),
    "TITAN-620": Told(
        titan(
            "llama3_8b",
            "--training.local_batch_size 1 --training.seq_len 8192"
            " --activation_checkpoint.mode full",
        ),
        2,
        ("peak_fits",),
        cluster="2xA6000",
    ),
    "BRIDGE-1502": Told(
        bridge(
            "deepseek_v3_pretrain",
            "model.pipeline_model_parallel_size=8 model.virtual_pipeline_model_parallel_size=1"
            " 'model.pipeline_model_parallel_layout=Et*4|(tttt|)*14tmL'",
        ),
        64,
        ("MLM-TC-layout_vpp",),
    ),
    "NEMO-14838": Told(
        [
            *("nemo", "llm", "pretrain", "trainer.devices=2", "trainer.num_nodes=2"),
            *("trainer.strategy.pipeline_model_parallel_size=2", "data.micro_batch_size=1"),
            *("trainer.strategy.expert_model_parallel_size=4", "data.global_batch_size=512"),
            "trainer.strategy.expert_tensor_parallel_size=1",
        ],
        4,
        ("NEMO-expert",),
    ),
    "BRIDGE-1331": Told(
        bridge(
            "qwen3_4b_pretrain",
            "model.vocab_size=151669 model.tensor_model_parallel_size=4",
        ),
        4,
        ("vocabulary_splits_over_tp",),
    ),
    "MLM-468": Told(
        megatron(
            "--num-layers 80 --pipeline-model-parallel-size 16"
            " --num-virtual-stages-per-pipeline-rank 2"
        ),
        64,
        ("MLM-BLOCK-vpp",),
    ),
    "MLM-326": Told(
        megatron(
            "--num-layers 40 --pipeline-model-parallel-size 8"
            " --num-layers-per-virtual-pipeline-stage 2"
        ),
        64,
        ("MLM-ARG-lpv_div",),
    ),
    "TITAN-947": Told(
        titan(
            "llama3_8b",
            "--training.local_batch_size 1 --training.seq_len 131072"
            " --parallelism.pipeline_parallel_degree 4",
        ),
        8,
        ("pp_batch_below_stages",),
    ),
    "MLM-716": Told(
        megatron(
            "--num-experts 8 --expert-model-parallel-size 2 --moe-aux-loss-coeff 0"
            " --moe-router-load-balancing-type aux_loss"
        ),
        8,
        ("experts_are_balanced",),
        "warning",
    ),
    "TITAN-1558": Told(
        titan(
            "deepseek_v3_671b",
            "--training.local_batch_size 1 --training.seq_len 4096"
            " --parallelism.tensor_parallel_degree 8 --parallelism.expert_parallel_degree 1",
        ),
        64,
        ("peak_fits",),
        cluster="64xH100",
    ),
    "MLM-1368": Told(
        megatron(
            "--recompute-granularity full --recompute-method uniform --recompute-num-layers 32"
        ),
        8,
        ("uniform_recompute_frees_memory",),
        "warning",
    ),
    "MLM-1000": Told(
        megatron(
            f"{LLAMA_70B} --tensor-model-parallel-size 8 --pipeline-model-parallel-size 2"
            " --use-distributed-optimizer --global-batch-size 4 --sequence-parallel"
        ),
        16,
        ("optimizer_is_not_shared", "bubble_is_small"),
        "warning",
        env=CONNECTION,
    ),
    "MLM-597": Told(megatron("--sequence-parallel"), 8, ("MLM-ARG-sp_tp1",), "warning"),
    "NRL-3563": Told(
        megatron(
            "--seq-length 4100 --context-parallel-size 2 --tensor-model-parallel-size 8"
            " --sequence-parallel"
        ),
        16,
        ("MLM-SP-seq_split",),
        env=CONNECTION,
    ),
    "SWISS-117": Told(
        megatron(
            "--seq-length 4100 --context-parallel-size 2 --tensor-model-parallel-size 4"
            " --pipeline-model-parallel-size 2 --sequence-parallel"
        ),
        16,
        ("MLM-SP-seq_split",),
        env=CONNECTION,
    ),
    "TTRL-43": Told(
        verl(
            "",
            "actor_rollout_ref.actor.ppo_mini_batch_size=1 data.train_batch_size=8",
            strategy="fsdp",
        ),
        8,
        ("VERL-ACTOR-mini_zero",),
    ),
    "SKY-1696": Told(
        [
            *("python", "-m", "skyrl.train.main_sft", "strategy=megatron", "batch_size=4"),
            *("micro_train_batch_size_per_gpu=2", "max_length=512"),
            *("megatron_config.tensor_model_parallel_size=1", "placement.num_gpus_per_node=4"),
            "megatron_config.pipeline_model_parallel_size=1",
        ],
        4,
        ("SKY-SFT-micro_div",),
    ),
    "NRL-1130": Told(
        bridge(
            "qwen3_30b_a3b_pretrain",
            "model.expert_model_parallel_size=8 train.global_batch_size=64",
        ),
        8,
        ("peak_fits",),
        cluster="8xH100",
    ),
    "MLM-6311": Told(
        megatron(
            "--num-experts 8 --expert-model-parallel-size 4 --overlap-moe-expert-parallel-comm"
            " --tensor-model-parallel-size 2 --sequence-parallel --expert-tensor-parallel-size 1"
            " --moe-token-dispatcher-type alltoall"
        ),
        8,
        ("MLM-ARG-conn_moe",),
        "warning",
        env=CONNECTION,
    ),
    "TITAN-1184": Told(
        titan(
            "llama3_8b",
            "--training.local_batch_size 1 --training.seq_len 8192"
            " --parallelism.data_parallel_shard_degree 8 --parallelism.context_parallel_degree 8",
        ),
        8,
        ("TT-DIM-product",),
    ),
    "MLM-1304": Told(
        megatron("--num-layers 30 --pipeline-model-parallel-size 4"), 4, ("MLM-ARG-layers_pp",)
    ),
    "MLM-1778": Told(
        megatron("--num-layers 20 --decoder-last-pipeline-num-layers 1"),
        4,
        ("MLM-TC-uneven_middle",),
    ),
    "TITAN-1147": Told(
        titan(
            "llama3_8b",
            "--training.local_batch_size 1 --training.seq_len 8192"
            " --parallelism.tensor_parallel_degree 2",
        ),
        8,
        ("MLM-ENV-fsdp",),
        "warning",
        env=CONNECTION,
    ),
    "ROCM-91": Told(
        megatron(
            "--use-megatron-fsdp --use-distributed-optimizer --ckpt-format fsdp_dtensor"
            " --no-gradient-accumulation-fusion"
        ),
        8,
        ("MLM-ARG-mfsdp_conn",),
        env=CONNECTION,
    ),
    "BRIDGE-3880b": Told(
        bridge(
            "qwen3_30b_a3b_pretrain",
            f"{MOE_16} model.recompute_granularity=selective"
            " 'model.recompute_modules=[\"core_attn\"]'",
        ),
        16,
        ("MLM-TC-rc_core_warn",),
        "warning",
    ),
    "VERL-1811": Told(
        verl(
            "tensor_model_parallel_size=2 pipeline_model_parallel_size=2",
            "data.train_batch_size=33 actor_rollout_ref.actor.ppo_mini_batch_size=32",
        ),
        8,
        ("VERL-train_div",),
    ),
    "VERL-328": Told(
        verl(
            "",
            "actor_rollout_ref.model.path=Qwen/Qwen2.5-7B data.train_batch_size=4"
            " actor_rollout_ref.actor.ppo_mini_batch_size=4 data.max_prompt_length=400"
            " actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=64"
            " data.max_response_length=2048 actor_rollout_ref.rollout.n=64"
            " trainer.n_gpus_per_node=4",
            strategy="fsdp",
        ),
        4,
        ("peak_fits",),
        cluster="4xH100",
    ),
    "VERL-3364": Told(
        verl(
            "tensor_model_parallel_size=4 pipeline_model_parallel_size=2"
            " expert_model_parallel_size=2 expert_tensor_parallel_size=1",
            f"{QWEN_30B} data.max_prompt_length=4096 data.max_response_length=8192"
            " actor_rollout_ref.rollout.gpu_memory_utilization=0.65",
        ),
        32,
        ("rollout_and_training_share_a_gpu",),
        "warning",
        cluster="32xH200",
    ),
    "BRIDGE-CPUOFF": Told(
        megatron(
            "--tensor-model-parallel-size 4 --pipeline-model-parallel-size 4"
            " --cpu-offloading-num-layers 2"
        ),
        32,
        ("MLM-TC-off_pp",),
        env=CONNECTION,
    ),
    "BRIDGE-NANO3": Told(
        bridge(
            "qwen3_30b_a3b_pretrain",
            "model.expert_model_parallel_size=8 train.global_batch_size=16",
        ),
        8,
        ("expert_optimizer_is_whole",),
        "note",
    ),
    "VERL-388": Told(
        verl(
            "tensor_model_parallel_size=8",
            "actor_rollout_ref.model.path=Qwen/Qwen2.5-32B trainer.nnodes=4"
            " data.max_prompt_length=1024 data.max_response_length=1024"
            " algorithm.adv_estimator=gae actor_rollout_ref.actor.use_kl_loss=True"
            " actor_rollout_ref.rollout.tensor_model_parallel_size=2"
            " actor_rollout_ref.rollout.gpu_memory_utilization=0.3"
            " actor_rollout_ref.actor.ppo_mini_batch_size=128"
            " actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4",
        ),
        32,
        ("colocated_roles_fit",),
        "warning",
        cluster="32xH800",
    ),
    "VERL-2935": Told(
        verl(
            "tensor_model_parallel_size=4 expert_model_parallel_size=32"
            " expert_tensor_parallel_size=1 param_offload=True grad_offload=True"
            " optimizer_offload=True",
            f"{QWEN_30B} data.max_prompt_length=2000 data.max_response_length=30000"
            " data.train_batch_size=256",
        ),
        32,
        ("policy_logits_fit",),
        "warning",
        cluster="32xA100",
    ),
    "VERL-1629": Told(
        verl(
            "tensor_model_parallel_size=2",
            "actor_rollout_ref.model.path=Qwen/Qwen2-7B data.max_prompt_length=2048"
            " data.max_response_length=2048 actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4",
        ),
        8,
        ("policy_logits_fit", "peak_is_clear_of_capacity"),
        "warning",
        cluster="8xH100",
    ),
    "VERL-6609": Told(
        verl(
            "context_parallel_size=2 expert_model_parallel_size=4 expert_tensor_parallel_size=1",
            "actor_rollout_ref.model.path=Qwen/Qwen3.5-35B-A3B",
        ),
        8,
        ("vision_cp_wants_loss_per_token",),
        "warning",
    ),
    "TITAN-1136": Told(
        titan(
            "llama3_8b",
            "--training.local_batch_size 1 --training.seq_len 8192"
            " --parallelism.data_parallel_shard_degree 3",
        ),
        3,
        ("shards_are_uneven",),
        "warning",
    ),
    "MLM-5240": Told(
        megatron("--pipeline-model-parallel-size 4 --num-virtual-stages-per-pipeline-rank 2"),
        8,
        ("overlapped_p2p_makes_groups_late",),
        "note",
    ),
    "BRIDGE-DISP": Told(
        bridge(
            "qwen3_30b_a3b_pretrain",
            f"{MOE_16} model.moe_token_dispatcher_type=flex"
            " model.moe_flex_dispatcher_backend=hybridep",
        ),
        16,
        ("dispatcher_is_installed",),
        "note",
    ),
    "ALIGNER-444": Told(
        megatron(
            "--eval-micro-batch-size 64 --eval-global-batch-size 64"
            " --tensor-model-parallel-size 4 --pipeline-model-parallel-size 2"
            " --use-distributed-optimizer --sequence-parallel"
        ),
        8,
        ("evaluation_fits",),
        "warning",
        cluster="8xA800",
        env=CONNECTION,
    ),
    "TITAN-1789": Told(
        titan(
            "deepseek_v3_16b",
            "--training.local_batch_size 4 --training.seq_len 4096"
            " --parallelism.expert_parallel_degree 8 --activation_checkpoint.mode selective",
        ),
        8,
        ("peak_fits",),
        cluster="8xH100",
    ),
    "MLM-637": Told(
        megatron(
            "--num-layers 48 --hidden-size 7168 --ffn-hidden-size 28672 --num-attention-heads 56"
            " --num-query-groups 56 --micro-batch-size 2 --global-batch-size 2048"
            " --recompute-granularity selective --use-distributed-optimizer"
            " --tensor-model-parallel-size 4 --sequence-parallel --fp8-format hybrid"
        ),
        16,
        ("peak_fits",),
        cluster="16xH100",
        env=CONNECTION,
    ),
    "MLM-6314": Told(
        megatron(
            "--num-layers 10 --ffn-hidden-size 11008 --num-query-groups 32 --vocab-size 32000"
            " --use-megatron-fsdp --use-distributed-optimizer --ckpt-format fsdp_dtensor"
            " --data-parallel-sharding-strategy optim_grads --no-gradient-accumulation-fusion"
        ),
        2,
        ("sharded_gradients_are_whole_at_first",),
        "note",
        cluster="2xA100-40GB",
    ),
    "BRIDGE-3107": Told(
        megatron(
            f"{LLAMA_70B} --tensor-model-parallel-size 4 --pipeline-model-parallel-size 4"
            " --num-virtual-stages-per-pipeline-rank 5 --sequence-parallel --grad-reduce-in-bf16"
            " --use-distributed-optimizer --fp8-format hybrid --fp8-recipe tensorwise"
            " --global-batch-size 32"
        ),
        32,
        ("allocator_fragments",),
        "note",
        cluster="32xH100",
        env=CONNECTION,
    ),
}
"""Cases whose answer is a finding."""

ELSEWHERE = {
    "below, by a test of its own": (
        *("ROCM-85", "MLM-1754", "TITAN-1690", "DS-4477", "TITAN-811", "TITAN-850"),
        *("BRIDGE-5637", "BRIDGE-MT1", "BRIDGE-MT2", "MLM-92", "MLM-1258", "BRIDGE-949"),
        *("BRIDGE-5318", "MLM-482", "MLM-1345", "SWIFT-5997", "MLM-144", "NANO-207", "TRL-962"),
        *("BRIDGE-MOON", "MLM-6429", "TUNE-2071", "VERL-6123", "AUTO-1176", "AUTO-818"),
        *("MLM-5768", "BRIDGE-3880"),
    ),
    "told with their numbers, in test_advice.py": ("BRIDGE-LORA", "BRIDGE-3561", "LITGPT-438"),
}


def run(told: Told) -> CheckResult:
    return check(told.launch, gpus=told.gpus, cluster=told.cluster, env=dict(told.env))


@pytest.mark.parametrize("case", TOLD)
def test_a_check_says_what_the_rule_of_the_case_says(case: str) -> None:
    told = TOLD[case]
    result = run(told)
    found = {f.id: f for f in result.findings}
    for wanted in told.findings:
        assert wanted in found, sorted(found)
        assert found[wanted].severity == told.severity
        assert found[wanted].rule
    assert result.ok == (told.severity != "error"), [
        f.message for f in result.findings if f.severity == "error"
    ]


def test_every_case_that_a_configuration_decides_is_accounted_for() -> None:
    """Ours: a new case is either told by a check or says where it is answered."""
    counted = [*TOLD, *(case for cases in ELSEWHERE.values() for case in cases)]
    assert sorted(counted) == sorted(CASES)


def test_a_rule_for_experts_is_not_applied_to_a_dense_model() -> None:
    """ROCM-85: a misplaced check refused TP without SP on a dense model."""
    flags = megatron("--tensor-model-parallel-size 2")
    assert check(flags, gpus=8, env=CONNECTION).ok


def test_a_vocabulary_padded_differently_is_told_by_comparing() -> None:
    """MLM-1754: TP 1 and TP 2 with divisor 1 train different vocabularies."""
    flags = "--vocab-size 50257 --make-vocab-size-divisible-by 1"
    one, two = megatron(flags), megatron(f"{flags} --tensor-model-parallel-size 2")
    notes = "\n".join(compare(one, two, gpus=2).notes)
    assert "Padded vocabulary 50257 -> 50258" in notes


def test_a_change_of_data_parallelism_is_told_by_comparing() -> None:
    """TITAN-811, TITAN-850, BRIDGE-5637: the data loader's position does not carry over."""
    notes = "\n".join(
        compare(megatron(""), megatron("--tensor-model-parallel-size 2"), gpus=8).notes
    )
    assert "Data parallelism 8 -> 4" in notes


def test_sharding_beats_tensor_parallelism_for_a_32b_model() -> None:
    """TITAN-1690: FSDP over 8 ran at 39% MFU, FSDP 4 with TP 8 at 18%."""
    options = (
        "--training.local_batch_size 1 --training.seq_len 4096 --activation_checkpoint.mode full"
    )
    sharded = check(titan("qwen3_32b", options), gpus=8, cluster="8xH200")
    split = check(
        titan("qwen3_32b", f"{options} --parallelism.tensor_parallel_degree 8"),
        gpus=32,
        cluster="32xH200",
    )
    assert sharded.estimate is not None
    assert split.estimate is not None
    assert sharded.estimate.mfu_fraction > 1.3 * split.estimate.mfu_fraction


def test_the_layouts_of_a_70b_tuning_rank_as_measured() -> None:
    """BRIDGE-MT1, MT2: TP4 PP4 was fastest, PP8 lost 6%, TP8 28%."""
    base = (
        "model.sequence_parallel=true model.virtual_pipeline_model_parallel_size=5"
        " train.global_batch_size=32"
    )

    def step(tp: int, pp: int) -> float:
        degrees = f"model.tensor_model_parallel_size={tp} model.pipeline_model_parallel_size={pp}"
        launch = bridge("llama3_70b_pretrain", f"{base} {degrees}")
        if pp == 8:
            launch.append("model.virtual_pipeline_model_parallel_size=5")
        price = check(launch, gpus=32, cluster="32xH100", env=CONNECTION).estimate
        assert price is not None
        return price.step_time_s

    assert step(4, 4) < step(4, 8) < step(8, 4)


def test_the_first_stage_of_a_pipeline_holds_most() -> None:
    """DS-4477: stage 0 keeps as many micro-batches as there are stages."""
    result = check(
        megatron("--pipeline-model-parallel-size 4 --use-distributed-optimizer"),
        gpus=8,
        cluster="8xH100",
    )
    assert result.estimate is not None
    peaks = [stage["peak_bytes"] for stage in result.estimate.stages]
    assert peaks[0] > peaks[1] > peaks[2]


def priced(
    launch: Sequence[str], gpus: int, cluster: str, env: Mapping[str, object] = CONNECTION
) -> Estimate:
    result = check(launch, gpus=gpus, cluster=cluster, env=dict(env))
    assert result.estimate is not None, result.unpriced
    return result.estimate


def test_a_large_vocabulary_is_paid_in_logits_and_in_states() -> None:
    """MLM-92: logits are s*b*V*(2 and 4) bytes, two untied matrices V*h*18 bytes."""
    small, large = (
        priced(megatron(f"--vocab-size {size}"), 8, "8xH100") for size in (128_000, 1_024_000)
    )
    rows = 1_024_000 - 128_000
    states = ("weights_bytes", "grads_bytes", "optimizer_bytes")
    more = {term: large.memory[term] - small.memory[term] for term in small.memory}
    kept_and_at_work = more["logits_bytes"] + more["buffers_bytes"]
    assert kept_and_at_work == pytest.approx(4096 * rows * 6, rel=0.01)
    assert sum(more[term] for term in states) == pytest.approx(2 * rows * 4096 * 18, rel=0.01)


def test_more_nodes_at_a_fixed_batch_pay_less_and_less() -> None:
    """MLM-1258: 2 to 32 nodes; communication and optimizer stay while each rank computes less."""
    flags = (
        "--num-experts 8 --hidden-size 2560 --ffn-hidden-size 8960 --num-attention-heads 32"
        " --expert-model-parallel-size 8 --global-batch-size 2048 --use-distributed-optimizer"
        " --moe-token-dispatcher-type alltoall --moe-grouped-gemm"
    )
    rates = [
        priced(megatron(flags), 8 * nodes, f"{nodes}x8xH100").tokens_per_s_per_gpu
        for nodes in (2, 4, 8, 16, 32)
    ]
    losses = [1 - after / before for before, after in pairwise(rates)]
    assert losses == sorted(losses)
    assert losses[-1] > 3 * losses[0] > 0


def test_the_search_takes_batch_recomputation_and_experts_together() -> None:
    """BRIDGE-949: a larger micro-batch, paid with recomputation and fewer expert ranks, was faster
    than the shipped layout."""

    def candidates(*fixed: str) -> int:
        return meshwright.plan(
            meshwright.load_model("qwen3-30b-a3b"),
            meshwright.load_cluster("16xH200"),
            meshwright.Job(seq_len=4096, gbs=512),
            fix=("pp=2", "vpp=2", "tp=1", "cp=1", "etp=1", *fixed),
            top=1,
        ).found.legal

    one = candidates("mbs=8", "ep=2", "recompute=full")
    assert one >= 1
    assert candidates("ep=2", "recompute=full") > one
    assert candidates("mbs=8", "recompute=full") > one
    assert candidates("mbs=8", "ep=2") > one


def test_small_experts_with_full_recomputation_stay_far_below_the_hoped_for_mfu() -> None:
    """BRIDGE-5318: 8% measured, 35% expected."""
    launch = bridge(
        "qwen35_35b_a3b_pretrain",
        "model.expert_model_parallel_size=16 train.global_batch_size=256 model.seq_length=16384"
        " dataset.seq_length=16384 model.recompute_granularity=full model.recompute_num_layers=1"
        " model.recompute_method=uniform",
    )
    assert priced(launch, 16, "16xB300").mfu_fraction < 0.15


def test_every_stage_has_its_own_peak_and_the_logits_are_on_the_last() -> None:
    """MLM-482: one number for all stages is wrong for each of them."""
    flags = (
        "--ffn-hidden-size 11008 --num-query-groups 32 --vocab-size 32000 --micro-batch-size 2"
        " --pipeline-model-parallel-size 2 --global-batch-size 2048 --use-distributed-optimizer"
    )
    first, last = priced(megatron(flags), 16, "16xA100").stages
    assert first["peak_bytes"] > last["peak_bytes"]
    assert first["activations_bytes"] > 1.5 * last["activations_bytes"]
    assert first["logits_bytes"] == 0 < last["logits_bytes"]


@pytest.mark.parametrize(("switch", "grad_bytes"), [("", 4), ("--grad-reduce-in-bf16", 2)])
def test_states_take_as_many_bytes_as_the_gradients_accumulate_in(
    switch: str, grad_bytes: int
) -> None:
    """MLM-1345: 2 + (4, or 2) + 12/dp bytes a parameter under the distributed optimizer."""
    result = check(megatron(f"--use-distributed-optimizer {switch}"), gpus=8, cluster="8xH100")
    assert result.estimate is not None
    assert result.model is not None
    memory, size = result.estimate.memory, result.model.num_params
    assert memory["weights_bytes"] == pytest.approx(2 * size, rel=0.001)
    assert memory["grads_bytes"] == pytest.approx(grad_bytes * size, rel=0.001)
    assert memory["optimizer_bytes"] == pytest.approx(12 / 8 * size, rel=0.001)


def test_the_best_plans_keep_tensors_in_a_node_and_do_not_split_experts_by_tp() -> None:
    """SWIFT-5997: tp and ep inside the domain, pp and dp across, ep rather than etp."""
    plans = meshwright.plan(
        meshwright.load_model("mixtral-8x7b"),
        meshwright.load_cluster("8x8xH100"),
        meshwright.Job(seq_len=4096, gbs=512),
        top=3,
    ).plans
    for plan in plans:
        assert plan.layout.tp * plan.layout.cp <= 8
        assert plan.layout.ep * plan.layout.etp <= 8
        assert plan.layout.etp == 1 < plan.layout.ep


def test_one_gpu_a_node_on_ten_gigabits_waits_for_gradients() -> None:
    """MLM-144: BERT of 0.34 billion parameters on single V100s."""
    flags = (
        "--fp16 --num-layers 24 --hidden-size 1024 --ffn-hidden-size 4096 --num-attention-heads 16"
        " --num-query-groups 16 --vocab-size 30522 --seq-length 512 --micro-batch-size 4"
        " --global-batch-size 32"
    )
    launch = [word for word in megatron(flags) if word != "--bf16"]
    time = priced(launch, 8, "8x1xV100-16GB").time
    assert time["dp_comm_s"] > 2 * time["compute_s"]


def test_one_layout_keeps_other_activations_in_another_framework() -> None:
    """NANO-207: a framework's own recomputation is part of its price."""
    model = "model.path=Qwen/Qwen3-8B"
    skyrl: str = (
        "python -m skyrl.train.main_sft placement.num_gpus_per_node=8 max_length=8192"
        f" batch_size=64 micro_train_batch_size_per_gpu=1 {model}"
        " megatron_config.tensor_model_parallel_size=2"
        " megatron_config.pipeline_model_parallel_size=1"
    )
    whole = verl(
        "tensor_model_parallel_size=2",
        f"actor_rollout_ref.{model} data.max_prompt_length=4096 data.max_response_length=4096",
    )
    recomputed = priced(skyrl.split(), 8, "8xH100").memory["activations_bytes"]
    assert recomputed < 0.3 * priced(whole, 8, "8xH100").memory["activations_bytes"]


def test_more_sharding_does_not_make_longer_sequences_fit_but_splitting_them_does() -> None:
    """TRL-962: beyond 4k a 100B model under ZeRO-3 is full of activations."""
    flags = (
        "--num-layers 80 --hidden-size 10240 --num-attention-heads 80 --ffn-hidden-size 28672"
        " --seq-length 8192 --use-megatron-fsdp --use-distributed-optimizer"
        " --data-parallel-sharding-strategy optim_grads_params --ckpt-format fsdp_dtensor"
        " --no-gradient-accumulation-fusion --global-batch-size 256"
    )
    sharded = priced(megatron(flags), 128, "128xA100", env={})
    doubled = priced(megatron(flags), 256, "256xA100", env={})
    split = priced(megatron(f"{flags} --context-parallel-size 8"), 128, "128xA100", env={})
    assert sharded.verdict == doubled.verdict == "does not fit"
    assert split.verdict == "fits"


def test_the_modules_worth_recomputing_in_a_small_latent_mixture_are_ordered() -> None:
    """BRIDGE-MOON: core attention saves nothing; the experts' activation saves most a second."""

    def modules(names: str) -> Estimate:
        switches = f"""model.recompute_granularity=selective 'model.recompute_modules={names}'"""
        launch = bridge(
            "moonlight_16b_pretrain",
            "model.tensor_model_parallel_size=2 model.sequence_parallel=true"
            f" model.expert_model_parallel_size=8 train.global_batch_size=4 {switches}",
        )
        return priced(launch, 8, "8xH100")

    nothing = modules("[]")
    core, experts = modules('["core_attn"]'), modules('["moe_act"]')
    both = modules('["layernorm", "moe_act"]')
    assert core.peak_bytes == pytest.approx(nothing.peak_bytes, rel=0.002)
    assert core.step_time_s > experts.step_time_s > nothing.step_time_s
    assert both.peak_bytes < experts.peak_bytes < 0.99 * nothing.peak_bytes
    assert both.step_time_s > experts.step_time_s


def test_a_device_that_is_nearly_full_is_not_said_to_fit() -> None:
    """MLM-6429: 70.3 GB allocated, 79.7 GB of 80 used, a sixth of the speed."""
    flags = (
        "--num-layers 14 --hidden-size 7168 --num-attention-heads 128 --ffn-hidden-size 18432"
        " --multi-latent-attention --q-lora-rank 1536 --kv-lora-rank 512 --qk-head-dim 128"
        " --qk-pos-emb-head-dim 64 --v-head-dim 128 --num-experts 256 --moe-router-topk 8"
        " --moe-ffn-hidden-size 2048 --moe-shared-expert-intermediate-size 2048"
        " --pipeline-model-parallel-size 4 --expert-model-parallel-size 16 --vocab-size 129280"
        " --global-batch-size 256 --seq-length 2048 --use-distributed-optimizer"
        " --moe-grouped-gemm --moe-token-dispatcher-type alltoall --moe-router-dtype fp32"
        " --pipeline-model-parallel-layout Et|tt|tt|tt|tt|tt|tt|tL"
        " --overlap-moe-expert-parallel-comm"
    )
    launch = [w for w in megatron(flags) if w != "--group-query-attention"]
    at = launch.index("--num-query-groups")
    del launch[at : at + 2]
    assert priced(launch, 64, "64xH100", env={}).verdict != "fits"


def test_adapters_of_70b_do_not_fit_eight_cards_of_24_gb(tmp_path: Path) -> None:
    """TUNE-2071: the base alone is 17.5 GB a card; gathered layers, logits and context follow."""
    cluster = tmp_path / "desk.toml"
    cluster.write_text(
        'name = "desk"\ngpu = "L40S"\nnum_gpus = 8\ngpus_per_node = 8\n'
        '[gpu_overrides]\nhbm_bytes = "24 GB"\n[source]\nhbm_bytes = "data sheet"\n'
    )
    launch = [
        *("nemo", "llm", "finetune", "--factory", "llama31_70b", "peft=lora"),
        *("trainer.devices=8", "trainer.num_nodes=1", "trainer.strategy.fsdp=megatron"),
        *("data.seq_length=512", "data.micro_batch_size=1", "data.global_batch_size=8"),
    ]
    result = check(launch, cluster=str(cluster))
    assert result.estimate is not None, result.unpriced
    assert result.estimate.verdict != "fits"
    assert result.estimate.memory["weights_bytes"] > 17e9
    assert result.estimate.memory["buffers_bytes"] > 1e9


def test_sending_fused_experts_to_the_engine_needs_room(tmp_path: Path) -> None:
    """VERL-6123: a model of 397B gathers tensors of 4 to 8 GB."""
    small = Path(meshwright.__file__).parent / "describe" / "configs" / "qwen3.5-35b-a3b.json"
    large = {
        "hidden_size": 4096,
        "num_hidden_layers": 60,
        "num_attention_heads": 32,
        "num_experts": 512,
        "num_experts_per_tok": 10,
        "moe_intermediate_size": 1024,
        "shared_expert_intermediate_size": 1024,
    }
    (tmp_path / "config.json").write_text(json.dumps(json.loads(small.read_text()) | large))
    launch = verl(
        "tensor_model_parallel_size=8 pipeline_model_parallel_size=4"
        " expert_model_parallel_size=32 expert_tensor_parallel_size=1",
        f"actor_rollout_ref.model.path={tmp_path} trainer.nnodes=16"
        " actor_rollout_ref.rollout.gpu_memory_utilization=0.5",
    )
    found = {f.id: f for f in check(launch, cluster="16x8xH20").findings}
    assert found["weight_export_fits"].severity == "warning"
    assert "8 GiB" in found["weight_export_fits"].rule


def test_logits_of_two_short_sequences_are_the_allocation_that_failed() -> None:
    """AUTO-1176: 3.91 GiB is 2 * 4096 tokens * 128256 words * 4 bytes; 3,072 tokens fitted."""

    def logits(seq_len: int) -> float:
        launch = bridge(
            "llama31_8b_peft",
            f"model.seq_length={seq_len} dataset.seq_length={seq_len} train.micro_batch_size=2"
            " train.global_batch_size=2 model.cross_entropy_loss_fusion=false",
        )
        return priced(launch, 1, "1xH100").memory["logits_bytes"]

    in_fp32 = 2 * 4096 * 128_256 * 4
    assert in_fp32 / 2**30 == pytest.approx(3.91, abs=0.01)
    assert logits(4096) >= in_fp32
    assert logits(3072) == pytest.approx(0.75 * logits(4096), rel=0.01)


def test_a_recipe_near_the_limit_is_called_borderline() -> None:
    """AUTO-818: near the limit runs fail now and then."""
    launch = verl(
        "tensor_model_parallel_size=2",
        "actor_rollout_ref.model.path=Qwen/Qwen2-7B data.max_prompt_length=2048"
        " data.max_response_length=2048 actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4",
    )
    assert priced(launch, 8, "8xH100").verdict == "borderline"


MOE = "--num-experts 8 --moe-token-dispatcher-type alltoall"


@pytest.mark.parametrize(
    ("flags", "gpus"),
    [
        ("--tensor-model-parallel-size 4 --pipeline-model-parallel-size 4", 8),
        ("--tensor-model-parallel-size 3", 6),
        ("--pipeline-model-parallel-size 3", 6),
        ("--micro-batch-size 3", 8),
        ("--seq-length 4100 --context-parallel-size 8", 8),
        (f"{MOE} --expert-model-parallel-size 3", 6),
        (f"{MOE} --expert-model-parallel-size 2 --tensor-model-parallel-size 2", 8),
        ("--num-virtual-stages-per-pipeline-rank 2", 8),
    ],
)
def test_the_commonest_errors_are_told_from_flags_alone(flags: str, gpus: int) -> None:
    """MLM-5768: world, heads, layers, batch, sequence, experts, experts with tp, chunks."""
    result = check(megatron(flags), gpus=gpus, env=CONNECTION)
    assert not result.ok
    assert all(f.remedy for f in result.findings if f.severity == "error")


def test_the_states_of_a_measured_mixture_are_predicted() -> None:
    """BRIDGE-3880: experts 29.0B/16 * 18 bytes and dense 1.5B * 6.75 bytes: 43 GB of states."""
    launch = bridge(
        "qwen3_30b_a3b_pretrain",
        f"{MOE_16} model.expert_tensor_parallel_size=1",
    )
    memory = priced(launch, 16, "16xH100").memory
    states = sum(memory[f"{term}_bytes"] for term in ("weights", "grads", "optimizer"))
    assert states == pytest.approx(43e9, rel=0.02)
