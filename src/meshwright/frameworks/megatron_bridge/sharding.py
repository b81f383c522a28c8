"""Rules of Megatron-FSDP in Bridge, versions 1 and 2, and of the two optimizer switches."""

from __future__ import annotations

from typing import Any

from meshwright.frameworks.megatron_lm.rules import Rule, Settings, Test, change, error


def _fsdp(s: Settings) -> bool:
    return s.use_megatron_fsdp or s.dist_use_megatron_fsdp


def _v1(s: Settings) -> bool:
    return _fsdp(s) and s.megatron_fsdp_version == 1


def _v2(s: Settings) -> bool:
    return _fsdp(s) and s.megatron_fsdp_version == 2


def _checkpoints(s: Settings) -> bool:
    return s.save is not None or s.checkpoint_load is not None


def _degrees(s: Settings) -> object:
    sizes = {"tp": s.tp, "pp": s.pp, "cp": s.cp, "ep": s.ep}
    wrong = ", ".join(f"{k} = {v}" for k, v in sizes.items() if v != 1)
    return _v2(s) and wrong and {"wrong": wrong}


def _forced(s: Settings) -> object:
    if not _v2(s):
        return None
    new: dict[str, Any] = {
        "data_parallel_sharding_strategy": "optim_grads_params",
        "use_distributed_optimizer": False,
        "optimizer_use_distributed_optimizer": False,
        "overlap_grad_reduce": False,
        "overlap_param_gather": False,
        "optimizer_overlap_param_gather": False,
        "gradient_accumulation_fusion": False,
    }
    return new


def _distributed_optimizer(s: Settings) -> object:
    both = (s.use_distributed_optimizer, s.optimizer_use_distributed_optimizer)
    return any(both) and {
        "use_distributed_optimizer": True,
        "optimizer_use_distributed_optimizer": True,
    }


def _gather(s: Settings) -> object:
    both = (s.overlap_param_gather, s.optimizer_overlap_param_gather)
    return any(both) and {"overlap_param_gather": True, "optimizer_overlap_param_gather": True}


def _v1_optimizer(s: Settings) -> object:
    return _v1(s) and {
        "use_distributed_optimizer": True,
        "optimizer_use_distributed_optimizer": True,
    }


def _no_reuse(s: Settings) -> object:
    return _v1(s) and {
        "reuse_grad_buf_for_mxfp8_param_ag": False,
        "optimizer_reuse_grad_buf_for_mxfp8_param_ag": False,
    }


def _version_2(id: str, line: int, name: str, test: Test, what: str, value: str) -> Rule:
    return error(
        f"MB-CFG-fsdp2_{id}",
        f"validate:1486.{line}",
        name,
        lambda s: _v2(s) and test(s),
        f"Megatron-FSDP version 2 excludes {what}.",
        f"Use {{write[{name}={value}]}}, or version 1.",
    )


_VERSION_2 = (
    _version_2("moe", 156, "num_experts", lambda s: s.num_experts is not None, "experts", "null"),
    _version_2(
        "vpp",
        158,
        "virtual_pipeline_model_parallel_size",
        lambda s: s.vpp is not None,
        "interleaving",
        "null",
    ),
    _version_2(
        "hsdp",
        164,
        "num_distributed_optimizer_instances",
        lambda s: s.num_distributed_optimizer_instances != 1,
        "several optimizer instances",
        "1",
    ),
    _version_2(
        "outer",
        166,
        "outer_dp_sharding_strategy",
        lambda s: s.outer_dp_sharding_strategy != "no_shard",
        "outer sharding",
        "no_shard",
    ),
    _version_2("ckpt", 168, "save", _checkpoints, "saving and loading checkpoints", "null"),
    _version_2(
        "clip",
        174,
        "optimizer_clip_grad",
        lambda s: s.optimizer_clip_grad != 0,
        "gradient clipping",
        "0.0",
    ),
    _version_2(
        "prec",
        176,
        "use_precision_aware_optimizer",
        lambda s: s.use_precision_aware_optimizer,
        "the precision-aware optimizer",
        "false",
    ),
    _version_2(
        "off",
        178,
        "optimizer_cpu_offload",
        lambda s: s.optimizer_cpu_offload,
        "offloading the optimizer",
        "false",
    ),
    _version_2(
        "token",
        184,
        "calculate_per_token_loss",
        lambda s: s.calculate_per_token_loss,
        "the loss per token",
        "false",
    ),
    _version_2("fp8", 186, "fp8", lambda s: s.fp8 or s.fp4, "FP8 and FP4", "null"),
    _version_2(
        "graph",
        188,
        "cuda_graph_impl",
        lambda s: s.cuda_graph_impl != "none",
        "CUDA graphs",
        "none",
    ),
)


