"""Rules of generalised tensor parallelism: weights sharded beyond tp, gathered when used."""

from __future__ import annotations

from typing import Any, Literal

from meshwright.frameworks.megatron_lm.rules import (
    Rule,
    Settings,
    change,
    derive,
    error,
    indivisible,
    multiples_near,
)


def _uses_gtp(s: Settings) -> bool:
    return s.gtp > 1 or s.expert_gtp_weight_remat_size > 1


def _gtp_stream_groups(s: Settings) -> dict[str, Any]:
    groups = list(s.high_priority_stream_groups)
    if _uses_gtp(s) and not s.site.before_blackwell:
        groups += [] if "gtp_remat" in groups else ["gtp_remat"]
        if s.expert_gtp_weight_remat_size > 1:
            groups += [] if "expt_gtp_remat" in groups else ["expt_gtp_remat"]
    return {"high_priority_stream_groups": groups}


def _shards(stage: str, line: int, kind: Literal["", "expert_"] = "") -> tuple[Rule, ...]:
    """Return the rules of the shards of dense weights, or of experts', as ``stage`` asks them."""
    field, degree = f"{kind}tensor_parallel_num_weight_shards", "etp" if kind else "tp"
    over = f"{kind.replace('_', ' ')}tensor parallelism"
    whose = "Expert weights" if kind else "Weights"

    def stated(s: Settings) -> int | None:
        return getattr(s, field)

    def derived(s: Settings) -> dict[str, Any]:
        ranks: int = getattr(s, degree)
        shards = stated(s)
        shards = ranks if shards is None else shards
        return {field: shards, f"{kind}gtp_weight_remat_size": shards // ranks if ranks else 1}

    def too_few(s: Settings) -> bool:
        shards = stated(s)
        return shards is not None and shards < getattr(s, degree)

    def indivisible_by(s: Settings) -> bool | dict[str, str]:
        shards, ranks = stated(s), getattr(s, degree)
        if shards is None or not indivisible(shards, ranks):
            return False
        return {"nearest": multiples_near(shards, ranks)} if ranks else {"nearest": "1 or more"}

    return (
        error(
            "MLM-MPC-shards_ge_tp",
            f"{stage}:{line}",
            field,
            too_few,
            f"{whose} are split at least over {over}: {{{field}}} shards are fewer than "
            f"{degree} = {{{degree}}}.",
            f"Use {{{degree}}} or a multiple of it, or leave it out.",
            final=True,
        ),
        error(
            "MLM-MPC-shards_div_tp",
            f"{stage}:{line + 1}",
            field,
            indivisible_by,
            f"Shards of {whose.lower()} must be a multiple of {degree}: {{{field}}} mod "
            f"{{{degree}}} is not 0.",
            "Use {nearest}.",
            final=True,
        ),
        derive(f"{stage}:{line + 2}", derived),
    )


RULES = (
    *_shards("validate_args", 425),
    *_shards("validate_args", 1500, "expert_"),
    *_shards("transformer_config", 510),
    *_shards("transformer_config", 513, "expert_"),
    error(
        "MLM-ARG-gtp_fp4",
        "validate_args:1517",
        "fp4_param_gather",
        lambda s: _uses_gtp(s) and s.fp4 and not s.fp4_param_gather,
        "Weight shards beyond tp keep only quantised weights under FP4.",
        "Add --fp4-param-gather.",
    ),
    change(
        "MLM-ARG-gtp_prio",
        "validate_args:1530",
        "high_priority_stream_groups",
        _gtp_stream_groups,
        "The communication streams of the weight shards get high priority.",
        severity="note",
    ),
    error(
        "MLM-ARG-gtp_graph_env",
        "validate_args:1541",
        "CUDA_GRAPHS_USE_NODE_PRIORITY",
        lambda s: (
            _uses_gtp(s)
            and not s.site.before_blackwell
            and s.cuda_graph_impl != "none"
            and s.site.env.get("CUDA_GRAPHS_USE_NODE_PRIORITY") != "1"
        ),
        "From Blackwell on, weight shards beyond tp with CUDA graphs need "
        "CUDA_GRAPHS_USE_NODE_PRIORITY=1.",
        "Export it.",
    ),
    error(
        "MLM-ARG-gtp_avg",
        "validate_args:1553",
        "ddp_average_in_collective",
        lambda s: _uses_gtp(s) and s.ddp_average_in_collective,
        "Weight shards beyond tp exclude averaging in the collective.",
        "Drop --ddp-average-in-collective.",
    ),
    error(
        "MLM-ARG-gtp_ckpt",
        "validate_args:1558",
        "ckpt_format",
        lambda s: _uses_gtp(s) and s.ckpt_format not in ("torch", "torch_dist"),
        "Weight shards beyond tp are saved as torch or torch_dist, not {ckpt_format}.",
        "Use --ckpt-format torch_dist.",
    ),
    error(
        "MLM-ARG-gtp_reshard",
        "validate_args:1562",
        "distrib_optim_fully_reshardable_mem_efficient",
        lambda s: (
            _uses_gtp(s)
            and s.dist_ckpt_optim_fully_reshardable
            and s.distrib_optim_fully_reshardable_mem_efficient
        ),
        "Weight shards beyond tp exclude the memory-efficient fully reshardable checkpoint.",
        "Drop --distrib-optim-fully-reshardable-mem-efficient.",
    ),
    error(
        "MLM-ARG-gtp_mxfp8",
        "validate_args:1576",
        "fp8_param_gather",
        lambda s: _uses_gtp(s) and s.fp8_recipe == "mxfp8" and not s.fp8_param_gather,
        "Weight shards beyond tp keep no 16-bit weights under mxfp8.",
        "Add --fp8-param-gather.",
    ),
    error(
        "MLM-ARG-gtp_mxfp8_reuse",
        "validate_args:1583",
        "reuse_grad_buf_for_mxfp8_param_ag",
        lambda s: (
            _uses_gtp(s) and s.fp8_recipe == "mxfp8" and not s.reuse_grad_buf_for_mxfp8_param_ag
        ),
        "Weight shards beyond tp gather mxfp8 weights through the gradient buffer.",
        "Add --reuse-grad-buf-for-mxfp8-param-ag.",
    ),
    error(
        "MLM-ARG-gtp_ub",
        "validate_args:1592",
        "disable_symmetric_registration",
        lambda s: _uses_gtp(s) and s.gtp_remat_nccl_ub and s.disable_symmetric_registration,
        "NCCL user buffers for weight shards need symmetric registration.",
        "Drop --disable-symmetric-registration.",
    ),
    error(
        "MLM-PS-gtp_inst",
        "parallel_state:808",
        "num_distributed_optimizer_instances",
        lambda s: _uses_gtp(s) and s.num_distributed_optimizer_instances > 1,
        "Weight shards beyond tp allow one optimizer instance, not "
        "{num_distributed_optimizer_instances}.",
        "Use {write[num_distributed_optimizer_instances=1]}.",
    ),
)
