"""Rules of the frameworks whose settings are paths: each fires on its breach, and not beside it.

Provenance: spec; conditions of the frameworks' sources of August 2026 (verl: January 2026).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import pytest

from launches import bridge, titan, verl
from meshwright.findings import Finding
from meshwright.frameworks.check import check
from meshwright.frameworks.read import read_launch

RL = "trainer.policy.megatron_config"
KWARGS = f"{RL}.transformer_config_kwargs"
ENGINE = "generator.inference_engine"
PLACED = "trainer.placement"
ACTOR = "actor_rollout_ref.actor"


def rl(text: str) -> list[str]:
    """A SkyRL RL run of 8 GPUs."""
    base = "trainer.strategy=megatron trainer.placement.policy_num_gpus_per_node=8"
    named = "" if "model.path" in text else "trainer.policy.model.path=Qwen/Qwen3-8B"
    words = f"{base} {named} {RL}.tensor_model_parallel_size=1 {text}"
    return ["python", "-m", "skyrl.train.entrypoints.main_base", *words.split()]


def rl_fsdp(text: str) -> list[str]:
    return [w.replace("strategy=megatron", "strategy=fsdp") for w in rl(text) if RL not in w]


def sft(text: str) -> list[str]:
    """A SkyRL SFT run of 8 GPUs."""
    base = "placement.num_gpus_per_node=8 max_length=4096 batch_size=64"
    degrees = "megatron_config.tensor_model_parallel_size=1"
    degrees += " megatron_config.pipeline_model_parallel_size=1"
    words = f"{base} {degrees} model.path=Qwen/Qwen3-8B {text}"
    return ["python", "-m", "skyrl.train.main_sft", *words.split()]


TOKENS = "--training.num_tokens_per_microbatch_per_dp_rank 8192 --training.max_context_length 8192"


def llama(options: str) -> list[str]:
    """A torchtitan run of a release that counts tokens."""
    return titan("llama3_8b", f"{TOKENS} --training.disable_cuda_graphs {options}")


def actor(text: str) -> list[str]:
    return verl("", text)


@dataclass(frozen=True)
class Broken:
    """A launch that breaks a rule, what mends it, and where it starts."""

    launch: Callable[[str], list[str]]
    breach: str
    mended: str
    severity: str = "error"
    env: Mapping[str, object] = field(default_factory=dict[str, object])


ADAPTERS = "trainer.policy.model.lora.rank=8"
CRITIC = f"trainer.critic.model.path=q {PLACED}.critic_num_gpus_per_node=8"
BROKEN = {
    "SKY-MG-vlm_cp": Broken(
        rl,
        f"trainer.policy.model.path=Qwen/Qwen2.5-VL-7B {RL}.context_parallel_size=2",
        f"trainer.policy.model.path=Qwen/Qwen2.5-7B {RL}.context_parallel_size=2",
    ),
    "SKY-MG-no_gc": Broken(
        rl,
        f"trainer.gradient_checkpointing=false +{KWARGS}.recompute_granularity=full",
        f"trainer.gradient_checkpointing=true +{KWARGS}.recompute_granularity=full",
        "warning",
    ),
    "SKY-MG-kwargs_last": Broken(
        rl,
        f"+{KWARGS}.tensor_model_parallel_size=2",
        f"+{KWARGS}.fp8=hybrid",
        "warning",
    ),
    "SKY-MG-mtp_zero": Broken(
        rl, "trainer.mtp.enabled=true", f"trainer.mtp.enabled=true {RL}.mtp_num_layers=1"
    ),
    "SKY-CFG-hf_ranks": Broken(
        rl,
        "trainer.hf_export_config.save_every_n_ranks=0",
        "trainer.hf_export_config.save_every_n_ranks=1",
    ),
    "SKY-SFT-pack_padding": Broken(
        sft,
        "use_sequence_packing=true remove_microbatch_padding=false",
        "use_sequence_packing=true",
        "warning",
    ),
    "SKY-SFT-pack_micro1": Broken(
        sft,
        "use_sequence_packing=true micro_train_batch_size_per_gpu=4",
        "use_sequence_packing=true micro_train_batch_size_per_gpu=1",
        "warning",
    ),
    "SKY-RL-critic_micro": Broken(
        rl_fsdp,
        f"{CRITIC} trainer.critic_mini_batch_size=8 trainer.micro_train_batch_size_per_gpu=2",
        f"{CRITIC} trainer.critic_mini_batch_size=16 trainer.micro_train_batch_size_per_gpu=2",
    ),
    "SKY-RL-mtp_spec": Broken(
        rl, "trainer.mtp.num_speculative_tokens=0", "trainer.mtp.num_speculative_tokens=1"
    ),
    "SKY-RL-lora_vllm": Broken(
        rl, f"{ADAPTERS} {ENGINE}.weight_sync_backend=delta", f"{ADAPTERS} {ENGINE}.backend=vllm"
    ),
    "SKY-RL-colocate_ref_nodes": Broken(
        rl, f"{PLACED}.ref_num_nodes=2", f"{PLACED}.ref_num_nodes=1"
    ),
    "SKY-RL-colocate_ref_gpus": Broken(
        rl,
        f"{PLACED}.ref_num_gpus_per_node=4",
        f"{PLACED}.ref_num_gpus_per_node=4 {PLACED}.colocate_policy_ref=false",
    ),
    "SKY-RL-prompt_len": Broken(
        rl,
        "generator.max_input_length=1024 trainer.max_prompt_length=512",
        "generator.max_input_length=1024 trainer.max_prompt_length=512 generator.max_turns=3",
    ),
    "SKY-RL-ie_pd": Broken(
        rl, f"{ENGINE}.num_prefill=2 {ENGINE}.num_engines=2", f"{ENGINE}.num_engines=2"
    ),
    "SKY-RL-ie_ep": Broken(
        rl,
        f"{ENGINE}.expert_parallel_size=4 {ENGINE}.tensor_parallel_size=2",
        f"{ENGINE}.expert_parallel_size=2 {ENGINE}.tensor_parallel_size=2",
    ),
    "VERL-MG-vpp_micro": Broken(
        lambda text: verl(
            "pipeline_model_parallel_size=4 virtual_pipeline_model_parallel_size=2", text
        ),
        f"{ACTOR}.ppo_mini_batch_size=12 data.train_batch_size=12",
        f"{ACTOR}.ppo_mini_batch_size=16 data.train_batch_size=16",
    ),
    "vision_cp_wants_loss_per_token": Broken(
        lambda text: verl("context_parallel_size=2", text),
        "actor_rollout_ref.model.path=Qwen/Qwen3.5-35B-A3B",
        "actor_rollout_ref.model.path=Qwen/Qwen3-30B-A3B",
        "warning",
    ),
    "VERL-MG-disp_fixed": Broken(
        actor,
        f"{ACTOR}.megatron.expert_model_parallel_size=2"
        " actor_rollout_ref.model.path=Qwen/Qwen3-30B-A3B",
        "actor_rollout_ref.model.path=Qwen/Qwen3-8B",
        "note",
    ),
    "TT-CFG-symm": Broken(
        llama,
        "--parallelism.enable_fsdp_symm_mem",
        "",
        env={"site.device_capability": [8, 0]},
    ),
    "TT-DIM-dp_shard_auto": Broken(llama, "", "--parallelism.data_parallel_shard_degree 8", "note"),
    "TT-MODEL-cp_attn": Broken(
        llama,
        "--parallelism.context_parallel_degree 2",
        "--parallelism.context_parallel_degree 2 --model.attn_backend flex",
        "warning",
    ),
    "TT-TRAIN-batch_inv": Broken(llama, "--debug.batch_invariant", ""),
    "TT-TRAIN-typecheck_pp": Broken(
        llama,
        "--debug.spmd_typechecking --parallelism.pipeline_parallel_degree 2",
        "--debug.spmd_typechecking",
    ),
    "TT-TRAIN-budget_ac": Broken(
        llama,
        "--activation_checkpoint.mode memory_budget",
        "--activation_checkpoint.mode memory_budget --compile.enable",
    ),
    "TT-COMM-ngpu": Broken(llama, "--comm.mode fake_backend", "--comm.mode default"),
    "TT-PP-default_stages": Broken(
        llama,
        "--parallelism.pipeline_parallel_degree 2",
        "--parallelism.pipeline_parallel_degree 2"
        " --parallelism.pipeline_parallel_layers_per_stage 17",
        "note",
    ),
    "shards_are_uneven": Broken(
        llama,
        "--parallelism.data_parallel_shard_degree 6",
        "--parallelism.data_parallel_shard_degree 8",
        "warning",
    ),
}


def found(launch: list[str], env: Mapping[str, object]) -> dict[str, Finding]:
    """Findings by id on 8 GPUs; the first of each, since errors come before warnings."""
    findings: dict[str, Finding] = {}
    for finding in read_launch(launch, gpus=8, env=env).findings:
        findings.setdefault(finding.id, finding)
    return findings


@pytest.mark.parametrize("rule", BROKEN)
def test_a_rule_fires_on_its_breach_and_not_beside_it(rule: str) -> None:
    case = BROKEN[rule]
    broken = found(case.launch(case.breach), case.env)
    assert rule in broken, sorted(broken)
    assert broken[rule].severity == case.severity
    assert "{" not in broken[rule].message
    assert rule not in found(case.launch(case.mended), {**case.env, "NGPU": "8"})


def test_a_packed_sft_run_computes_one_packed_sequence_at_a_time() -> None:
    launch = sft("use_sequence_packing=true max_tokens_per_microbatch=8192")
    assert read_launch(launch).words["micro_batch_size"] == 1


def test_attention_of_torchtitan_is_stated_to_be_flex_or_refused() -> None:
    launch = llama("--parallelism.context_parallel_degree 2 --model.attn_backend sdpa")
    assert found(launch, {})["TT-MODEL-cp_attn"].severity == "error"


def test_torchtitan_of_2025_splits_sequences_without_flex_attention() -> None:
    options = "--training.local_batch_size 1 --training.seq_len 8192"
    launch = titan("llama3_8b", f"{options} --parallelism.context_parallel_degree 2")
    assert "TT-MODEL-cp_attn" not in found(launch, {})


def test_the_gpu_of_a_cluster_is_the_one_that_rules_ask_about() -> None:
    launch = llama("--parallelism.enable_fsdp_symm_mem")
    assert check(launch, cluster="8xH100").ok
    old = check(launch, cluster="8xA100")
    assert "TT-CFG-symm" in {f.id for f in old.findings}
    assert not old.ok


def test_adapters_of_a_bridge_recipe_need_the_weights_that_they_adapt() -> None:
    recipe = bridge("llama3_8b_peft", "model.tensor_model_parallel_size=2")
    assert "MB-CFG-peft_ckpt" in found(recipe, {})
    stated = [*recipe, "checkpoint.pretrained_checkpoint=/weights"]
    assert "MB-CFG-peft_ckpt" not in found(stated, {})
    from_outside = [*recipe, "checkpoint.pretrained_checkpoint=$WEIGHTS"]
    assert "MB-CFG-peft_ckpt" not in found(from_outside, {})


@pytest.mark.parametrize(
    ("overrides", "rule"),
    [
        ("dataset.micro_batch_size=2", "MB-CFG-energon_mbs"),
        ("dataset.packing_buffer_size=8 train.micro_batch_size=2", "MB-CFG-energon_pack_mbs"),
        (
            "dataset.packing_buffer_size=8 model.pipeline_model_parallel_size=2",
            "MB-CFG-energon_pack_pp",
        ),
        (
            "dataset.packing_buffer_size=8 model.overlap_moe_expert_parallel_comm=true",
            "MB-CFG-energon_overlap",
        ),
    ],
)
def test_energon_data_restrict_the_batch_and_the_pipeline(overrides: str, rule: str) -> None:
    assert rule in found(bridge("qwen3_30b_a3b_sft", overrides), {})
    assert rule not in found(bridge("qwen3_30b_a3b_sft", ""), {})


def test_skyrl_rounds_samples_down_to_its_ranks_and_only_warns() -> None:
    launch = rl(
        "trainer.train_batch_size=36 trainer.policy_mini_batch_size=12"
        " generator.n_samples_per_prompt=1"
    )
    result = check(launch, gpus=8)
    assert result.ok
    assert "tail_is_cut" in {f.id for f in result.findings}


def test_what_is_taken_for_granted_of_a_recipe_is_nothing_to_warn_of() -> None:
    recipe = bridge("qwen3_30b_a3b_pretrain", "model.expert_tensor_parallel_size=1")
    warned = {f.id for f in check(recipe, gpus=64).findings if f.severity != "note"}
    assert not warned & {"MB-CFG-opg_sync", "MB-CFG-distopt_sync", "MLM-TC-router_dtype"}
    said = [*recipe, "ddp.overlap_param_gather=true", "optimizer.overlap_param_gather=false"]
    assert "MB-CFG-opg_sync" in {f.id for f in check(said, gpus=64).findings}


@pytest.mark.parametrize(("asked", "severity"), [("true", "note"), ("false", "warning")])
def test_an_overlap_that_is_overwritten_is_warned_of_and_an_unset_size_is_not(
    asked: str, severity: str
) -> None:
    words = f"comm_overlap.tp_comm_overlap=false ddp.overlap_grad_reduce={asked}"
    found = check(bridge("llama3_8b_pretrain", words), gpus=8).findings
    (told,) = [f for f in found if f.id == "MB-OVL-dp_defaults"]
    assert told.severity == severity
