"""A layout as Megatron-Bridge overrides on a recipe."""

from __future__ import annotations

import json
import re
from functools import cache
from typing import Any, Final

from meshwright.findings import Finding
from meshwright.frameworks.carried import PLAN, Place, Unexpanded, Values, joined, training_of
from meshwright.frameworks.megatron_bridge.read import TITLE, shape_overrides, text_of
from meshwright.frameworks.megatron_bridge.settings import settings
from meshwright.frameworks.megatron_lm.arguments import by_name
from meshwright.frameworks.words import DEGREES, job_words, layout_words
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
    "overlap_p2p_comm": ("comm_overlap.overlap_p2p_comm",),
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
    found = megatron_refusals(target, TITLE)
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
    if x.zero > Zero.optim:
        overrides["checkpoint.ckpt_format"] = "fsdp_dtensor"
    graphs = target.job.execution.cuda_graphs
    if graphs != "none":
        overrides |= {"model.use_te_rng_tracker": True, "model.attention_dropout": 0.0}
    if graphs == "full":
        overrides["rerun_state_machine.check_for_nan_in_loss"] = False
    if target.job.execution.optimizer_offload_fraction:
        overrides["optimizer.use_precision_aware_optimizer"] = True
    if target.job.task == "lora":
        overrides[LORA_RANK] = target.job.lora_rank
    if target.job.task != "pretrain" and x.cp > 1:
        overrides |= {"model.calculate_per_token_loss": True, "ddp.average_in_collective": False}
    lines = [[joined(path, text_of(value))] for path, value in overrides.items()]
    training = {TRAINING[n]: v for n, v in training_of(target.carried, _defaults(target)).items()}
    lines += [[_training(p, v)] for p, v in training.items() if p not in overrides]
    return Written(
        program='"$BRIDGE_PATH/scripts/training/run_recipe.py" --recipe "$RECIPE"',
        arguments={"OVERRIDES": lines},
        variables=_variables(target, " ".join(line for (line,) in lines)),
        env=megatron_environment(target),
        unset=("CUDA_DEVICE_MAX_CONNECTIONS",) if x.zero > Zero.optim else (),
    )


LORA_RANK: Final = "peft.dim"
"""From Bridge's documentation of PEFT: neither a rule nor an oracle of ours names it."""

_SECTIONS: Final = (
    *("validation", "rng", "logger", "mixed_precision", "optimizer", "scheduler", "train"),
    *("checkpoint", "ddp", "comm_overlap", "dist", "tokenizer", "dataset", "profiling"),
    *("rerun_state_machine", "ft", "straggler", "model"),
)
"""Where a setting of this name stands that several sections have: the first of these."""


@cache
def _by_name() -> dict[str, str]:
    found: dict[str, str] = {}
    for path in settings():
        section, _, name = path.rpartition(".")
        if section in _SECTIONS and name in by_name():
            known = found.get(name, "")
            rank = _SECTIONS.index(section)
            if not known or rank < _SECTIONS.index(known.rpartition(".")[0]):
                found[name] = path
    return found


_BY_ITERATIONS: Final = frozenset(
    {"train_samples", "lr_decay_samples", "lr_warmup_samples", "lr_warmup_fraction"}
)
"""Recipes count training in iterations, beside which none of these may stand."""

TRAINING: Final = {
    **{name: path for name, path in _by_name().items() if name not in _BY_ITERATIONS},
    "data_cache_path": "dataset.path_to_cache",
    "check_for_nan_in_loss_and_grad": "rerun_state_machine.check_for_nan_in_loss",
    "use_rope_scaling": "model.rope_scaling",
    "mock_data": "dataset.mock",
}
"""Megatron-LM's name -> the path of the same setting."""


@cache
def places() -> dict[str, Place]:
    """Return what Bridge's paths are called."""
    sections = {path: Place(path.rpartition(".")[2]) for path in settings()}
    named = {path: Place(name) for name, path in TRAINING.items()}
    reduced = {"ddp.grad_reduce_in_fp32": Place("grad_reduce_in_bf16")}
    plan = dict.fromkeys(("mixed_precision", "dataset_kind", LORA_RANK), PLAN)
    return {**sections, **named, **reduced, **plan}


