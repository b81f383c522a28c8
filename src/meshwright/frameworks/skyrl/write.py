"""A layout as a SkyRL SFT launch: Hydra overrides for one driver, whose workers Ray starts."""

from __future__ import annotations

from functools import cache
from typing import Any, Final

from meshwright.findings import Finding
from meshwright.frameworks.by_path import overrides_of
from meshwright.frameworks.carried import PLAN, Place, Unexpanded, joined, training_of
from meshwright.frameworks.overrides_text import text_of
from meshwright.frameworks.skyrl.read import TITLE, kwargs, names
from meshwright.frameworks.skyrl.rules import RL, SFT
from meshwright.frameworks.words import job_words, layout_words
from meshwright.frameworks.written import (
    Target,
    Variable,
    Written,
    absent,
    megatron_environment,
    megatron_refusals,
    no_cuda_graphs,
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


_OPTIMIZER: Final = {
    "lr": "optimizer_config.lr",
    "weight_decay": "optimizer_config.weight_decay",
    "clip_grad": "optimizer_config.max_grad_norm",
    "lr_warmup_iters": "optimizer_config.num_warmup_steps",
    "lr_decay_style": "optimizer_config.scheduler",
}
_KWARGS: Final = (
    *("moe_pad_expert_input_to_capacity", "calculate_per_token_loss"),
    *("fp32_residual_connection", "attention_dropout"),
)
_ROUTER: Final = (
    *("moe_aux_loss_coeff", "moe_router_load_balancing_type", "moe_router_dtype"),
    "moe_router_score_function",
)
TRAINING: Final = {
    "train_iters": "num_steps",
    **_OPTIMIZER,
    "seed": "seed",
    "save": "ckpt_path",
    "save_interval": "ckpt_interval",
    "eval_interval": "eval_interval",
    "wandb_project": "project_name",
    "wandb_exp_name": "run_name",
    "async_save": f"{SFT}.async_dist_ckpt_save",
    "model_path": "model.path",
    "dataset_name": "dataset_name",
    **{name: f"{SFT}.{name}" for name in _ROUTER},
    **{name: f"{SFT}.transformer_config_kwargs.{name}" for name in _KWARGS},
}
"""Megatron-LM's name -> the override of the SFT trainer."""


@cache
def places() -> dict[str, Place]:
    """Return what the overrides of both trainers are called."""
    found = {path: Place(name) for name, path in TRAINING.items()}
    sizes = ("placement.num_nodes", "placement.num_gpus_per_node")
    found |= dict.fromkeys(sizes, PLAN)
    found |= dict.fromkeys(
        (f"trainer.placement.policy_{size}" for size in ("num_nodes", "num_gpus_per_node")),
        PLAN,
    )
    found |= {f"trainer.policy.{path}": Place(name) for name, path in _OPTIMIZER.items()}
    found |= {f"{RL}.{name}": Place(name) for name in _ROUTER}
    rest = ("seed", "ckpt_path", "ckpt_interval", "eval_interval", "project_name", "run_name")
    found |= {f"trainer.{name}": found[name] for name in rest}
    return {
        **found,
        "data.train_data": Place("train_files"),
        "data.val_data": Place("val_files"),
        "strategy": PLAN,
        "trainer.strategy": PLAN,
        "trainer.policy.model.path": Place("model_path"),
    }


def unsupported(target: Target) -> list[Finding]:
    """Return what SkyRL cannot express: it has no virtual stages, among others."""
    x = target.layout
    found = megatron_refusals(target, TITLE) if x.vpp == 1 else []
    found = [f for f in found if f.field != "layout.order"] + absent(x, TITLE, _ABSENT)
    found += zero_refusal(x, TITLE, (Zero.optim,))
    if target.job.precision.name not in ("bf16", "fp8", "fp8-cs", "fp8-mx", "fp8-blockwise"):
        rule = f"{TITLE} trains Megatron models in bf16, with or without fp8."
        found.append(refusal("job.precision", target.job.precision.name, rule, "Use bf16."))
    found += no_cuda_graphs(target, TITLE)
    dispatcher = target.job.execution.dispatcher
    if dispatcher == "allgather" and x.ep > 1:
        rule = f"{TITLE}'s sequences have any length, which allgather does not take."
        found.append(refusal("job.dispatcher", dispatcher, rule, "Use alltoall."))
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
        "model.path": Unexpanded("$MODEL_PATH"),
        "dataset_name": Unexpanded("$DATASET"),
        "placement.num_nodes": target.nodes,
        "placement.num_gpus_per_node": target.gpus_per_node,
        "max_length": job.seq_len,
        "batch_size": job.gbs,
        "micro_train_batch_size_per_gpu": x.mbs,
        "remove_microbatch_padding": True,
        **direct,
        **nested,
    }
    if job.task == "lora":
        lines["model.lora.rank"] = job.lora_rank
    said = training_of(target.carried, _DEFAULTS)
    lines |= {TRAINING[name]: v[0] if len(v) == 1 else list(v) for name, v in said.items()}
    return Written(
        program="uv run --isolated --extra megatron -m skyrl.train.main_sft",
        arguments={"OVERRIDES": [[joined(path, text_of(value))] for path, value in lines.items()]},
        variables=[
            v for v in _variables(target) if any(f"${v.name}" == value for value in lines.values())
        ],
        env=megatron_environment(target),
        by_ray=True,
    )


_DEFAULTS: Final = {
    "train_iters": Unexpanded("$STEPS"),
    "lr": "1.0e-5",
    "save": Unexpanded("$CHECKPOINTS"),
    "save_interval": "500",
}


def _variables(target: Target) -> list[Variable]:
    name = target.model.name
    model = Variable(name="MODEL_PATH", default=name, comment="the Hugging Face model to tune")
    return [
        model,
        Variable(name="DATASET", default="/path/to/dataset", comment="conversations to tune on"),
        Variable(name="CHECKPOINTS", default="checkpoints", comment="where to save"),
        Variable(name="STEPS", default="1000", comment="optimizer steps"),
    ]


def _recompute(words: dict[str, Any]) -> dict[str, Any]:
    """Return recomputation in full: what is left out SkyRL fills with full, uniform, 1."""
    paths = kwargs(SFT)
    filled = ("recompute_granularity", "recompute_method", "recompute_num_layers")
    return {paths[word]: words.get(word) for word in filled}
