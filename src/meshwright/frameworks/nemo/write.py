"""A layout as a NeMo 2 training script."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import Any, Final

from meshwright.findings import Finding
from meshwright.frameworks.carried import PLAN, Place, Unexpanded, Values, training_of
from meshwright.frameworks.nemo.read import CLASSES, CONFIG, DDP, OVERLAP, STRATEGY, TITLE
from meshwright.frameworks.words import job_words, layout_words
from meshwright.frameworks.words_model import model_words, published_words, unwritable
from meshwright.frameworks.written import (
    Target,
    Variable,
    Written,
    megatron_environment,
    megatron_refusals,
    model_refusals,
    refusal,
)
from meshwright.parallel.layout import Zero

_PRECISIONS: Final = {"bf16": "bf16-mixed", "fp16": "16-mixed"}

_MODEL_WORDS: Final = (
    *("moe_aux_loss_coeff", "moe_router_load_balancing_type", "moe_router_dtype"),
    *("moe_router_score_function", "moe_pad_expert_input_to_capacity", "moe_z_loss_coeff"),
    *("fp32_residual_connection", "calculate_per_token_loss", "layernorm_epsilon"),
    *("init_method_std", "attention_dropout", "rotary_base"),
    *("moe_router_topk_scaling_factor", "moe_router_num_groups", "moe_router_group_topk"),
)
TRAINING: Final = {
    "train_iters": "trainer.max_steps",
    "log_interval": "trainer.log_every_n_steps",
    "eval_iters": "trainer.limit_val_batches",
    "eval_interval": "trainer.val_check_interval",
    **{
        name: f"optim.config.{name}"
        for name in (
            *("optimizer", "lr", "weight_decay", "clip_grad", "adam_beta1", "adam_beta2"),
            "adam_eps",
        )
    },
    "min_lr": "CosineAnnealingScheduler.min_lr",
    "lr_warmup_iters": "CosineAnnealingScheduler.warmup_steps",
    "lr_decay_iters": "CosineAnnealingScheduler.max_steps",
    "data_path": "data.paths",
    "split": "data.split",
    "seed": "data.seed",
    "num_workers": "data.num_workers",
    "tokenizer_model": "AutoTokenizer.pretrained_model_name",
    "save": "NeMoLogger.log_dir",
    "save_interval": "ModelCheckpoint.every_n_train_steps",
    **{name: f"model.config.{name}" for name in _MODEL_WORDS},
}
"""Megatron-LM's name -> the keyword of the script's object."""


def unsupported(target: Target) -> list[Finding]:
    """Return what NeMo 2 cannot express."""
    found = megatron_refusals(target, TITLE)
    problem = unwritable(target.model)
    if problem is not None:
        found.append(refusal("model", target.model.name, problem.rule, problem.remedy))
    found += model_refusals(target, TITLE)
    graphs = target.job.execution.cuda_graphs
    if graphs != "none":
        rule = f"{TITLE}'s graphs of single layers are no choice of a plan."
        found.append(refusal("job.cuda_graphs", graphs, rule, "Use none."))
    if target.job.precision.name == "fp32":
        rule = f"{TITLE} trains Megatron models in 16 bits or less."
        found.append(refusal("job.precision", "fp32", rule, "Use bf16."))
    if target.job.execution.dispatcher == "hybridep" and target.layout.ep > 1:
        rule = f"{TITLE} knows the dispatchers alltoall, allgather and DeepEP."
        found.append(refusal("job.dispatcher", "hybridep", rule, "Use deepep or alltoall."))
    return found


def write(target: Target) -> Written:
    """Return a Python script and its launch."""
    x = target.layout
    program = _script(target)
    used = [v for v in _VARIABLES if f'os.environ["{v.name}"]' in program]
    return Written(
        program="pretrain.py" if target.job.task == "pretrain" else "finetune.py",
        arguments={},
        variables=used,
        env={
            **megatron_environment(target),
            **{variable.name: f"${variable.name}" for variable in used},
        },
        unset=("CUDA_DEVICE_MAX_CONNECTIONS",) if x.zero > Zero.optim else (),
        remarks=_remarks(target),
        files={"pretrain.py" if target.job.task == "pretrain" else "finetune.py": program},
    )


_VARIABLES: Final = (
    Variable(
        name="DATA_PATH",
        default="/path/to/data_text_document",
        comment="preprocessed data, without .bin and .idx",
    ),
    Variable(
        name="DATASET_ROOT",
        default="/path/to/dataset",
        comment="a folder with training.jsonl and validation.jsonl",
    ),
    Variable(name="PRETRAINED", default="/path/to/checkpoint", comment="the weights to tune"),
    Variable(
        name="TOKENIZER_MODEL", default="/path/to/tokenizer", comment="a Hugging Face tokenizer"
    ),
)
_DEFAULTS: Final = {
    "train_iters": "1000",
    "log_interval": "1",
    "eval_iters": "0",
    "optimizer": "adam",
    "lr": "3.0e-4",
    "weight_decay": "0.1",
    "clip_grad": "1.0",
    "adam_beta1": "0.9",
    "adam_beta2": "0.95",
    "min_lr": "3.0e-5",
    "lr_warmup_iters": "100",
    "data_path": Unexpanded("DATA_PATH"),
    "tokenizer_model": Unexpanded("TOKENIZER_MODEL"),
    "save": "checkpoints",
    "save_interval": "500",
}


@cache
def places() -> dict[str, Place]:
    """Return what NeMo's keywords and overrides are called."""
    found = {path: Place(name) for name, path in TRAINING.items()}
    for head, path in {**CLASSES, **_OBJECTS}.items():
        for name, place in TRAINING.items():
            if place.startswith(f"{path}."):
                found[f"{head}.{place.removeprefix(path + '.')}"] = Place(name)
        for size in ("devices", "num_nodes"):
            if path == "trainer":
                found |= {f"{head}.{size}": PLAN, f"{path}.{size}": PLAN}
    for recipe in ("pretrain_recipe", "finetune_recipe"):
        found |= {f"{recipe}.num_nodes": PLAN, f"{recipe}.num_gpus_per_node": PLAN}
        found[f"{recipe}.dir"] = Place("save")
    return found


