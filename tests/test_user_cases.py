"""Problems that people reported: a check says, before the start, what the case's rule says.

Provenance: public issue threads; ``tests/data/user_cases.jsonl`` has the rule of each.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from launches import CONNECTION, LLAMA_70B, bridge, megatron, titan, verl
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
}
"""Cases whose answer is a finding."""

ELSEWHERE = {
    "answered by what plan, search and the accuracy table price": (
        *("MLM-92", "BRIDGE-3880", "MLM-1258", "BRIDGE-949", "BRIDGE-5318", "TITAN-1789"),
        *("MLM-482", "MLM-1345", "BRIDGE-3561", "MLM-6314", "MLM-637", "SWIFT-5997", "MLM-144"),
        *("NANO-207", "TRL-962", "BRIDGE-MOON", "BRIDGE-LORA", "MLM-6429", "VERL-2935"),
        *("TUNE-2071", "VERL-1629"),
    ),
    "asks for what a launch does not say: other roles, host memory, phases, images": (
        *("VERL-388", "VERL-6123", "LITGPT-438", "ALIGNER-444", "MLM-5240", "BRIDGE-DISP"),
        *("VERL-6609", "TITAN-1136"),
    ),
    "a log's or a message's, for diagnose": ("AUTO-1176", "AUTO-818", "BRIDGE-3107", "MLM-5768"),
    "below, by a test of its own": (
        *("ROCM-85", "MLM-1754", "TITAN-1690", "DS-4477", "TITAN-811", "TITAN-850"),
        *("BRIDGE-5637", "BRIDGE-MT1", "BRIDGE-MT2"),
    ),
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
