"""verl's Hydra overrides in Megatron Core's words: the actor of the PPO trainer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from meshwright.frameworks.by_path import Facts, by_path, judge, take
from meshwright.frameworks.launch import Reading, Setting
from meshwright.frameworks.launchers import Started
from meshwright.frameworks.overrides import Override
from meshwright.frameworks.ray_workers import (
    expert_tensor_default,
    made_of,
    read_adapters,
    read_world,
)
from meshwright.frameworks.spelling import misread
from meshwright.frameworks.verl.rules import RULES

TITLE: Final = "verl"
ACTOR: Final = "actor_rollout_ref.actor"
ROLLOUT: Final = "actor_rollout_ref.rollout"
_MEGATRON: Final = f"{ACTOR}.megatron"

DIRECT: Final = {
    word: f"{_MEGATRON}.{word}"
    for word in (
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "virtual_pipeline_model_parallel_size",
        "context_parallel_size",
        "expert_model_parallel_size",
        "expert_tensor_parallel_size",
        "sequence_parallel",
        "use_distributed_optimizer",
    )
}
TRANSFORMER: Final = {
    word: f"{_MEGATRON}.override_transformer_config.{word}"
    for word in (
        *("recompute_granularity", "recompute_method", "recompute_num_layers"),
        *("recompute_modules", "cp_comm_type", "microbatch_group_size_per_vp_stage"),
        *("overlap_p2p_comm", "tp_comm_overlap", "overlap_moe_expert_parallel_comm"),
        *("delay_wgrad_compute", "cross_entropy_loss_fusion", "attention_backend"),
        *("pipeline_model_parallel_layout", "account_for_embedding_in_pipeline_split"),
        *("account_for_loss_in_pipeline_split", "num_layers_in_first_pipeline_stage"),
        *("num_layers_in_last_pipeline_stage", "moe_token_dispatcher_type", "moe_grouped_gemm"),
        *("moe_flex_dispatcher_backend", "moe_expert_capacity_factor", "fp8", "fp8_recipe"),
        *("moe_shared_expert_overlap", "cpu_offloading_num_layers", "masked_softmax_fusion"),
        *("moe_permute_fusion", "gradient_accumulation_fusion", "offload_modules"),
        *("use_transformer_engine_op_fuser", "fine_grained_activation_offloading"),
    )
}
DDP: Final = {
    word: f"{_MEGATRON}.override_ddp_config.{word}"
    for word in (
        *("overlap_grad_reduce", "overlap_param_gather", "use_megatron_fsdp"),
        "data_parallel_sharding_strategy",
    )
}
OPTIMIZER: Final = {
    word: f"{ACTOR}.optim.override_optimizer_config.{word}"
    for word in ("optimizer_cpu_offload", "optimizer_offload_fraction")
}
NAMES: Final = {
    **DIRECT,
    **TRANSFORMER,
    **DDP,
    **OPTIMIZER,
    "micro_batch_size": f"{ACTOR}.ppo_micro_batch_size_per_gpu",
}
PLAIN: Final = frozenset({"recompute_granularity", "recompute_method", "recompute_num_layers"}) | {
    "recompute_modules",
    "attention_backend",
}
"""Words of the transformer override that verl's configuration already names: no ``+`` is needed."""

DEFAULTS: Final[dict[str, Any]] = {
    "trainer.nnodes": 1,
    "trainer.n_gpus_per_node": 8,
    "data.train_batch_size": 1024,
    "data.max_prompt_length": 512,
    "data.max_response_length": 512,
    f"{ACTOR}.ppo_mini_batch_size": 256,
    "actor_rollout_ref.rollout.n": 1,
    "actor_rollout_ref.rollout.temperature": 1.0,
    f"{ACTOR}.use_dynamic_bsz": False,
    f"{_MEGATRON}.dtype": "bfloat16",
    f"{_MEGATRON}.use_mbridge": True,
}
_ALWAYS: Final[dict[str, Any]] = {
    "use_distributed_optimizer": True,
    "moe_token_dispatcher_type": "alltoall",
    "overlap_grad_reduce": False,
    "overlap_param_gather": False,
    "tp_comm_overlap": False,
    "cross_entropy_loss_fusion": False,
    "moe_grouped_gemm": True,
    "moe_permute_fusion": False,
}


