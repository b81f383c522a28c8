"""Megatron-Bridge overrides and recipe command lines, in Megatron Core's words."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Final

from meshwright.describe.model import Model
from meshwright.errors import MeshwrightError
from meshwright.findings import Finding
from meshwright.frameworks.launch import Reading, Setting
from meshwright.frameworks.launchers import Started
from meshwright.frameworks.megatron_bridge.launch import resolve
from meshwright.frameworks.megatron_bridge.settings import setting_of, settings
from meshwright.frameworks.megatron_lm.launch import Resolved
from meshwright.frameworks.megatron_lm.read import settings_of
from meshwright.frameworks.overrides import Override
from meshwright.frameworks.words_model import find_model, model_words
from meshwright.parallel.layout import minimum_world_size

TITLE: Final = "Megatron-Bridge"
MOST_REFUSED: Final = 8
_RECIPE_FLAGS: Final = ("--recipe", "--recipe_name")
_SECTIONS: Final = ("cfg.", "config.", "self.")
_CONTAINERS: Final = {
    "GPTModelProvider": "model",
    "TrainingConfig": "train",
    "DistributedDataParallelConfig": "ddp",
    "CommOverlapConfig": "comm_overlap",
    "OptimizerConfig": "optimizer",
    "SchedulerConfig": "scheduler",
    "CheckpointConfig": "checkpoint",
    "LoggerConfig": "logger",
}
"""Classes of Bridge's Python recipes, and the section that each fills."""


def read(
    found: Sequence[Override],
    chosen: Started | None,
    gpus: int | None,
    env: Mapping[str, object],
) -> Reading:
    """Read overrides that are started on ``gpus`` ranks (None: not known)."""
    reading = Reading()
    recipe = _option(chosen, _RECIPE_FLAGS) or next(
        (str(o.value) for o in found if o.path == "recipe"), ""
    )
    base = _recipe_base(recipe, reading)
    given = [(_path(o.path), o) for o in found if o.path != "recipe"]
    known = [(p, o) for p, o in given if p in settings() or "." in p or p in _UNDOTTED]
    reading.argv = [f"{p}={text_of(o.value)}" for p, o in known]
    ruled = [a for a in reading.argv if not a.startswith("peft.")]
    shape = [f"{path}={text_of(value)}" for path, value in base.items()]
    if gpus is None:
        gpus = _smallest_world({p: o.value for p, o in known})
        reading.assumed.append(
            f"{gpus} GPUs: the launch does not say how many; the smallest world is taken"
        )
    refused: list[Finding] = []
    resolved = resolve(shape + ruled, gpus, env)
    while _is_refused(resolved) and len(refused) < MOST_REFUSED:
        refused.append(resolved.findings[0])
        shorter = [a for a in ruled if a.partition("=")[0].lstrip("+") != refused[-1].field]
        if len(shorter) == len(ruled):
            break
        ruled = shorter
        resolved = resolve(shape + ruled, gpus, env)
    left = [] if _is_refused(resolved) or (recipe and not base) else resolved.findings
    reading.findings = [*refused, *left]
    origins = {setting_of(p): f"recipe {recipe}" for p in base}
    origins |= {setting_of(p): o.origin for p, o in known}
    reading.settings = settings_of(resolved, origins, TITLE)
    padded = resolved.values.get("should_pad_vocab")
    if isinstance(padded, bool):
        reading.settings["should_pad_vocab"] = Setting(
            value=padded, origin=origins.get("should_pad_vocab", f"default of {TITLE}")
        )
    if recipe:
        reading.settings["model"] = Setting(value=_model_name(recipe), origin=f"recipe {recipe}")
    _task(recipe, {p: o for p, o in known}, reading)
    if reading.settings.get("task", _PRETRAIN).value == "lora" and not _states(chosen, known):
        reading.findings.append(_NO_WEIGHTS)
    return reading


@cache
def texts() -> frozenset[str]:
    """Return the paths of free text: with a variable in it, one is set all the same."""
    free = ("checkpoint.", "logger.", "tokenizer.", "profiling.")
    return frozenset(p for p, s in settings().items() if s.type == "str" and p.startswith(free))


def _states(chosen: Started | None, known: Sequence[tuple[str, Override]]) -> bool:
    """Say whether the weights to adapt are stated, be it by a variable that is not known here."""
    words = [w.text for w in chosen.args] if chosen is not None else []
    given = [path for path, _ in known] + [word.partition("=")[0] for word in words]
    return _WEIGHTS in given


_WEIGHTS: Final = "checkpoint.pretrained_checkpoint"
_PRETRAIN: Final = Setting(value="pretrain", origin="")
_NO_WEIGHTS: Final = Finding(
    id="MB-CFG-peft_ckpt",
    severity="warning",
    field=_WEIGHTS,
    value=None,
    rule="Adapters need the weights that they adapt; unless the recipe names them, Bridge stops.",
    remedy=f"Set {_WEIGHTS}.",
    message=f"{_WEIGHTS}: Adapters need the weights that they adapt; unless the recipe names them,"
    f" Bridge stops. Set {_WEIGHTS}.",
)


_UNDOTTED: Final = frozenset({"dataset_kind", "mixed_precision"})


