"""SkyRL's Hydra overrides in Megatron Core's words: the RL trainer and the SFT trainer.

They spell the same fields under different roots and have different defaults: SFT splits by TP 2
and PP 2 where nothing is said. ``transformer_config_kwargs`` are applied last and win.
"""

from __future__ import annotations

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
from meshwright.frameworks.skyrl.rl_rules import RL_RULES
from meshwright.frameworks.skyrl.rules import DIRECT, RL, SFT
from meshwright.frameworks.skyrl.sft_rules import SFT_RULES
from meshwright.frameworks.spelling import misread

TITLE: Final = "SkyRL"
DDP: Final = ("overlap_grad_reduce", "overlap_param_gather")
KWARGS: Final = (
    *("sequence_parallel", "cp_comm_type", "recompute_granularity", "recompute_method"),
    *("recompute_num_layers", "recompute_modules", "tp_comm_overlap", "attention_backend"),
    *("overlap_moe_expert_parallel_comm", "delay_wgrad_compute", "cross_entropy_loss_fusion"),
    *("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split"),
    *("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"),
    *("fp8", "fp8_recipe", "moe_flex_dispatcher_backend", "moe_expert_capacity_factor"),
    *("moe_shared_expert_overlap", "cpu_offloading_num_layers", "moe_grouped_gemm"),
    *("virtual_pipeline_model_parallel_size", "moe_permute_fusion", "masked_softmax_fusion"),
    *("gradient_accumulation_fusion", "use_transformer_engine_op_fuser"),
    *("fine_grained_activation_offloading", "offload_modules"),
)
"""Fields that go through ``transformer_config_kwargs``."""
OPTIMIZER: Final = ("optimizer_cpu_offload", "optimizer_offload_fraction")

_RL_DEFAULTS: Final[dict[str, Any]] = {
    "trainer.strategy": "fsdp",
    "trainer.policy_mini_batch_size": 256,
    "trainer.train_batch_size": 1024,
    "trainer.micro_train_batch_size_per_gpu": 1,
    "trainer.micro_forward_batch_size_per_gpu": 1,
    "generator.n_samples_per_prompt": 5,
    "trainer.max_prompt_length": 512,
    "generator.sampling_params.max_generate_length": 1024,
    "trainer.placement.policy_num_nodes": 1,
    "trainer.placement.policy_num_gpus_per_node": 4,
    "trainer.remove_microbatch_padding": True,
    "generator.inference_engine.backend": "vllm",
    "generator.inference_engine.weight_sync_backend": "nccl",
}
_SFT_DEFAULTS: Final[dict[str, Any]] = {
    "strategy": "megatron",
    "placement.num_nodes": 1,
    "placement.num_gpus_per_node": 4,
    "micro_train_batch_size_per_gpu": 2,
    "batch_size": 4,
    "remove_microbatch_padding": True,
}
_ALWAYS: Final[dict[str, Any]] = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
    "moe_token_dispatcher_type": "alltoall",
    "bf16": True,
    "use_distributed_optimizer": True,
    "overlap_grad_reduce": False,
    "overlap_param_gather": False,
    "tp_comm_overlap": False,
    "cross_entropy_loss_fusion": False,
    "moe_grouped_gemm": True,
    "moe_permute_fusion": False,
    "gradient_accumulation_fusion": False,
}


def names(root: str) -> dict[str, str]:
    """Return the path of every word under the root of one of the trainers."""
    return {
        **{word: f"{root}.{word}" for word in DIRECT},
        **{word: f"{root}.ddp_config.{word}" for word in DDP},
        **{word: f"{root}.optimizer_config_kwargs.{word}" for word in OPTIMIZER},
    }


def kwargs(root: str) -> dict[str, str]:
    """Return the paths of the words that ``transformer_config_kwargs`` sets."""
    return {word: f"{root}.transformer_config_kwargs.{word}" for word in KWARGS}


def is_sft(paths: Sequence[str], program: str) -> bool:
    """Say whether the SFT trainer is configured."""
    if "main_sft" in program or "sft" in program.rpartition("/")[2]:
        return True
    return any(p.startswith((f"{SFT}.", "placement.num_")) for p in paths)