def _defaults(target: Target) -> dict[str, str]:
    defaults = {
        "train_iters": Unexpanded("$TRAIN_ITERS"),
        "tokenizer_type": "HuggingFaceTokenizer",
        "tokenizer_model": Unexpanded("$TOKENIZER_MODEL"),
        "data_path": Unexpanded("$DATA_PATH"),
        "save": Unexpanded("$CHECKPOINTS"),
        "log_interval": "1",
    }
    if target.job.task != "pretrain":
        # The recipe's own conversations are tuned on; Bridge asks for the weights to start from.
        del defaults["data_path"]
        if "load" not in target.carried.training:
            defaults["pretrained_checkpoint"] = Unexpanded("$PRETRAINED")
    return defaults


def _training(path: str, values: Values) -> str:
    setting = settings().get(path)
    if setting is not None and setting.type == "list":
        made = json.dumps(list(values))
        unexpanded = any(isinstance(v, Unexpanded) for v in values)
        return joined(path, Unexpanded(made) if unexpanded else made)
    return joined(path, values[0] if len(values) == 1 else json.dumps(list(values)))


def _variables(target: Target, used: str) -> list[Variable]:
    return [
        Variable(
            name="BRIDGE_PATH",
            default="/path/to/Megatron-Bridge",
            comment="a checkout of Megatron-Bridge",
        ),
        Variable(
            name="RECIPE",
            default=target.carried.program.get("--recipe") or _recipe(target),
            comment="a recipe of the same model: it sets what stands in no override",
        ),
        *(v for v in _VARIABLES if f"${v.name}" in used),
    ]


_VARIABLES: Final = (
    Variable(
        name="DATA_PATH",
        default="/path/to/data_text_document",
        comment="preprocessed data, without .bin and .idx",
    ),
    Variable(
        name="TOKENIZER_MODEL", default="/path/to/tokenizer", comment="a Hugging Face tokenizer"
    ),
    Variable(name="PRETRAINED", default="/path/to/checkpoint", comment="the weights to tune"),
    Variable(name="CHECKPOINTS", default="checkpoints", comment="where to save"),
    Variable(name="TRAIN_ITERS", default="1000", comment="optimizer steps"),
)


def _recipe(target: Target) -> str:
    name = re.sub(r"[^a-z0-9_]+", "_", target.model.name.lower().replace(".", "")).strip("_")
    name = re.sub(r"^(llama|qwen)_(?=\d)", r"\1", name)
    suffix = {"pretrain": "pretrain", "sft": "sft", "lora": "peft"}[target.job.task]
    return f"{name or 'vanilla_gpt'}_{suffix}_config"


def _overrides(words: dict[str, Any], target: Target) -> dict[str, Any]:
    if not target.model.is_moe:
        words = {w: v for w, v in words.items() if not w.startswith(("moe_", "expert_"))}
    found: dict[str, Any] = {}
    words.setdefault("use_distributed_optimizer", False)
    if target.layout.vpp == 1:
        # Without interleaving Bridge refuses a switch that would do nothing.
        words["overlap_p2p_comm"] = False
    elif target.layout.pipeline_layout is not None:
        # Overlaps are set up before Bridge has counted the chunks of a layout string.
        words[DEGREES["vpp"]] = target.layout.vpp
    for word, value in words.items():
        for path in _ELSEWHERE.get(word, (f"model.{word}",)):
            if _differs(path, value):
                found[path] = value
    return found


def _differs(path: str, value: Any) -> bool:
    """Say whether a value must be written: recipes set degrees and switches as they like."""
    known = settings().get(path)
    if known is None:
        return False
    by_recipes = known.type in ("int", "int?", "bool") or path == "model.moe_token_dispatcher_type"
    return by_recipes or known.default != value
