"""Megatron-Bridge's configuration: every path, its type and default, and how an override reads.

``settings.csv`` holds one row a path: facts of the software as of August 2026, above the base of a
GPT model in bf16 with SwiGLU, no linear biases, mock pre-training data, cosine schedule, Adam and
ten iterations. Rules that Bridge shares with Megatron-LM name a setting as Megatron-LM's command
line does; ``setting_of`` translates.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from meshwright.errors import did_you_mean
from meshwright.frameworks.megatron_lm.arguments import UnusableArgument, pattern
from meshwright.frameworks.megatron_lm.rules import is_list

UNDOTTED = ("dataset_kind", "mixed_precision")
"""Overrides without a section: which dataset the base holds, and a precision recipe."""

DATASET_KINDS = ("mock", "pretrain", "sft")

_RENAMED = {
    "model.num_moe_experts": "num_experts",
    "model.num_layers_in_first_pipeline_stage": "decoder_first_pipeline_num_layers",
    "model.num_layers_in_last_pipeline_stage": "decoder_last_pipeline_num_layers",
    "model.fp8_param": "fp8_param_gather",
    "model.fp4_param": "fp4_param_gather",
    "model.cuda_graph_scope": "cuda_graph_scope_deprecated",
    "model.gated_linear_unit": "swiglu",
    "ddp.grad_reduce_in_fp32": "accumulate_allreduce_grads_in_fp32",
    "dist.use_megatron_fsdp": "dist_use_megatron_fsdp",
    "checkpoint.save": "save",
}
_SHARED = {
    "ddp": (
        "use_distributed_optimizer",
        "overlap_param_gather",
        "overlap_grad_reduce",
        "align_param_gather",
        "num_distributed_optimizer_instances",
        "use_megatron_fsdp",
        "megatron_fsdp_version",
        "data_parallel_sharding_strategy",
        "outer_dp_sharding_strategy",
        "nccl_ub",
        "fsdp_manual_registration",
        "fsdp_double_buffer",
        "reuse_grad_buf_for_mxfp8_param_ag",
        "disable_symmetric_registration",
    ),
    "optimizer": (
        "optimizer",
        "use_precision_aware_optimizer",
        "main_grads_dtype",
        "main_params_dtype",
        "exp_avg_dtype",
        "exp_avg_sq_dtype",
        "optimizer_cpu_offload",
        "optimizer_offload_fraction",
        "overlap_param_gather_with_optimizer_step",
    ),
    "dist": (
        "use_tp_pp_dp_mapping",
        "use_gloo_process_groups",
        "use_torch_fsdp2",
        "use_sharp",
        "sharp_enabled_group",
    ),
    "train": (
        "micro_batch_size",
        "global_batch_size",
        "train_iters",
        "train_samples",
        "decrease_batch_size_if_needed",
        "check_weight_hash_across_dp_replicas_interval",
    ),
    "validation": ("eval_global_batch_size", "eval_micro_batch_size"),
    "checkpoint": ("ckpt_format", "async_save", "use_persistent_ckpt_worker"),
}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One path: its ``section``, the ``name`` rules know it by, type and default."""

    path: str
    name: str
    type: str
    default: Any


def setting_of(path: str) -> str:
    """Return the name by which rules know ``path``."""
    if path in _RENAMED:
        return _RENAMED[path]
    section, _, name = path.partition(".")
    if not name:
        return section
    return name if section == "model" or name in _SHARED.get(section, ()) else f"{section}_{name}"


@cache
def settings() -> dict[str, Setting]:
    """Return every setting by its path."""
    package = files("meshwright.frameworks.megatron_bridge")
    text = package.joinpath("settings.csv").read_text(encoding="ascii")
    table: dict[str, Setting] = {}
    for row in csv.DictReader(text.splitlines()):
        path = row["path"]
        table[path] = Setting(
            path=path, name=setting_of(path), type=row["type"], default=json.loads(row["default"])
        )
    return table


@cache
def paths() -> dict[str, str]:
    """Return the path of every setting by the name rules know it by."""
    return {s.name: s.path for s in settings().values()}


def defaults() -> dict[str, Any]:
    """Return every setting of the base, by name; lists are fresh."""
    return {
        s.name: list(s.default) if is_list(s.default) else s.default for s in settings().values()
    }


