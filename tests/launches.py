"""Launches for the tests: small layouts that the rules allow, and what equal means."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from typing import Any

from hypothesis import assume
from hypothesis import strategies as st

import meshwright
from meshwright.checks import Case, judge_one
from meshwright.describe.job import Job, job
from meshwright.describe.model import Model
from meshwright.errors import LayoutError
from meshwright.frameworks.launch import Launch
from meshwright.frameworks.read import read_document
from meshwright.frameworks.words import effective
from meshwright.parallel.layout import (
    DEFAULT_ORDER,
    CpComm,
    Layout,
    Recompute,
    Zero,
    layout,
    table,
    to_dict,
)

MODELS = ("llama3-8b", "mixtral-8x7b", "deepseek-v3", "qwen3-30b-a3b")


@st.composite
def plans(
    draw: Callable[[Any], Any], zero: tuple[Zero, ...] = tuple(Zero)
) -> tuple[Model, Job, Layout[int]]:
    """Draw a model, a job and a layout of it that no rule refuses."""
    model = meshwright.load_model(draw(st.sampled_from(MODELS)))
    tp, cp = draw(st.sampled_from([1, 2, 4, 8])), draw(st.sampled_from([1, 1, 2]))
    pp = draw(st.sampled_from([1, 2, 4]))
    modules = [Recompute.none, Recompute.full, Recompute.core_attn, Recompute.layernorm]
    gathers = [CpComm.p2p, CpComm.all_gather, CpComm.a2a]
    try:
        x = layout(
            tp=tp,
            cp=cp,
            pp=pp,
            vpp=draw(st.sampled_from([1, 2, 4])) if pp > 1 else 1,
            ep=draw(st.sampled_from([1, 2, 8])) if model.is_moe else 1,
            etp=draw(st.sampled_from([1, 1, 2])) if model.is_moe else 1,
            gpus=draw(st.sampled_from([8, 16, 32, 64])),
            mbs=draw(st.sampled_from([1, 2])),
            sp=draw(st.sampled_from([True, tp > 1 and not model.is_moe])) and tp > 1,
            zero=draw(st.sampled_from(zero)),
            recompute=draw(st.sampled_from(modules)),
            cp_comm=draw(st.sampled_from(gathers)) if cp > 1 else CpComm.p2p,
            order=draw(st.sampled_from([DEFAULT_ORDER, DEFAULT_ORDER, "tp-cp-ep-pp-dp"])),
        )
    except LayoutError:
        assume(False)
        raise
    wanted = job(
        seq_len=draw(st.sampled_from([4096, 8192])),
        gbs=draw(st.sampled_from([64, 128, 256])),
        precision_name=draw(st.sampled_from(["bf16", "bf16", "fp8", "fp8-mx"])),
    )
    case = Case(model=model, job=wanted, x=table([x]))
    assume(not any(f.severity == "error" for f in judge_one(case)))
    return model, wanted, x


def main_file(files: dict[str, str]) -> str:
    """Return the name of the file that holds the settings."""
    return next((name for name in files if name.endswith(".py")), next(iter(files)))


def read_back(files: dict[str, str]) -> Launch:
    """Return the launch that the written files are."""
    name = main_file(files)
    return read_document(files[name], name)


def said(wanted: Job, x: Layout[int], model: Model) -> dict[str, object]:
    """Return everything of a plan that a launch can say."""
    return {
        **to_dict(x),
        "gpus": x.world_size,
        "seq_len": wanted.seq_len,
        "gbs": wanted.gbs,
        "precision": wanted.precision.name,
        "execution": effective(wanted.execution, x, model.is_moe),
    }


CONNECTION = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}

_GPT = {
    "--num-layers": "32",
    "--hidden-size": "4096",
    "--ffn-hidden-size": "14336",
    "--num-attention-heads": "32",
    "--num-query-groups": "8",
    "--seq-length": "4096",
    "--max-position-embeddings": "8192",
    "--micro-batch-size": "1",
    "--global-batch-size": "128",
    "--vocab-size": "128256",
    "--position-embedding-type": "rope",
    "--normalization": "RMSNorm",
}
_SWITCHES = (
    "--group-query-attention --swiglu --disable-bias-linear --bf16"
    " --untie-embeddings-and-output-weights"
)
LLAMA_70B = "--num-layers 80 --hidden-size 8192 --num-attention-heads 64 --ffn-hidden-size 28672"


def megatron(flags: str) -> list[str]:
    """Return a GPT of Llama's kind with some flags of its own."""
    given = shlex.split(flags)
    base = [w for name, value in _GPT.items() if name not in given for w in (name, value)]
    return ["pretrain_gpt.py", *base, *_SWITCHES.split(), *given]


def bridge(recipe: str, overrides: str) -> list[str]:
    """Return a recipe of Megatron-Bridge with overrides."""
    return ["run_recipe.py", "--recipe", f"{recipe}_config", *shlex.split(overrides)]


def verl(megatron_fields: str, others: str = "", strategy: str = "megatron") -> list[str]:
    fields = [f"actor_rollout_ref.actor.megatron.{f}" for f in megatron_fields.split()]
    micro = "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu"
    rest = others.split() if micro in others else [f"{micro}=1", *others.split()]
    strategy = f"actor_rollout_ref.actor.strategy={strategy}"
    return ["python3", "-m", "verl.trainer.main_ppo", strategy, *fields, *rest]


def titan(config: str, options: str) -> list[str]:
    return ["python", "-m", "torchtitan.train", "--config", config, *options.split()]
