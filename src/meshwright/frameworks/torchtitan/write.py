"""A layout as a torchtitan command line."""

from __future__ import annotations

import re
from functools import cache
from typing import Any, Final

from meshwright.describe.job import Execution
from meshwright.findings import Finding
from meshwright.frameworks.carried import PLAN, Carried, Place, Unexpanded, joined, training_of
from meshwright.frameworks.torchtitan.read import DEFAULTS, NAMES, SCHEDULES, TITLE
from meshwright.frameworks.words import DEGREES, EXECUTION_FIELDS, effective
from meshwright.frameworks.written import (
    Target,
    Variable,
    Written,
    absent,
    refusal,
    zero_refusal,
)
from meshwright.parallel.layout import DEFAULT_ORDER, CpComm, Layout, Pipeline, Recompute, Zero

_P: Final = "parallelism"
_ABSENT: Final = {
    "etp": 1,
    "first": 0,
    "last": 0,
    "microbatch_group_size": 0,
    "pipeline_layout": None,
    "hierarchical_cp": None,
    "order": DEFAULT_ORDER,
}


TRAINING: Final = {
    "train_iters": "training.steps",
    "clip_grad": "training.max_norm",
    "lr": "optimizer.lr",
    "adam_beta1": "optimizer.beta1",
    "adam_beta2": "optimizer.beta2",
    "adam_eps": "optimizer.eps",
    "weight_decay": "optimizer.weight_decay",
    "lr_warmup_iters": "lr_scheduler.warmup_steps",
    "lr_decay_style": "lr_scheduler.decay_type",
    "min_lr": "lr_scheduler.min_lr_factor",
    "save": "checkpoint.folder",
    "save_interval": "checkpoint.interval",
    "log_interval": "metrics.log_freq",
    "seed": "debug.seed",
    "tokenizer_model": "hf_assets_path",
}
"""Megatron-LM's name -> torchtitan's option; the lowest rate is a fraction of the rate there."""


@cache
def places() -> dict[str, Place]:
    """Return what torchtitan's options are called."""
    found = {f"--{path}": Place(name) for name, path in TRAINING.items()}
    plan = (*DEFAULTS, "checkpoint.enable", *_IN_PLAN)
    return {**found, **{f"--{path}": PLAN for path in plan}}


_IN_PLAN: Final = (
    f"{_P}.spmd_backend",
    f"{_P}.pipeline_parallel_layers_per_stage",
    *("training.max_context_length", "training.num_tokens_per_microbatch_per_dp_rank"),
    *("training.num_tokens_per_train_step", "training.mixed_precision_param"),
    *("training.disable_cuda_graphs", "training.seq_len", "training.local_batch_size"),
    *("training.global_batch_size", "activation_checkpoint.mode"),
)
"""Options that the plan says."""


def unsupported(target: Target) -> list[Finding]:
    """Return what torchtitan cannot express: sharded optimizers alone, expert TP, among others."""
    x, job = target.layout, target.job
    found = absent(x, TITLE, _ABSENT)
    sharded = (Zero.optim_grads_params, Zero.optim_grads)
    found += zero_refusal(
        x, TITLE, (Zero.no_shard,) if 1 < x.dp_replicate == x.dp * x.cp else sharded
    )
    if x.dp % x.dp_replicate:
        rule = f"{TITLE} copies whole groups of data parallel ranks, of which there are {x.dp}."
        found.append(
            refusal("layout.dp_replicate", x.dp_replicate, rule, f"Use a divisor of {x.dp}.")
        )
    if Pipeline(x.schedule).name not in SCHEDULES.values():
        rule = f"{TITLE} has the schedules {', '.join(SCHEDULES)}."
        name = Pipeline(x.schedule).name
        found.append(refusal("layout.schedule", name, rule, "Use 1f1b, interleaved or zb_v."))
    if x.cp > 1 and x.cp_comm != CpComm.all_gather:
        rule = f"{TITLE} gathers keys and values."
        name = CpComm(x.cp_comm).name
        found.append(refusal("layout.cp_comm", name, rule, "Use cp_comm=all_gather."))
    if x.recompute not in (Recompute.none, Recompute.full) or x.recompute_num_layers:
        rule = f"{TITLE} recomputes whole layers, or operations that it chooses itself."
        found.append(
            refusal("layout.recompute", Recompute(x.recompute).name, rule, "Use none or full.")
        )
    found += _model_refusals(target)
    found += _job_refusals(target)
    if not x.account_for_embedding and not x.account_for_loss and job.gbs % (x.mbs * x.dp):
        rule = f"{TITLE} splits a step into whole microbatches of mbs*dp = {x.mbs * x.dp}."
        found.append(refusal("job.gbs", job.gbs, rule, f"Use a multiple of {x.mbs * x.dp}."))
    return found


def _model_refusals(target: Target) -> list[Finding]:
    x, model, found = target.layout, target.model, list[Finding]()
    if model.num_kv_heads and model.num_kv_heads % x.tp:
        rule = f"{TITLE} splits the {model.num_kv_heads} key-value heads without copies."
        remedy = f"Use a divisor of {model.num_kv_heads}."
        found.append(refusal("layout.tp", x.tp, rule, remedy))
    if model.tie_word_embeddings and x.pp > 1:
        rule = f"{TITLE} cannot tie embeddings over pipeline stages, as {model.name} does."
        found.append(refusal("layout.pp", x.pp, rule, "Use pp=1."))
    return found


def _job_refusals(target: Target) -> list[Finding]:
    job, found = target.job, list[Finding]()
    if job.precision.name not in ("bf16", "fp32"):
        rule = f"{TITLE} chooses float8 in its Python configuration, not on the command line."
        found.append(refusal("job.precision", job.precision.name, rule, "Use bf16."))
    if job.task != "pretrain":
        rule = f"{TITLE} pre-trains."
        found.append(refusal("job.task", job.task, rule, "Use megatron-bridge, nemo or skyrl."))
    return found