def parse(argv: Sequence[str]) -> dict[str, Any]:
    """Return the settings that the overrides ``path=value`` give, by name.

    Strings are unquoted; lists, booleans and null are JSON. A later override wins.

    Raises ``UnusableArgument`` on an unknown path or a value of the wrong type.
    """
    given: dict[str, Any] = {}
    for text in argv:
        path, sign, value = text.strip().partition("=")
        if not sign:
            raise UnusableArgument(text, text, "An override is path=value.", "Add the value.")
        path = path.lstrip("+")
        if path not in settings() and path not in UNDOTTED:
            known = [*settings(), *UNDOTTED]
            rule = f"There is no setting {path[:80]}."
            raise UnusableArgument(path[:80], value, rule, did_you_mean(path[:80], known))
        given[setting_of(path)] = _typed(path, _read(value))
    return given


def _read(text: str) -> Any:
    lowered = text.strip().lower()
    if lowered in _WORDS:
        return _WORDS[lowered]
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


_WORDS = {"true": True, "false": False, "null": None, "none": None}


def _typed(path: str, value: Any) -> Any:
    if path == "mixed_precision":
        if value is not None and not isinstance(value, str):
            raise UnusableArgument(path, value, "A recipe has a name.", f"Write {path}=bf16_mixed.")
        return value.replace("-", "_") if value else None
    if path == "dataset_kind":
        if value not in DATASET_KINDS:
            rule = f"The dataset is one of {', '.join(DATASET_KINDS)}."
            raise UnusableArgument(path, value, rule, f"Write {path}=sft.")
        return value
    if path == "model.pipeline_model_parallel_layout":
        value = _layout_text(value)
    setting = settings()[path]
    kind = setting.type.removesuffix("?")
    if kind == "any" or (
        value is None and (setting.default is None or setting.type not in _NUMBERS)
    ):
        return value
    fits, what, example = _TYPES[kind]
    if not fits(value):
        raise UnusableArgument(path, value, f"{path} is {what}.", f"Write {path}={example}.")
    return pattern(value) if kind == "pattern" and isinstance(value, str) else value


_NUMBERS = ("int", "float")
"""Numbers that have a default always have a value; ``int?`` may be unset."""


_LETTERS = {"embedding": "E", "decoder": "t", "mtp": "m", "loss": "L"}


def _layout_text(value: object) -> object:
    """Write a layout given as lists of layer names in letters: ``Ett|ttL``."""
    if not is_list(value):
        return value
    stages = [stage if is_list(stage) else [stage] for stage in value]
    return "|".join(
        "".join(_LETTERS.get(str(layer).lower(), "?") for layer in stage) for stage in stages
    )


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _number(value: object) -> bool:
    return _whole(value) or isinstance(value, float)


def _layers(value: object) -> bool:
    if isinstance(value, str):
        try:
            pattern(value)
        except ValueError:
            return False
        return True
    return _whole(value) or (is_list(value) and all(_whole(v) for v in value))


def _texts(value: object) -> bool:
    return isinstance(value, str) or (is_list(value) and all(isinstance(v, str) for v in value))


_TYPES: dict[str, tuple[Callable[[object], bool], str, str]] = {
    "bool": (lambda v: isinstance(v, bool), "true or false", "true"),
    "int": (_whole, "a whole number", "1"),
    "float": (_number, "a number", "1.0"),
    "str": (lambda v: isinstance(v, str), "a text", "text"),
    "list": (is_list, "a list", "[]"),
    "texts": (_texts, "a text or a list of texts", '["text"]'),
    "ints": (lambda v: is_list(v) and all(_whole(i) for i in v), "a list of numbers", "[2, 2]"),
    "numbers": (
        lambda v: _number(v) or (is_list(v) and all(_number(i) for i in v)),
        "a number or a list of numbers",
        "0.01",
    ),
    "pattern": (_layers, "a whole number or a list of 0 and 1", "1"),
}


class Overrides:
    """How settings are written as Bridge overrides."""

    def name(self, setting: str) -> str:
        """Return the path of a setting, or its name when it has none."""
        return paths().get(setting, setting)

    def write(self, setting: str, value: str | None) -> str:
        """Return the override, or the path alone."""
        path = self.name(setting)
        return path if value is None else f"{path}={value}"