def _is_refused(resolved: Resolved) -> bool:
    return bool(resolved.findings) and resolved.findings[0].id == "MB-OVERRIDE"


def _path(path: str) -> str:
    for prefix in _SECTIONS:
        path = path.removeprefix(prefix)
    section, _, name = path.partition(".")
    return f"{_CONTAINERS[section]}.{name}" if section in _CONTAINERS else path


def text_of(value: Any) -> str:
    """Return a value as an override writes it: lists, booleans and null as JSON, text plain."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _option(chosen: Started | None, names: Sequence[str]) -> str:
    words = [w.text for w in chosen.args] if chosen is not None else []
    for at, word in enumerate(words):
        name, sign, value = word.partition("=")
        if name in names:
            return value if sign else "".join(words[at + 1 : at + 2])
    return ""


def _model_name(recipe: str) -> str:
    for suffix in ("_config", "_pretrain", "_finetune", "_sft", "_peft", "_lora"):
        recipe = recipe.removesuffix(suffix)
    return recipe


def _recipe_base(recipe: str, reading: Reading) -> dict[str, Any]:
    """Return the overrides that stand for a recipe: its model's shape, and what is assumed."""
    if not recipe:
        return {}
    model = find_model(_model_name(recipe))
    if model is None:
        reading.unread.append(
            f"recipe {recipe}: its model is not known, so rules of its shape were not asked"
        )
        return {}
    base = shape_overrides(model) or _plain_shape(model)
    base |= {"model.seq_length": 4096, "dataset.seq_length": 4096}
    base |= {"train.micro_batch_size": 1, "train.global_batch_size": 512}
    base |= {"ddp.use_distributed_optimizer": True, "optimizer.use_distributed_optimizer": True}
    base |= {"ddp.overlap_grad_reduce": True, "ddp.overlap_param_gather": True}
    base |= {"optimizer.overlap_param_gather": True}
    base |= {"model.cross_entropy_loss_fusion": True}
    if model.is_moe:
        base |= {"model.moe_token_dispatcher_type": "alltoall", "model.moe_grouped_gemm": True}
        base |= {"model.moe_permute_fusion": True, "model.moe_aux_loss_coeff": 0.001}
        base |= {"model.moe_router_dtype": "fp32"}
    reading.assumed.append(
        f"recipe {recipe}: the shape of {model.name}; what the recipe sets besides is not read:"
        " sequence 4096, batch 512, no parallelism, an overlapped distributed optimizer and fused"
        " kernels are taken where nothing overrides them"
    )
    return base


def shape_overrides(model: Model) -> dict[str, Any]:
    """Return the overrides that give Bridge's GPT the shape of a model; none if it has none."""
    try:
        words = model_words(model)
    except MeshwrightError:
        return {}
    for word in ("max_position_embeddings", *_BY_RECIPE):
        words.pop(word, None)
    return {f"model.{w}": v for w, v in words.items() if f"model.{w}" in settings()}


_BY_RECIPE: Final = ("window_size", "window_attn_skip_freq", "softmax_type")
"""What a recipe says of its model's attention; a GPT of other layers has no use for it."""


def _plain_shape(model: Model) -> dict[str, Any]:
    """Return the widths of a model whose layers Bridge's GPT does not have: rules ask for them."""
    shape: dict[str, Any] = {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_hidden_size or model.expert_ffn_hidden_size,
        "num_attention_heads": model.num_heads,
        "num_query_groups": model.num_kv_heads,
        "kv_channels": model.head_dim,
    }
    if model.is_moe:
        shape |= {
            "num_moe_experts": model.num_experts,
            "moe_router_topk": model.topk,
            "moe_ffn_hidden_size": model.expert_ffn_hidden_size,
        }
    return {f"model.{name}": value for name, value in shape.items() if value}


def _smallest_world(values: Mapping[str, Any]) -> int:
    def degree(name: str, default: int = 1) -> int:
        value = values.get(f"model.{name}", default)
        return value if isinstance(value, int) and 0 < value < 2**16 else 1

    world = minimum_world_size(
        degree("tensor_model_parallel_size"),
        degree("context_parallel_size"),
        degree("pipeline_model_parallel_size"),
        degree("expert_model_parallel_size"),
        degree("expert_tensor_parallel_size"),
    )
    return min(world, 2**20)


def _task(recipe: str, known: Mapping[str, Override], reading: Reading) -> None:
    rank = known.get("peft.dim")
    if rank is not None or recipe.endswith(("_peft_config", "_lora_config")) or "peft" in known:
        origin = f"recipe {recipe}" if rank is None else rank.origin
        reading.settings["task"] = Setting(value="lora", origin=origin)
        if rank is not None and isinstance(rank.value, int):
            reading.settings["lora_rank"] = Setting(value=rank.value, origin=origin)
    elif recipe.endswith(("_sft_config", "_finetune_config")):
        reading.settings["task"] = Setting(value="sft", origin=f"recipe {recipe}")
    elif "dataset_kind" in known and known["dataset_kind"].value == "sft":
        reading.settings["task"] = Setting(value="sft", origin=known["dataset_kind"].origin)