def read(
    found: Sequence[Override],
    chosen: Started | None,
    gpus: int | None,
    env: Mapping[str, object],
) -> Reading:
    """Read the overrides of a launch; Ray starts the processes, so the trainer counts them."""
    del env, gpus
    reading = Reading(argv=[f"{o.prefix}{o.path}={o.value}" for o in found])
    known = by_path(found)
    defaults = {**DEFAULTS, f"{ACTOR}.strategy": "megatron" if _by_name(chosen) else "fsdp"}
    facts = Facts(known, reading, defaults, None)
    read_world(reading, facts, "trainer.nnodes", "trainer.n_gpus_per_node", TITLE)
    if facts[f"{ACTOR}.strategy"] == "megatron" or any(p.startswith(_MEGATRON) for p in known):
        _megatron(reading, known, facts)
    else:
        reading.default("use_torch_fsdp2", True, TITLE)
        reading.default("bf16", True, TITLE)
        take(reading, known, {"micro_batch_size": NAMES["micro_batch_size"]})
    _batch(reading, known, facts)
    reading.findings = [*misread(known, NAMES, defaults, RULES), *judge(RULES, facts)]
    return reading


def _by_name(chosen: Started | None) -> bool:
    return chosen is not None and any(
        "config-name" in w.text and "megatron" in w.text for w in chosen.args
    )


def _megatron(reading: Reading, known: Mapping[str, Override], facts: Facts) -> None:
    take(reading, known, NAMES)
    for word, value in _ALWAYS.items():
        reading.default(word, value, TITLE)
    dtype = facts[f"{_MEGATRON}.dtype"]
    reading.default("fp16" if dtype == "float16" else "bf16", True, TITLE)
    tp = reading.settings.get("tensor_model_parallel_size")
    split = tp is not None and tp.value not in (None, 1)
    reading.default("sequence_parallel", split, f"{TITLE} (off when TP = 1)")
    expert_tensor_default(reading, f"{TITLE} (TP)")


def _batch(reading: Reading, known: Mapping[str, Override], facts: Facts) -> None:
    for word, paths, both in (
        ("global_batch_size", (f"{ACTOR}.ppo_mini_batch_size", f"{ROLLOUT}.n"), math.prod),
        ("seq_length", ("data.max_prompt_length", "data.max_response_length"), sum),
    ):
        parts = [facts.whole(path) for path in paths]
        if all(part is not None for part in parts) and both(part or 0 for part in parts) > 0:
            value = both(part or 0 for part in parts)
            reading.settings[word] = made_of(known, paths, value, TITLE)
    reading.settings["task"] = Setting(value="sft", origin=f"{TITLE}'s actor update")
    _rollout(reading, known, facts)
    path = known.get("actor_rollout_ref.model.path")
    if path is not None:
        reading.settings["model"] = Setting(value=path.value, origin=path.origin)
    for rank in ("lora_rank", "lora.rank"):
        read_adapters(reading, known, f"actor_rollout_ref.model.{rank}")


def _rollout(reading: Reading, known: Mapping[str, Override], facts: Facts) -> None:
    """Read what generation and the other roles hold on the same GPUs."""
    reading.default("rl_trainer", True, TITLE)
    take(
        reading,
        known,
        {
            "rollout_memory_fraction": f"{ROLLOUT}.gpu_memory_utilization",
            "rollout_tensor_model_parallel_size": f"{ROLLOUT}.tensor_model_parallel_size",
        },
    )
    fused = facts["actor_rollout_ref.model.use_fused_kernels"] is True
    reading.default("policy_keeps_logits", not fused, TITLE)
    kind = "megatron" if facts[f"{ACTOR}.strategy"] == "megatron" else "fsdp_config"
    reading.default("states_offloaded", facts[f"{ACTOR}.{kind}.optimizer_offload"] is True, TITLE)
    critic = facts["algorithm.adv_estimator"] == "gae" or facts.given("critic.model.path")
    scored = (f"{ACTOR}.use_kl_loss", "algorithm.use_kl_in_reward")
    roles = {
        "critic": critic and facts[f"critic.{kind}.optimizer_offload"] is not True,
        "reference": any(facts[path] is True for path in scored)
        and facts[f"actor_rollout_ref.ref.{kind}.param_offload"] is not True,
    }
    reading.default("rl_roles", [name for name, held in roles.items() if held], TITLE)