def read(
    found: Sequence[Override],
    chosen: Started | None,
    gpus: int | None,
    env: Mapping[str, object],
) -> Reading:
    """Read the overrides of a launch; Ray starts the processes, so the placement counts them."""
    del env, gpus
    reading = Reading(argv=[f"{o.prefix}{o.path}={o.value}" for o in found])
    known = by_path(found)
    sft = is_sft(list(known), chosen.program.text if chosen is not None else "")
    defaults, root = (_SFT_DEFAULTS, SFT) if sft else (_RL_DEFAULTS, RL)
    facts = Facts(known, reading, defaults, None)
    nodes, per_node = (
        ("placement.num_nodes", "placement.num_gpus_per_node")
        if sft
        else ("trainer.placement.policy_num_nodes", "trainer.placement.policy_num_gpus_per_node")
    )
    read_world(reading, facts, nodes, per_node, TITLE)
    strategy = "strategy" if sft else "trainer.strategy"
    if facts[strategy] == "megatron" or any(p.startswith(f"{root}.") for p in known):
        _megatron(reading, known, root, sft)
    else:
        reading.settings["use_torch_fsdp2"] = _setting(known, facts, strategy, True)
        reading.default("bf16", True, TITLE)
    _batch(reading, known, facts, sft)
    _model(reading, known, sft)
    rules = SFT_RULES if sft else RL_RULES
    every = {**names(root), **kwargs(root)}
    reading.findings = [*misread(known, every, defaults, rules), *judge(rules, facts)]
    return reading


def _setting(known: Mapping[str, Override], facts: Facts, path: str, value: Any) -> Setting:
    if path in known:
        return Setting(value=value, origin=known[path].origin)
    return Setting(value=value, origin=f"default of {TITLE} ({path}={facts[path]})")


def _megatron(reading: Reading, known: Mapping[str, Override], root: str, sft: bool) -> None:
    take(reading, known, names(root))
    take(reading, known, kwargs(root))
    _nulls(reading, known, root)
    if sft:
        for word in ("tensor_model_parallel_size", "pipeline_model_parallel_size"):
            reading.default(word, 2, f"{TITLE}'s SFT trainer")
    off = known.get("trainer.gradient_checkpointing")
    if off is not None and off.value is False:
        for word in ("recompute_granularity", "recompute_method", "recompute_num_layers"):
            reading.settings[word] = Setting(value=None, origin=off.origin)
    for word, value in _ALWAYS.items():
        reading.default(word, value, TITLE)
    tp = reading.settings.get("tensor_model_parallel_size")
    split = tp is not None and isinstance(tp.value, int) and tp.value > 1
    reading.default("sequence_parallel", split, f"{TITLE} (on when TP > 1)")
    expert_tensor_default(reading, f"{TITLE} (TP)")


def _nulls(reading: Reading, known: Mapping[str, Override], root: str) -> None:
    """Take a null as "off" where the default is something."""
    for word in ("recompute_granularity", "recompute_method", "recompute_num_layers"):
        override = known.get(f"{root}.transformer_config_kwargs.{word}")
        if override is not None and override.value is None:
            reading.settings[word] = Setting(value=None, origin=override.origin)


def _batch(reading: Reading, known: Mapping[str, Override], facts: Facts, sft: bool) -> None:
    micro = ("" if sft else "trainer.") + "micro_train_batch_size_per_gpu"
    reading.settings["micro_batch_size"] = _setting(known, facts, micro, facts[micro])
    if sft:
        if facts["use_sequence_packing"] is True:
            packs = known["use_sequence_packing"].origin
            reading.settings["micro_batch_size"] = Setting(value=1, origin=packs)
        reading.settings["global_batch_size"] = _setting(
            known, facts, "batch_size", facts["batch_size"]
        )
        if facts.whole("max_length"):
            reading.settings["seq_length"] = _setting(
                known, facts, "max_length", facts["max_length"]
            )
        reading.settings["task"] = Setting(value="sft", origin=f"{TITLE}'s SFT trainer")
        return
    mini, samples = "trainer.policy_mini_batch_size", "generator.n_samples_per_prompt"
    if facts.whole(mini) is not None and facts.whole(samples) is not None:
        batch = (facts.whole(mini) or 0) * (facts.whole(samples) or 0)
        reading.settings["global_batch_size"] = made_of(known, (mini, samples), batch, TITLE)
    if facts["trainer.placement.colocate_all"] is not False:
        reading.default("rl_trainer", True, TITLE)
        fraction = "generator.inference_engine.gpu_memory_utilization"
        take(reading, known, {"rollout_memory_fraction": fraction})
    prompt = "trainer.max_prompt_length"
    answer = "generator.sampling_params.max_generate_length"
    total = (facts.whole(prompt) or 0) + (facts.whole(answer) or 0)
    reading.settings["seq_length"] = made_of(known, (prompt, answer), total, TITLE)
    reading.settings["task"] = Setting(value="sft", origin=f"{TITLE}'s policy update")


def _model(reading: Reading, known: Mapping[str, Override], sft: bool) -> None:
    prefix = "" if sft else "trainer.policy."
    path = known.get(f"{prefix}model.path")
    if path is not None:
        reading.settings["model"] = Setting(value=path.value, origin=path.origin)
    read_adapters(reading, known, f"{prefix}model.lora.rank")
