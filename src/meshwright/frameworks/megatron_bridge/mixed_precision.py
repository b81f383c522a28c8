"""Megatron-Bridge's mixed precision recipes: what a name such as ``bf16_mixed`` sets.

A recipe overwrites its fields wherever a section of the configuration has them, whatever was set
there before.
"""

from __future__ import annotations

from typing import Any

from meshwright.errors import did_you_mean
from meshwright.frameworks.megatron_bridge.settings import setting_of, settings
from meshwright.frameworks.megatron_lm.rules import Settings, derive, error

_BASE: dict[str, Any] = {
    "fp32": False,
    "fp16": False,
    "bf16": False,
    "params_dtype": None,
    "pipeline_dtype": None,
    "grad_reduce_in_fp32": True,
    "fp8": None,
    "fp8_recipe": "tensorwise",
    "first_last_layers_bf16": False,
    "fp8_wgrad": True,
    "fp8_param": False,
    "fp8_param_gather": False,
    "fp4": None,
    "fp4_recipe": "nvfp4",
    "fp4_param": False,
    "fp4_param_gather": False,
    "loss_scale": None,
    "num_layers_at_start_in_bf16": 0,
    "num_layers_at_end_in_bf16": 0,
    "reuse_grad_buf_for_mxfp8_param_ag": False,
}
_BF16 = {"bf16": True, "params_dtype": "torch.bfloat16", "pipeline_dtype": "torch.bfloat16"}
_FP16 = {
    "fp16": True,
    "params_dtype": "torch.float16",
    "pipeline_dtype": "torch.float16",
    "grad_reduce_in_fp32": False,
}
_GATHER = {"fp8_param": True, "fp8_param_gather": True}
_DELAYED = {"fp8": "hybrid", "fp8_recipe": "delayed", **_GATHER}
_MXFP8 = {
    "fp8": "e4m3",
    "fp8_recipe": "mxfp8",
    "reuse_grad_buf_for_mxfp8_param_ag": True,
    **_GATHER,
}
_CURRENT = {
    "fp8": "hybrid",
    "fp8_recipe": "tensorwise",
    "first_last_layers_bf16": True,
    "num_layers_at_start_in_bf16": 1,
    "num_layers_at_end_in_bf16": 1,
    **_GATHER,
}
_BLOCKWISE = {"fp8": "hybrid", "fp8_recipe": "blockwise"}
_NVFP4 = {"fp4": "e2m1", "fp4_recipe": "nvfp4", "fp4_param": True, "fp4_param_gather": True}
_TWO_ENDS = {"num_layers_at_start_in_bf16": 2, "num_layers_at_end_in_bf16": 2}
_LONG_END = {"first_last_layers_bf16": True, "num_layers_at_end_in_bf16": 14}

_RECIPES: dict[str, dict[str, Any]] = {
    "bf16_mixed": _BF16,
    "fp16_mixed": _FP16,
    "bf16_with_fp8_delayed_scaling_mixed": _BF16 | _DELAYED,
    "fp16_with_fp8_delayed_scaling_mixed": _FP16 | _DELAYED,
    "bf16_with_mxfp8_mixed": _BF16 | _MXFP8,
    "fp16_with_mxfp8_mixed": _FP16 | _MXFP8,
    "bf16_with_fp8_current_scaling_mixed": _BF16 | _CURRENT,
    "fp16_with_fp8_current_scaling_mixed": _FP16 | _CURRENT,
    "nemotron_h_bf16_with_fp8_current_scaling_mixed": _BF16 | _CURRENT | _TWO_ENDS,
    "nanov2_bf16_with_fp8_current_scaling_mixed": _BF16 | _CURRENT | _BLOCKWISE | _TWO_ENDS,
    "bf16_with_fp8_subchannel_scaling_mixed": _BF16 | _BLOCKWISE,
    "fp16_with_fp8_subchannel_scaling_mixed": _FP16 | _BLOCKWISE,
    "bf16_with_nvfp4_mixed": _BF16 | _NVFP4,
    "nemotron_3_super_bf16_with_nvfp4_mixed": _BF16 | _NVFP4 | _LONG_END,
    "nemotron_3_ultra_bf16_with_nvfp4_mixed": (
        _BF16 | _NVFP4 | _LONG_END | {"num_layers_at_end_in_bf16": 16}
    ),
}


def _unknown_recipe(s: Settings) -> object:
    name: object = s.mixed_precision
    return (
        name is not None
        and name not in _RECIPES
        and {"how": did_you_mean(str(name)[:80], _RECIPES)}
    )


def _applied(s: Settings) -> dict[str, Any] | None:
    """What the recipe, with what was set on top of it, writes into every section."""
    if s.mixed_precision is None:
        return None
    fields = _BASE | _RECIPES[s.mixed_precision]
    fields |= {f: getattr(s, f"mixed_precision_{f}") for f in _set_by_hand(s)}
    return {
        setting_of(path): value
        for field, value in fields.items()
        for path in (f"model.{field}", f"optimizer.{field}", f"ddp.{field}")
        if path in settings()
    } | {f"mixed_precision_{field}": value for field, value in fields.items()}


def _set_by_hand(s: Settings) -> list[str]:
    return [
        name.removeprefix("mixed_precision_")
        for name in s.given
        if name.startswith("mixed_precision_")
    ]


RULES = (
    error(
        "MB-MP-recipe",
        "mixed_precision:448",
        "mixed_precision",
        _unknown_recipe,
        "There is no mixed precision recipe {mixed_precision!r}.",
        "{how}",
        final=True,
    ),
    derive("mixed_precision:450", _applied),
    error(
        "MB-MP-fp4_fp8",
        "mixed_precision:460",
        "mixed_precision_fp4",
        lambda s: s.mixed_precision is not None and s.fp4 and s.fp8,
        "FP4 and FP8 exclude each other.",
        "Keep one of the two.",
    ),
)
