"""NeMo 2 strategy fields in Megatron Core's words: overrides, or a Python recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from meshwright.frameworks.by_path import Facts, by_path, judge, take
from meshwright.frameworks.launch import Reading, Setting
from meshwright.frameworks.launchers import Started
from meshwright.frameworks.nemo.rules import RULES
from meshwright.frameworks.overrides import Override
from meshwright.frameworks.spelling import misread

TITLE: Final = "NeMo 2"

STRATEGY: Final = {
    word: f"trainer.strategy.{word}"
    for word in (
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "virtual_pipeline_model_parallel_size",
        "microbatch_group_size_per_vp_stage",
        "context_parallel_size",
        "expert_model_parallel_size",
        "expert_tensor_parallel_size",
        "sequence_parallel",
        "use_tp_pp_dp_mapping",
        "num_distributed_optimizer_instances",
        "pipeline_model_parallel_layout",
        "account_for_embedding_in_pipeline_split",
        "account_for_loss_in_pipeline_split",
        "num_layers_in_first_pipeline_stage",
        "num_layers_in_last_pipeline_stage",
    )
}
DDP: Final = {
    word: f"trainer.strategy.ddp.{word}"
    for word in (
        "use_distributed_optimizer",
        "overlap_grad_reduce",
        "overlap_param_gather",
        "data_parallel_sharding_strategy",
        "use_megatron_fsdp",
    )
}
OVERLAP: Final = {
    word: f"MegatronCommOverlapCallback.{word}" for word in ("tp_comm_overlap", "overlap_p2p_comm")
}
CONFIG: Final = {
    word: f"model.config.{word}"
    for word in (
        *("cp_comm_type", "hierarchical_context_parallel_sizes", "recompute_granularity"),
        *("recompute_method", "recompute_num_layers", "recompute_modules"),
        *("overlap_moe_expert_parallel_comm", "delay_wgrad_compute", "cross_entropy_loss_fusion"),
        *("moe_token_dispatcher_type", "moe_grouped_gemm", "moe_shared_expert_overlap"),
        "moe_permute_fusion",
        *("moe_expert_capacity_factor", "attention_backend", "cpu_offloading_num_layers"),
        *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads"),
        *("num_query_groups", "kv_channels", "vocab_size", "num_moe_experts"),
        *("moe_router_topk", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size"),
        *("moe_layer_freq", "mtp_num_layers", "multi_latent_attention", "q_lora_rank"),
        *("kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim"),
        *("gated_linear_unit", "add_bias_linear", "add_qkv_bias", "qk_layernorm"),
        *("normalization", "share_embeddings_and_output_weights", "position_embedding_type"),
        *("hidden_dropout", "moe_router_enable_expert_bias", "moe_shared_expert_gate"),
        *("masked_softmax_fusion", "gradient_accumulation_fusion", "offload_modules"),
        *("use_transformer_engine_op_fuser", "fine_grained_activation_offloading"),
        *("window_size", "window_attn_skip_freq", "softmax_type", "moe_router_score_function"),
    )
}
REST: Final = {
    "micro_batch_size": "data.micro_batch_size",
    "global_batch_size": "data.global_batch_size",
    "seq_length": "data.seq_length",
    "optimizer_cpu_offload": "optim.config.optimizer_cpu_offload",
    "optimizer_offload_fraction": "optim.config.optimizer_offload_fraction",
    "fp8": "MegatronMixedPrecision.fp8",
    "fp8_recipe": "MegatronMixedPrecision.fp8_recipe",
    "fp4": "MegatronMixedPrecision.fp4",
    "fp4_recipe": "MegatronMixedPrecision.fp4_recipe",
}
NAMES: Final = {**STRATEGY, **DDP, **OVERLAP, **CONFIG, **REST}

CLASSES: Final = {
    "MegatronStrategy": "trainer.strategy",
    "FSDP2Strategy": "fsdp2_strategy",
    "DistributedDataParallelConfig": "trainer.strategy.ddp",
    "OptimizerConfig": "optim.config",
    "Trainer": "trainer",
}
"""Classes of a Python recipe, and the path that each stands at."""

_DEFAULTS: Final[dict[str, Any]] = {
    "add_bias_linear": True,
    "share_embeddings_and_output_weights": True,
}


def read(
    found: Sequence[Override],
    chosen: Started | None,
    gpus: int | None,
    env: Mapping[str, object],
) -> Reading:
    """Read overrides or keyword arguments of a launch on ``gpus`` ranks (None: not known)."""
    del env
    reading = Reading(argv=[f"{o.path}={o.value}" for o in found])
    known = {_path(path): override for path, override in by_path(found).items()}
    _read_world(reading, known)
    take(reading, known, NAMES)
    if "seq_length" not in reading.settings and "model.config.seq_length" in known:
        override = known["model.config.seq_length"]
        reading.settings["seq_length"] = Setting(value=override.value, origin=override.origin)
    _precision(reading, known)
    _fsdp(reading, known)
    _model(reading, known, chosen)
    for word, value in _DEFAULTS.items():
        reading.default(word, value, TITLE)
    ep = reading.settings.get("expert_model_parallel_size")
    if ep is not None and ep.value not in (None, 1):
        tp = reading.settings.get("tensor_model_parallel_size")
        reading.default("expert_tensor_parallel_size", 1 if tp is None else tp.value, TITLE)
    facts = Facts(known, reading, {}, gpus or reading.gpus)
    reading.findings = [
        *misread(known, NAMES, {"trainer.num_nodes": 1}, RULES),
        *judge(RULES, facts),
    ]
    return reading


def _path(path: str) -> str:
    """Return the path that a keyword argument of a class, or an override, stands at."""
    head, _, name = path.partition(".")
    if head in CLASSES:
        return f"{CLASSES[head]}.{name}"
    if head.endswith("DataModule") or head == "DataModule":
        return f"data.{name}"
    if "Config" in head and head not in ("CheckpointConfig", "MegatronCommOverlapCallback"):
        return f"model.config.{name}"
    if path.startswith("trainer.plugins."):
        return f"MegatronMixedPrecision.{path.rpartition('.')[2]}"
    if path.startswith("trainer.callbacks.") or path.startswith("comm_overlap."):
        return f"MegatronCommOverlapCallback.{path.rpartition('.')[2]}"
    return path


_SIZES: Final = (
    ("trainer.num_nodes", "trainer.devices"),
    ("pretrain_recipe.num_nodes", "pretrain_recipe.num_gpus_per_node"),
    ("finetune_recipe.num_nodes", "finetune_recipe.num_gpus_per_node"),
)
"""Where nodes and GPUs of a node are stated; what is assigned to the trainer comes last."""


def _read_world(reading: Reading, known: Mapping[str, Override]) -> None:
    for nodes, devices in _SIZES:
        sizes = [known[path].value for path in (devices, nodes) if path in known]
        if devices in known and all(isinstance(s, int) and 0 < s <= 2**20 for s in sizes):
            reading.gpus_per_node = sizes[0]
            reading.gpus = min(sizes[0] * (sizes[1] if len(sizes) > 1 else 1), 2**20)
            return


def _precision(reading: Reading, known: Mapping[str, Override]) -> None:
    for path in ("MegatronMixedPrecision.precision", "trainer.precision"):
        if path in known:
            text = str(known[path].value)
            word = "fp16" if text.startswith("16") else "bf16" if "bf16" in text else ""
            if word:
                reading.settings[word] = Setting(value=True, origin=known[path].origin)
            return
    reading.default("bf16", True, TITLE)


def _fsdp(reading: Reading, known: Mapping[str, Override]) -> None:
    fsdp = known.get("trainer.strategy.fsdp")
    if fsdp is not None and fsdp.value == "megatron":
        reading.settings["use_megatron_fsdp"] = Setting(value=True, origin=fsdp.origin)
        reading.default("data_parallel_sharding_strategy", "optim_grads_params", TITLE)


_OF_RECIPES: Final = ("use_distributed_optimizer", "overlap_grad_reduce", "overlap_param_gather")


def _recipe_defaults(reading: Reading, recipe: str) -> None:
    """Fill in what NeMo's recipes of language models share: the optimizer is sharded."""
    if not set(_OF_RECIPES) & reading.settings.keys():
        reading.assumed.append(
            f"recipe {recipe}: an overlapped distributed optimizer, as NeMo's recipes have it; what"
            " the recipe sets besides is not read"
        )
    for word in _OF_RECIPES:
        reading.settings.setdefault(
            word, Setting(value=True, origin=f"default of {TITLE}'s recipes")
        )


def _model(reading: Reading, known: Mapping[str, Override], chosen: Started | None) -> None:
    name = known.get("recipe")
    text, origin = (str(name.value), name.origin) if name is not None else ("", "")
    words = [w.text for w in chosen.args] if chosen is not None else []
    for at, word in enumerate(words[:-1]):
        if word == "--factory":
            text, origin = words[at + 1], "--factory"
    tuned = known.get("finetune")
    if "finetune" in text or "finetune" in words or tuned is not None:
        origin = origin or (tuned.origin if tuned is not None else "finetune")
        reading.settings["task"] = Setting(value="sft", origin=origin)
    peft = known.get("LoRA.dim") or known.get("peft")
    if peft is not None and (peft.path == "LoRA.dim" or str(peft.value).lower() == "lora"):
        reading.settings["task"] = Setting(value="lora", origin=peft.origin)
        if isinstance(peft.value, int):
            reading.settings["lora_rank"] = Setting(value=peft.value, origin=peft.origin)
    if text:
        reading.settings["model"] = Setting(value=text, origin=origin)
        _recipe_defaults(reading, text)
    path = known.get("model.name")
    if path is not None:
        reading.settings["model"] = Setting(value=path.value, origin=path.origin)