def write(target: Target) -> Written:
    """Return the launch of ``torchtitan.train``."""
    x, job = target.layout, target.job
    options: dict[str, Any] = {
        **{NAMES[word]: getattr(x, name) for name, word in DEGREES.items() if word in NAMES},
        **_data_parallel(x),
        f"{_P}.enable_sequence_parallel": bool(x.sp),
        **_pipeline(target),
        "training.max_context_length": job.seq_len,
        "training.num_tokens_per_microbatch_per_dp_rank": x.mbs * job.seq_len,
        "training.num_tokens_per_train_step": job.gbs * job.seq_len,
        "training.mixed_precision_param": "bfloat16" if job.precision.name == "bf16" else "float32",
    }
    if x.recompute:
        options["activation_checkpoint.mode"] = "full"
    if job.execution.cuda_graphs == "none":
        options["training.disable_cuda_graphs"] = True
    if x.cp > 1:
        options[f"{_P}.spmd_backend"] = "spmd_types"
    program, name = target.carried.program, target.model.name.lower()
    module = program.get("--module") or _module(name)
    config = program.get("--config") or re.sub(r"[^a-z0-9]+", "_", name)
    assets = f"./assets/hf/{target.model.name}"
    said = _training(target.carried)
    return Written(
        program='-m torchtitan.train --module "$MODULE" --config "$CONFIG"',
        arguments={
            "OPTIONS": [[_option(path, value)] for path, value in options.items()],
            "TRAINING": [[_option(path, value)] for path, value in said.items()],
        },
        variables=(
            Variable(name="MODULE", default=module, comment="torchtitan's model folder"),
            Variable(name="CONFIG", default=config, comment="its configuration: model and data"),
            *(
                v
                for v in (
                    Variable(name="ASSETS_PATH", default=assets, comment="tokenizer, weights"),
                    Variable(name="STEPS", default="1000", comment="optimizer steps"),
                )
                if f"${v.name}" in said.values()
            ),
        ),
        env={"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
        | ({"CUDA_DEVICE_MAX_CONNECTIONS": "32"} if x.tp > 1 else {}),
        remarks=_remarks(target),
    )


def _module(name: str) -> str:
    """Return torchtitan's folder of a model: its family with the version, ``deepseek_v3``."""
    family = re.match(r"[a-z]+(\d+|-v\d+|-oss)?", name)
    return (family[0] if family else name).replace("-", "_")


def _remarks(target: Target) -> list[str]:
    x, remarks = target.layout, list[str]()
    remarks.append(
        "Since 2026 the configuration chooses recomputation by a class: use FullAC there and leave"
        " --activation_checkpoint.mode out."
        if x.recompute
        else "The configuration chooses recomputation: this layout needs none (no SelectiveAC)."
    )
    switches = effective(target.job.execution, x, target.model.is_moe)
    usual = effective(Execution(), x, target.model.is_moe)
    for name in EXECUTION_FIELDS:
        value = getattr(switches, name)
        if name != "cuda_graphs" and value != getattr(usual, name):
            remarks.append(f"{TITLE} has no option for {name} = {value}: it decides by itself.")
    return remarks


def _training(carried: Carried) -> dict[str, Any]:
    """Return the options of training; a lowest rate becomes a fraction of the rate."""
    defaults = {
        "tokenizer_model": Unexpanded("$ASSETS_PATH"),
        "train_iters": Unexpanded("$STEPS"),
        "save_interval": "500",
    }
    said = {name: values[0] for name, values in training_of(carried, defaults).items()}
    if "min_lr" in said:
        said["min_lr"] = _fraction(said["min_lr"], said.get("lr", ""))
    options: dict[str, Any] = {TRAINING[name]: value for name, value in said.items() if value}
    return options | {"checkpoint.enable": True}


def _fraction(lowest: str, rate: str) -> str:
    try:
        return f"{float(lowest) / float(rate):.6g}"
    except (ValueError, ZeroDivisionError):
        return ""


def _data_parallel(x: Layout[int]) -> dict[str, Any]:
    reshard = "never" if x.zero == Zero.optim_grads else "always"
    return {
        f"{_P}.data_parallel_replicate_degree": x.dp_replicate,
        f"{_P}.data_parallel_shard_degree": x.dp // x.dp_replicate,
        f"{_P}.fsdp_reshard_after_forward": reshard,
    }


def _pipeline(target: Target) -> dict[str, Any]:
    x, job = target.layout, target.job
    if x.pp == 1:
        return {}
    schedule = next(t for t, name in SCHEDULES.items() if name == Pipeline(x.schedule).name)
    counted = target.model.num_layers + x.account_for_embedding + x.account_for_loss
    return {
        f"{_P}.pipeline_parallel_schedule": schedule,
        f"{_P}.pipeline_parallel_layers_per_stage": -(-counted // (x.pp * x.vpp)),
        f"{_P}.pipeline_parallel_first_stage_less_layers": x.account_for_embedding,
        f"{_P}.pipeline_parallel_last_stage_less_layers": x.account_for_loss,
        f"{_P}.num_pp_microbatches": max(job.gbs // (x.mbs * x.dp), 1),
    }


def _option(path: str, value: Any) -> str:
    """Return an option; a switch is ``--section.name``, or ``--section.no_name`` when off."""
    if not isinstance(value, bool):
        return joined(f"--{path}", value if isinstance(value, str) else str(value))
    section, _, name = path.rpartition(".")
    return f"--{path}" if value else f"--{section}.no_{name}"
