"""A layout as a NeMo 2 training script."""

from __future__ import annotations

from typing import Any, Final

from meshwright.findings import Finding
from meshwright.frameworks.nemo.read import CONFIG, DDP, OVERLAP, STRATEGY, TITLE
from meshwright.frameworks.words import job_words, layout_words
from meshwright.frameworks.words_model import model_words, unwritable
from meshwright.frameworks.written import (
    Target,
    Variable,
    Written,
    megatron_environment,
    megatron_refusals,
    refusal,
)
from meshwright.parallel.layout import Zero

_PRECISIONS: Final = {"bf16": "bf16-mixed", "fp16": "16-mixed"}


def unsupported(target: Target) -> list[Finding]:
    """Return what NeMo 2 cannot express."""
    found = megatron_refusals(target.layout, TITLE)
    problem = unwritable(target.model)
    if problem is not None:
        found.append(refusal("model", target.model.name, problem.rule, problem.remedy))
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
    return Written(
        program="pretrain.py",
        arguments={},
        variables=(
            Variable(
                name="DATA_PATH",
                default="/path/to/data_text_document",
                comment="preprocessed data, without .bin and .idx",
            ),
            Variable(
                name="TOKENIZER_MODEL",
                default="/path/to/tokenizer",
                comment="a Hugging Face tokenizer",
            ),
        ),
        env={
            **megatron_environment(target),
            "DATA_PATH": "$DATA_PATH",
            "TOKENIZER_MODEL": "$TOKENIZER_MODEL",
        },
        unset=("CUDA_DEVICE_MAX_CONNECTIONS",) if x.zero > Zero.optim else (),
        files={"pretrain.py": _script(target)},
    )


def _script(target: Target) -> str:
    x, job = target.layout, target.job
    words = {**model_words(target.model), **layout_words(x), **job_words(job, x)}
    if not target.model.is_moe:
        words = {w: v for w, v in words.items() if not w.startswith(("moe_", "expert_"))}
    if words.get("moe_flex_dispatcher_backend") == "deepep":
        words["moe_enable_deepep"] = True
    config = {w: v for w, v in words.items() if w in CONFIG or w == "moe_enable_deepep"}
    config["seq_length"] = job.seq_len
    strategy = {w: v for w, v in words.items() if w in STRATEGY}
    ddp = {w: v for w, v in words.items() if w in DDP}
    overlap = {w: v for w, v in words.items() if w in OVERLAP}
    precision = {w: v for w, v in words.items() if w in ("fp8", "fp8_recipe", "fp4", "fp4_recipe")}
    precision = {"precision": _PRECISIONS.get(job.precision.name, "bf16-mixed"), **precision}
    data = {"seq_length": job.seq_len, "global_batch_size": job.gbs, "micro_batch_size": x.mbs}
    fsdp = {"fsdp": "megatron", "save_ckpt_format": "fsdp_dtensor"} if x.zero > Zero.optim else {}
    return _TEMPLATE.format(
        config=_keywords(config, 8),
        activation="silu" if config["gated_linear_unit"] else "gelu",
        data=_keywords(data, 8),
        strategy=_keywords({**strategy, **fsdp}, 12),
        ddp=_keywords(ddp, 16),
        precision=_keywords(precision, 12),
        overlap=_keywords(overlap, 16),
        devices=target.gpus_per_node,
        nodes=target.nodes,
        tune=_TUNES[job.task],
        peft=f"\n        peft=llm.peft.LoRA(dim={job.lora_rank})," if job.task == "lora" else "",
        offload=_keywords({w: v for w, v in words.items() if w.startswith("optimizer_")}, 12),
    )


_TUNES: Final = {"pretrain": "llm.pretrain", "sft": "llm.finetune", "lora": "llm.finetune"}


def _keywords(values: dict[str, Any], indent: int) -> str:
    return "".join(f"{' ' * indent}{name}={value!r},\n" for name, value in values.items())


_TEMPLATE: Final = '''\
"""Started by run.sh or run.sbatch; data and tokenizer come from the environment."""

import os

import nemo.lightning as nl
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from nemo.collections import llm
from nemo.collections.common.tokenizers.huggingface import AutoTokenizer
from nemo.lightning.pytorch.callbacks import MegatronCommOverlapCallback

if __name__ == "__main__":
    tokenizer = AutoTokenizer(os.environ["TOKENIZER_MODEL"])
    config = llm.GPTConfig(
        activation_func=F.{activation},
{config}    )
    data = llm.PreTrainingDataModule(
        paths=[os.environ["DATA_PATH"]],
        tokenizer=tokenizer,
{data}    )
    trainer = nl.Trainer(
        devices={devices},
        num_nodes={nodes},
        max_steps=1000,
        accelerator="gpu",
        log_every_n_steps=1,
        limit_val_batches=0,
        strategy=nl.MegatronStrategy(
{strategy}            ddp=DistributedDataParallelConfig(
{ddp}            ),
        ),
        plugins=nl.MegatronMixedPrecision(
{precision}        ),
        callbacks=[
            MegatronCommOverlapCallback(
{overlap}            ),
        ],
    )
    optim = nl.MegatronOptimizerModule(
        config=OptimizerConfig(
            optimizer="adam",
            lr=3.0e-4,
{offload}        )
    )
    {tune}(
        model=llm.GPTModel(config, tokenizer=tokenizer),
        data=data,
        trainer=trainer,
        optim=optim,{peft}
    )
'''
