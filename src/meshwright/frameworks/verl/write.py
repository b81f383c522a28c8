"""A layout as a verl PPO/GRPO launch: Hydra overrides for one driver, whose workers Ray starts."""

from __future__ import annotations

import math
from functools import cache
from typing import Any, Final

from meshwright.findings import Finding
from meshwright.frameworks.by_path import overrides_of
from meshwright.frameworks.carried import PLAN, Place, Unexpanded, joined, training_of
from meshwright.frameworks.overrides_text import text_of
from meshwright.frameworks.verl.read import (
    ACTOR,
    DDP,
    DIRECT,
    OPTIMIZER,
    PLAIN,
    TITLE,
    TRANSFORMER,
)
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
)
from meshwright.parallel.layout import DEFAULT_ORDER, Zero

_ABSENT: Final = {"dp_replicate": 1, "hierarchical_cp": None, "order": DEFAULT_ORDER}
_SAMPLES: Final = 8
_CORE: Final = (
    *("moe_aux_loss_coeff", "moe_router_load_balancing_type", "moe_router_dtype"),
    *("moe_router_score_function", "moe_pad_expert_input_to_capacity"),
    *("calculate_per_token_loss", "fp32_residual_connection"),
)
TRAINING: Final = {
    "train_iters": "trainer.total_training_steps",
    "save": "trainer.default_local_dir",
    "save_interval": "trainer.save_freq",
    "eval_interval": "trainer.test_freq",
    "wandb_project": "trainer.project_name",
    "wandb_exp_name": "trainer.experiment_name",
    "seed": "data.seed",
    "lr": f"{ACTOR}.optim.lr",
    "min_lr": f"{ACTOR}.optim.min_lr",
    "lr_decay_style": f"{ACTOR}.optim.lr_decay_style",
    "lr_decay_iters": f"{ACTOR}.optim.lr_decay_steps",
    "lr_warmup_iters": f"{ACTOR}.optim.lr_warmup_steps",
    "weight_decay": f"{ACTOR}.optim.weight_decay",
    "clip_grad": f"{ACTOR}.optim.clip_grad",
    "train_files": "data.train_files",
    "val_files": "data.val_files",
    "model_path": "actor_rollout_ref.model.path",
    **{name: f"+{ACTOR}.megatron.override_transformer_config.{name}" for name in _CORE},
}
"""Megatron-LM's name -> verl's override; a plus adds a key that verl does not name itself."""

LORA_RANK: Final = "actor_rollout_ref.model.lora.rank"


@cache
def places() -> dict[str, Place]:
    """Return what verl's overrides are called."""
    found = {path.lstrip("+"): Place(name) for name, path in TRAINING.items()}
    found |= dict.fromkeys(("trainer.nnodes", "trainer.n_gpus_per_node"), PLAN)
    return {**found, f"{ACTOR}.strategy": PLAN}


def unsupported(target: Target) -> list[Finding]:
    """Return what verl cannot express."""
    x, job = target.layout, target.job
    found = [f for f in megatron_refusals(target, TITLE) if f.field != "layout.order"]
    found += absent(x, TITLE, _ABSENT)
    found += no_cuda_graphs(target, TITLE)
    if job.precision.name in ("fp32", "nvfp4"):
        rule = f"{TITLE} trains Megatron models in 16 bits, or with fp8."
        found.append(refusal("job.precision", job.precision.name, rule, "Use bf16."))
    if job.seq_len < 2:
        rule = "A sequence is a prompt and a response of at least one token each."
        found.append(refusal("job.seq_len", job.seq_len, rule, "Use 2 or more."))
    return found