RULES = (
    error(
        "MB-CFG-fsdp_excl",
        "validate:1482",
        "dist_use_megatron_fsdp",
        lambda s: s.dist_use_megatron_fsdp and s.use_torch_fsdp2,
        "Megatron-FSDP and Torch FSDP2 exclude each other.",
        "Keep one of {write[dist_use_megatron_fsdp]} and {write[use_torch_fsdp2]}.",
    ),
    change(
        "MB-CFG-fsdp_sync",
        "validate:1486.069",
        "use_megatron_fsdp",
        lambda s: _fsdp(s) and {"use_megatron_fsdp": True, "dist_use_megatron_fsdp": True},
        "Megatron-FSDP is on in both sections.",
        "Set {write[use_megatron_fsdp=true]} and {write[dist_use_megatron_fsdp=true]}.",
        severity="note",
    ),
    error(
        "MB-CFG-fsdp_version",
        "validate:1486.077",
        "megatron_fsdp_version",
        lambda s: _fsdp(s) and s.megatron_fsdp_version not in (1, 2),
        "Megatron-FSDP has versions 1 and 2, not {megatron_fsdp_version}.",
        "Use {write[megatron_fsdp_version=1]}.",
    ),
    change(
        "MB-CFG-fsdp1_distopt",
        "validate:1486.083",
        "use_distributed_optimizer",
        _v1_optimizer,
        "Megatron-FSDP version 1 turns the distributed optimizer on.",
        "Use {write[use_distributed_optimizer=true]}.",
        severity="note",
    ),
    change(
        "MB-CFG-fsdp1_avg",
        "validate:1486.095",
        "ddp_average_in_collective",
        lambda s: (
            _v1(s) and not s.disable_symmetric_registration and {"ddp_average_in_collective": False}
        ),
        "Symmetric registration excludes averaging in the collective: it is turned off.",
        "Use {write[ddp_average_in_collective=false]}.",
        severity="note",
    ),
    change(
        "MB-CFG-fsdp1_reuse",
        "validate:1486.1",
        "reuse_grad_buf_for_mxfp8_param_ag",
        _no_reuse,
        "Megatron-FSDP does not reuse the gradient buffer for mxfp8 weights: it is turned off.",
        severity="note",
    ),
    error(
        "MB-CFG-fsdp1_ckpt",
        "validate:1486.107",
        "ckpt_format",
        lambda s: _v1(s) and _checkpoints(s) and s.ckpt_format != "fsdp_dtensor",
        "Megatron-FSDP saves and loads fsdp_dtensor checkpoints, not {ckpt_format}.",
        "Use {write[ckpt_format=fsdp_dtensor]}.",
    ),
    error(
        "MB-CFG-fsdp1_conn",
        "validate:1486.11",
        "CUDA_DEVICE_MAX_CONNECTIONS",
        lambda s: _v1(s) and s.site.env.get("CUDA_DEVICE_MAX_CONNECTIONS") == "1",
        "Fully sharded data parallelism needs more than one CUDA connection.",
        "Unset CUDA_DEVICE_MAX_CONNECTIONS or raise it.",
    ),
    error(
        "MB-CFG-fsdp1_manual",
        "validate:1486.118",
        "fsdp_manual_registration",
        lambda s: _v1(s) and s.fsdp_manual_registration and not s.nccl_ub,
        "Manual registration registers NCCL user buffers.",
        "Use {write[nccl_ub=true]}.",
    ),
    error(
        "MB-CFG-fsdp1_hash",
        "validate:1486.12",
        "check_weight_hash_across_dp_replicas_interval",
        lambda s: (
            _v1(s)
            and s.data_parallel_sharding_strategy == "optim_grads_params"
            and s.check_weight_hash_across_dp_replicas_interval is not None
        ),
        "Under full sharding no two ranks hold the same weights to compare.",
        "Use {write[check_weight_hash_across_dp_replicas_interval=null]}.",
    ),
    error(
        "MB-CFG-fsdp1_map",
        "validate:1486.124",
        "use_tp_pp_dp_mapping",
        lambda s: _v1(s) and s.use_tp_pp_dp_mapping,
        "Megatron-FSDP excludes the rank order tp-cp-ep-pp-dp.",
        "Use {write[use_tp_pp_dp_mapping=false]}.",
    ),
    error(
        "MB-CFG-fsdp2_bf16",
        "validate:1486.135",
        "bf16",
        lambda s: _v2(s) and not (s.bf16 and s.optimizer_bf16),
        "Megatron-FSDP version 2 trains in bf16.",
        "Use {write[bf16=true]} and {write[optimizer_bf16=true]}.",
    ),
    error(
        "MB-CFG-fsdp2_dp_only",
        "validate:1486.151",
        "megatron_fsdp_version",
        _degrees,
        "Megatron-FSDP version 2 is data parallel only: {wrong}.",
        "Use degrees of 1, or version 1.",
    ),
    *_VERSION_2,
    change(
        "MB-CFG-fsdp2_force",
        "validate:1486.19",
        "data_parallel_sharding_strategy",
        _forced,
        "Megatron-FSDP version 2 shards optimizer, gradients and parameters; the distributed "
        "optimizer, its overlaps and gradient accumulation fusion are off.",
        severity="note",
    ),
    change(
        "MB-CFG-distopt_sync",
        "validate:1503.1",
        "optimizer_use_distributed_optimizer",
        _distributed_optimizer,
        "The distributed optimizer is on in one of ddp and optimizer, so it is turned on in both.",
        "Set {write[use_distributed_optimizer=true]} and "
        "{write[optimizer_use_distributed_optimizer=true]}.",
    ),
    change(
        "MB-CFG-opg_sync",
        "validate:1503.2",
        "optimizer_overlap_param_gather",
        _gather,
        "The overlapped parameter gather is on in one of ddp and optimizer, so it is turned on in "
        "both.",
        "Set {write[overlap_param_gather=true]} and {write[optimizer_overlap_param_gather=true]}.",
    ),
)