_OBJECTS: Final = {"PreTrainingDataModule": "data", "GPTConfig": "model.config"}


def _script(target: Target) -> str:
    words = _words(target)
    said = training_of(target.carried, {**_DEFAULTS, **_published(target)})
    tuned = target.job.task != "pretrain"
    parts = {
        "model": _call(
            "llm.GPTModel", {"config": _config(target, words, said), "tokenizer": "tokenizer"}, 2
        ),
        "data": _data(target, said),
        "trainer": _trainer(target, words, said),
        "optim": _optim(words, said),
        "log": _log(said),
        "resume": _resume(tuned),
    }
    if target.job.task == "lora":
        parts["peft"] = f"llm.peft.LoRA(dim={target.job.lora_rank})"
    start = _call("llm.finetune" if tuned else "llm.pretrain", parts, 1)
    tokenizer = _text(said["tokenizer_model"][0]) if "tokenizer_model" in said else _TOKENIZER
    return f"{_HEAD}    tokenizer = AutoTokenizer({tokenizer})\n    {start}\n"


_TOKENIZER: Final = 'os.environ["TOKENIZER_MODEL"]'


def _remarks(target: Target) -> list[str]:
    """Tell what of the model's own configuration a GPT of NeMo has no keyword for."""
    left = {n: v for n, v in published_words(target.model).items() if n not in _MODEL_WORDS}
    said = ", ".join(f"{name} = {value}" for name, value in left.items())
    return (
        [f"GPTConfig has no keyword for {said}: take the config class of the model."]
        if left
        else []
    )


def _published(target: Target) -> dict[str, str]:
    found = published_words(target.model)
    return {name: str(value) for name, value in found.items() if name in _MODEL_WORDS}


def _words(target: Target) -> dict[str, Any]:
    x, job = target.layout, target.job
    words = {**model_words(target.model), **layout_words(x), **job_words(job, x)}
    if not target.model.is_moe:
        words = {w: v for w, v in words.items() if not w.startswith(("moe_", "expert_"))}
    if words.get("moe_flex_dispatcher_backend") == "deepep":
        words["moe_enable_deepep"] = True
    return words


def _config(target: Target, words: Mapping[str, Any], said: Mapping[str, Values]) -> str:
    config = {w: repr(v) for w, v in words.items() if w in CONFIG or w == "moe_enable_deepep"}
    config["seq_length"] = repr(target.job.seq_len)
    config |= _said(said, "model.config.")
    activation = "F.silu" if words["gated_linear_unit"] else "F.gelu"
    return _call("llm.GPTConfig", {"activation_func": activation, **config}, 3)


def _data(target: Target, said: Mapping[str, Values]) -> str:
    x, job = target.layout, target.job
    sizes = {
        "tokenizer": "tokenizer",
        "seq_length": repr(job.seq_len),
        "global_batch_size": repr(job.gbs),
        "micro_batch_size": repr(x.mbs),
    }
    if job.task != "pretrain":
        root = {"dataset_root": 'os.environ["DATASET_ROOT"]'}
        return _call("llm.FineTuningDataModule", {**root, **sizes}, 2)
    paths = "[" + ", ".join(map(_text, said["data_path"])) + "]" if "data_path" in said else "[]"
    rest = {n: v for n, v in _said(said, "data.").items() if n != "paths"}
    return _call("llm.PreTrainingDataModule", {"paths": paths, **sizes, **rest}, 2)


