"""A layout as Megatron-Bridge overrides on a recipe."""

from __future__ import annotations

import re
from typing import Any, Final

from meshwright.findings import Finding
from meshwright.frameworks.megatron_bridge.read import TITLE, shape_overrides, text_of
from meshwright.frameworks.megatron_bridge.settings import settings
from meshwright.frameworks.words import job_words, layout_words
from meshwright.frameworks.words_model import unwritable
from meshwright.frameworks.written import (
    Target,
    Variable,
    Written,
    megatron_environment,
    megatron_refusals,
    refusal,
)
from meshwright.parallel.layout import DEFAULT_ORDER, Zero

_ELSEWHERE: Final = {
    "micro_batch_size": ("train.micro_batch_size",),
    "global_batch_size": ("train.global_batch_size",),
    "seq_length": ("model.seq_length", "dataset.seq_length"),
    "use_distributed_optimizer": (
        "ddp.use_distributed_optimizer",
        "optimizer.use_distributed_optimizer",
    ),
    "use_megatron_fsdp": ("dist.use_megatron_fsdp", "ddp.use_megatron_fsdp"),
    "data_parallel_sharding_strategy": ("ddp.data_parallel_sharding_strategy",),
    "num_distributed_optimizer_instances": ("ddp.num_distributed_optimizer_instances",),
    "overlap_grad_reduce": ("ddp.overlap_grad_reduce", "comm_overlap.overlap_grad_reduce"),
    "overlap_param_gather": ("ddp.overlap_param_gather", "comm_overlap.overlap_param_gather"),
    "tp_comm_overlap": ("comm_overlap.tp_comm_overlap",),
    "overlap_moe_expert_parallel_comm": ("comm_overlap.overlap_moe_expert_parallel_comm",),
    "delay_wgrad_compute": ("comm_overlap.delay_wgrad_compute",),
    "overlap_p2p_comm": (),
    "use_tp_pp_dp_mapping": ("dist.use_tp_pp_dp_mapping",),
    "optimizer_cpu_offload": ("optimizer.optimizer_cpu_offload",),
    "optimizer_offload_fraction": ("optimizer.optimizer_offload_fraction",),
    **{w: () for w in ("bf16", "fp16", "fp8", "fp8_recipe", "fp4", "fp4_recipe")},
    **{w: () for w in ("task", "lora_rank")},
}
"""Where words are written that do not belong to ``model``."""

RECIPES: Final = {
    "bf16": "bf16_mixed",
    "fp16": "fp16_mixed",
    "fp8": "bf16_with_fp8_delayed_scaling_mixed",
    "fp8-cs": "bf16_with_fp8_current_scaling_mixed",
    "fp8-mx": "bf16_with_mxfp8_mixed",
    "fp8-blockwise": "bf16_with_fp8_subchannel_scaling_mixed",
    "nvfp4": "bf16_with_nvfp4_mixed",
}
"""Our precision -> the name of Bridge's mixed precision recipe."""


def unsupported(target: Target) -> list[Finding]:
    """Return what Megatron-Bridge cannot express."""
    found = megatron_refusals(target.layout, TITLE)
    problem = unwritable(target.model)
    if problem is not None:
        found.append(refusal("model", target.model.name, problem.rule, problem.remedy))
    x = target.layout
    if x.zero > Zero.optim and x.order != DEFAULT_ORDER:
        rule = f"{TITLE}'s Megatron-FSDP takes the default order of ranks only."
        found.append(refusal("layout.order", x.order, rule, f"Use order={DEFAULT_ORDER}."))
    if target.job.precision.name not in RECIPES:
        rule = f"{TITLE} has no mixed precision recipe for it."
        remedy = "Use bf16, or one of the fp8 precisions."
        found.append(refusal("job.precision", target.job.precision.name, rule, remedy))
    return found


def write(target: Target) -> Written:
    """Return the launch of ``run_recipe.py``."""
    x = target.layout
    overrides = {
        **shape_overrides(target.model),
        "mixed_precision": RECIPES[target.job.precision.name],
        **_overrides({**layout_words(x), **job_words(target.job, x)}, target),
    }
    if target.job.task == "sft":
        overrides["dataset_kind"] = "sft"
    if x.zero > Zero.optim:
        overrides["checkpoint.ckpt_format"] = "fsdp_dtensor"
    overrides |= {"train.train_iters": "$TRAIN_ITERS", "logger.log_interval": 1}
    return Written(
        program='"$BRIDGE_PATH/scripts/training/run_recipe.py" --recipe "$RECIPE"',
        arguments={"OVERRIDES": [[f"{path}={text_of(v)}"] for path, v in overrides.items()]},
        variables=(
            Variable(
                name="BRIDGE_PATH",
                default="/path/to/Megatron-Bridge",
                comment="a checkout of Megatron-Bridge",
            ),
            Variable(name="RECIPE", default=_recipe(target), comment="sets data and optimizer"),
            Variable(name="TRAIN_ITERS", default="1000", comment="optimizer steps"),
        ),
        env=megatron_environment(target),
        unset=("CUDA_DEVICE_MAX_CONNECTIONS",) if x.zero > Zero.optim else (),
    )


def _recipe(target: Target) -> str:
    name = re.sub(r"[^a-z0-9_]+", "_", target.model.name.lower().replace(".", "")).strip("_")
    suffix = {"pretrain": "pretrain", "sft": "sft", "lora": "peft"}[target.job.task]
    return f"{name or 'vanilla_gpt'}_{suffix}_config"


def _overrides(words: dict[str, Any], target: Target) -> dict[str, Any]:
    if not target.model.is_moe:
        words = {w: v for w, v in words.items() if not w.startswith(("moe_", "expert_"))}
    found: dict[str, Any] = {}
    words.setdefault("use_distributed_optimizer", False)
    for word, value in words.items():
        for path in _ELSEWHERE.get(word, (f"model.{word}",)):
            if _differs(path, value):
                found[path] = value
    return found


def _differs(path: str, value: Any) -> bool:
    """Say whether a value must be written: where it is no default, or where recipes have another.

    Degrees and the distributed optimizer are what recipes set.
    """
    known = settings().get(path)
    by_recipes = known is not None and (known.type == "int" or "distributed_opt" in path)
    return known is not None and (by_recipes or known.default != value)
