"""A layout as a SkyRL SFT launch: Hydra overrides for one driver, whose workers Ray starts."""

from __future__ import annotations

from typing import Any, Final

from meshwright.findings import Finding
from meshwright.frameworks.by_path import overrides_of
from meshwright.frameworks.overrides_text import text_of
from meshwright.frameworks.skyrl.read import SFT, TITLE, kwargs, names
from meshwright.frameworks.words import job_words, layout_words
from meshwright.frameworks.written import (
    Target,
    Variable,
    Written,
    absent,
    megatron_environment,
    megatron_refusals,
    refusal,
    zero_refusal,
)
from meshwright.parallel.layout import DEFAULT_ORDER, Zero

_ABSENT: Final = {
    "vpp": 1,
    "dp_replicate": 1,
    "microbatch_group_size": 0,
    "pipeline_layout": None,
    "hierarchical_cp": None,
    "order": DEFAULT_ORDER,
}


def unsupported(target: Target) -> list[Finding]:
    """Return what SkyRL cannot express: it has no virtual stages, among others."""
    x = target.layout
    found = megatron_refusals(x, TITLE) if x.vpp == 1 else []
    found = [f for f in found if f.field != "layout.order"] + absent(x, TITLE, _ABSENT)
    found += zero_refusal(x, TITLE, (Zero.optim,))
    if target.job.precision.name not in ("bf16", "fp8", "fp8-cs", "fp8-mx", "fp8-blockwise"):
        rule = f"{TITLE} trains Megatron models in bf16, with or without fp8."
        found.append(refusal("job.precision", target.job.precision.name, rule, "Use bf16."))
    unit = x.dp * x.cp
    if target.job.gbs % unit:
        rule = f"{TITLE} asks for a multiple of gpus/(tp*pp) = {unit}."
        near = -(-target.job.gbs // unit) * unit
        found.append(refusal("job.gbs", target.job.gbs, rule, f"Use {near}."))
    return found


def write(target: Target) -> Written:
    """Return the launch of the SFT trainer."""
    x, job = target.layout, target.job
    words = {**layout_words(x), **job_words(job, x)}
    words.pop("use_distributed_optimizer", None)
    if not target.model.is_moe:
        words = {w: v for w, v in words.items() if not w.startswith(("moe_", "expert_"))}
    if bool(x.sp) == (x.tp > 1):
        words.pop("sequence_parallel")
    direct = overrides_of(words, names(SFT))
    nested = overrides_of(words, {w: p for w, p in kwargs(SFT).items() if w not in names(SFT)})
    nested |= _recompute(words)
    lines: dict[str, Any] = {
        "strategy": "megatron",
        "model.path": "$MODEL_PATH",
        "dataset_name": "$DATASET",
        "placement.num_nodes": target.nodes,
        "placement.num_gpus_per_node": target.gpus_per_node,
        "max_length": job.seq_len,
        "batch_size": job.gbs,
        "micro_train_batch_size_per_gpu": x.mbs,
        "remove_microbatch_padding": True,
        **direct,
        **{f"+{path}": value for path, value in nested.items()},
    }
    if job.task == "lora":
        lines["model.lora.rank"] = job.lora_rank
    return Written(
        program="uv run --isolated --extra megatron -m skyrl.train.main_sft",
        arguments={"OVERRIDES": [[f"{path}={text_of(value)}"] for path, value in lines.items()]},
        variables=(
            Variable(
                name="MODEL_PATH",
                default=target.model.name,
                comment="the Hugging Face model that is tuned",
            ),
            Variable(name="DATASET", default="/path/to/dataset", comment="the SFT dataset"),
        ),
        env=megatron_environment(target),
        by_ray=True,
    )


def _recompute(words: dict[str, Any]) -> dict[str, Any]:
    """Return recomputation in full: what is left out SkyRL fills with full, uniform, 1."""
    paths = kwargs(SFT)
    filled = ("recompute_granularity", "recompute_method", "recompute_num_layers")
    return {paths[word]: words.get(word) for word in filled}