def write(target: Target) -> Written:
    """Return the launch of the PPO trainer with GRPO."""
    x, job = target.layout, target.job
    words = {**layout_words(x), **job_words(job, x)}
    words["use_distributed_optimizer"] = x.zero != Zero.no_shard
    if not target.model.is_moe:
        words = {w: v for w, v in words.items() if not w.startswith(("moe_", "expert_"))}
    samples = math.gcd(job.gbs, _SAMPLES)
    prompts, prompt = job.gbs // samples, max(job.seq_len // 4, 1)
    lines: dict[str, Any] = {
        "algorithm.adv_estimator": "grpo",
        "actor_rollout_ref.model.path": Unexpanded("$MODEL_PATH"),
        "data.train_files": Unexpanded("$TRAIN_FILES"),
        "data.val_files": Unexpanded("$VAL_FILES"),
        "data.train_batch_size": prompts,
        "data.max_prompt_length": prompt,
        "data.max_response_length": job.seq_len - prompt,
        "trainer.nnodes": target.nodes,
        "trainer.n_gpus_per_node": target.gpus_per_node,
        "actor_rollout_ref.rollout.name": "vllm",
        "actor_rollout_ref.rollout.n": samples,
        "actor_rollout_ref.rollout.tensor_model_parallel_size": math.gcd(
            target.gpus_per_node, max(x.tp, 1)
        ),
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu": x.mbs,
        "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu": x.mbs,
        f"{ACTOR}.strategy": "megatron",
        f"{ACTOR}.ppo_mini_batch_size": prompts,
        f"{ACTOR}.ppo_micro_batch_size_per_gpu": x.mbs,
        **overrides_of(words, DIRECT),
        **_reference(words),
        **_added(words),
    }
    if job.precision.name == "fp16":
        lines[f"{ACTOR}.megatron.dtype"] = "float16"
    if job.task == "lora":
        lines[LORA_RANK] = job.lora_rank
    said = training_of(target.carried, _DEFAULTS)
    lines |= {TRAINING[name]: v[0] if len(v) == 1 else list(v) for name, v in said.items()}
    return Written(
        program="python3 -m verl.trainer.main_ppo --config-name=ppo_megatron_trainer.yaml",
        arguments={"OVERRIDES": [[joined(path, text_of(value))] for path, value in lines.items()]},
        variables=[
            v for v in _variables(target) if any(f"${v.name}" == value for value in lines.values())
        ],
        env=_environment(target),
        by_ray=True,
    )


def _environment(target: Target) -> dict[str, str]:
    """Return the variables of overlap; vLLM's memory pool refuses expandable segments."""
    env = megatron_environment(target)
    env.pop("PYTORCH_CUDA_ALLOC_CONF")
    return env


_DEFAULTS: Final = {
    "train_iters": Unexpanded("$STEPS"),
    "lr": "1.0e-6",
    "save": Unexpanded("$CHECKPOINTS"),
    "save_interval": "100",
}


def _variables(target: Target) -> list[Variable]:
    name = target.model.name
    model = Variable(name="MODEL_PATH", default=name, comment="the Hugging Face model to train")
    return [
        model,
        Variable(name="TRAIN_FILES", default="/path/to/train.parquet", comment="prompts"),
        Variable(name="VAL_FILES", default="/path/to/test.parquet", comment="prompts"),
        Variable(name="CHECKPOINTS", default="checkpoints", comment="where to save"),
        Variable(name="STEPS", default="1000", comment="optimizer steps"),
    ]


def _reference(words: dict[str, Any]) -> dict[str, Any]:
    """Return the same degrees for the reference model."""
    degrees = {w: v for w, v in words.items() if w.endswith("parallel_size") and w in DIRECT}
    return {f"actor_rollout_ref.ref.megatron.{word}": value for word, value in degrees.items()}


def _added(words: dict[str, Any]) -> dict[str, Any]:
    """Return the overrides of nested configurations; keys that verl does not name take a plus."""
    found: dict[str, Any] = {}
    for word, path in {**TRANSFORMER, **DDP, **OPTIMIZER}.items():
        if word in words:
            found[path if word in PLAIN else f"+{path}"] = words[word]
    return found