def _trainer(target: Target, words: Mapping[str, Any], said: Mapping[str, Values]) -> str:
    x = target.layout
    strategy = {w: repr(v) for w, v in words.items() if w in STRATEGY}
    if x.pp > 1:
        half = "torch.float16" if target.job.precision.name == "fp16" else "torch.bfloat16"
        strategy["pipeline_dtype"] = half
    if x.zero > Zero.optim:
        strategy |= {"fsdp": "'megatron'", "save_ckpt_format": "'fsdp_dtensor'"}
    ddp = {w: repr(v) for w, v in words.items() if w in DDP}
    strategy["ddp"] = _call("DistributedDataParallelConfig", ddp, 4)
    numbers = ("fp8", "fp8_recipe", "fp4", "fp4_recipe")
    precision = {
        "precision": repr(_PRECISIONS.get(target.job.precision.name, "bf16-mixed")),
        **{w: repr(v) for w, v in words.items() if w in numbers},
    }
    overlap = {w: repr(v) for w, v in words.items() if w in OVERLAP}
    callback = _call("MegatronCommOverlapCallback", overlap, 3)
    return _call(
        "nl.Trainer",
        {
            "devices": repr(target.gpus_per_node),
            "num_nodes": repr(target.nodes),
            **_said(said, "trainer."),
            "accelerator": "'gpu'",
            "strategy": _call("nl.MegatronStrategy", strategy, 3),
            "plugins": _call("nl.MegatronMixedPrecision", precision, 3),
            "callbacks": f"[{callback}]",
        },
        2,
    )


def _optim(words: Mapping[str, Any], said: Mapping[str, Values]) -> str:
    offload = {w: repr(v) for w, v in words.items() if w.startswith("optimizer_")}
    shared = {"use_distributed_optimizer": repr(bool(words.get("use_distributed_optimizer")))}
    config = _call("OptimizerConfig", {**_said(said, "optim.config."), **shared, **offload}, 3)
    steps = {"max_steps": _value(said["train_iters"])} if "train_iters" in said else {}
    schedule = _call(
        "CosineAnnealingScheduler", {**steps, **_said(said, "CosineAnnealingScheduler.")}, 3
    )
    return _call("nl.MegatronOptimizerModule", {"config": config, "lr_scheduler": schedule}, 2)


def _log(said: Mapping[str, Values]) -> str:
    kept = _call("nl.ModelCheckpoint", _said(said, "ModelCheckpoint."), 3)
    return _call("nl.NeMoLogger", {**_said(said, "NeMoLogger."), "ckpt": kept}, 2)


def _resume(tuned: bool) -> str:
    keywords = {"resume_if_exists": "True", "resume_ignore_no_checkpoint": "True"}
    if tuned:
        keywords["restore_config"] = 'nl.RestoreConfig(path=os.environ["PRETRAINED"])'
    return _call("nl.AutoResume", keywords, 2)


def _said(said: Mapping[str, Values], head: str) -> dict[str, str]:
    """Return the settings of one object as keywords."""
    return {
        TRAINING[name].removeprefix(head): _value(values)
        for name, values in said.items()
        if TRAINING[name].startswith(head)
    }


def _value(values: Values) -> str:
    """Return a value as Python: a number or a switch as it is, text quoted, several as a list."""
    if len(values) != 1:
        return "[" + ", ".join(_value((value,)) for value in values) + "]"
    (text,) = values
    if text in ("true", "false"):
        return text.capitalize()
    if not isinstance(text, Unexpanded) and _NUMBER.fullmatch(text):
        return text
    return _text(text)


def _text(text: str) -> str:
    """Return text as Python; variables of the shell come from the environment."""
    if not isinstance(text, Unexpanded):
        return repr(text)
    return f'os.environ["{text}"]' if text.isidentifier() else f"os.path.expandvars({str(text)!r})"


_NUMBER: Final = re.compile(r"-?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?")


def _call(name: str, keywords: Mapping[str, str], depth: int) -> str:
    """Return a call with one keyword a line, at a depth of indentation."""
    inside, end = " " * 4 * (depth + 1), " " * 4 * depth
    return f"{name}(\n" + "".join(f"{inside}{k}={v},\n" for k, v in keywords.items()) + f"{end})"


_HEAD: Final = '''\
"""Started by run.sh or run.sbatch; data and tokenizer come from the environment."""

import os

import nemo.lightning as nl
import torch
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from nemo.collections import llm
from nemo.collections.common.tokenizers.huggingface import AutoTokenizer
from nemo.lightning.pytorch.callbacks import MegatronCommOverlapCallback
from nemo.lightning.pytorch.optim import CosineAnnealingScheduler

if __name__ == "__main__":
'''
