"""Settings of a measured run -> precision recipe, with the dtypes of its buffers."""

from __future__ import annotations

import re
from dataclasses import replace

from meshwright.describe.job import Precision, precision
from meshwright.errors import JobError
from meshwright.fit.framework import Framework
from meshwright.fit.settings import NOT_STATED, Settings

_BYTES = {
    **{f"{prefix}{name}": 4.0 for prefix in ("", "torch.") for name in ("fp32", "float32")},
    **{f"{prefix}{name}": 2.0 for prefix in ("", "torch.") for name in ("bf16", "bfloat16")},
    **{"fp16": 2.0, "float16": 2.0, "fp8": 1.0, "uint8": 1.0},
}


def read_precision(s: Settings, framework: Framework, *, is_latent: bool = False) -> Precision:
    """Return the recipe of a row with the dtypes of its buffers.

    ``is_latent``: attention of the model is latent (MLA), whose recipes keep 16-bit moments.
    """
    recipe = _recipe(s)
    changes: dict[str, float] = {}
    if _reduces_in_16_bit(s, framework):
        changes |= {"grad_bytes": 2.0, "grad_reduce_bytes": 2.0}
    if is_latent and framework.name == "megatron-bridge" and not s.section("optimizer"):
        s.assumed.append("16-bit moments: as in the recipes of models with latent attention")
        changes["moment_bytes"] = 4.0
    if re.search("muon|lion|sgd", s.text("optimizer")):
        # These keep one moment of a gradient.
        changes["moment_bytes"] = recipe.moment_bytes / 2
    if s.flag("use_precision_aware_optimizer", default=False):
        first = _dtype_bytes(s, "exp_avg_dtype", 4.0)
        second = _dtype_bytes(s, "exp_avg_sq_dtype", 4.0)
        changes["moment_bytes"] = first + second
        changes["master_bytes"] = _dtype_bytes(s, "main_params_dtype", 4.0)
    if recipe.name.startswith(("fp8", "nvfp4")) and s.flag(
        "fp8_param_gather", "fp8_params", "fp8_param", default=False
    ):
        changes["param_gather_bytes"] = 1.0
        changes["param_bytes"] = 1.0
        changes["param_copy_bytes"] = max(recipe.param_copy_bytes - 1.0, 0.0)
    if framework.name == "composer":
        changes |= _composer(s)
    if framework.name == "deepspeed":
        # ZeRO-1 leaves gradients as the model makes them; the bf16 optimizer sums them in fp32
        # beside the 16-bit ones of the micro-batch.
        changes["grad_bytes"] = 2.0 if recipe.name == "fp16" else 6.0
    if s.is_module:
        changes |= {"master_bytes": 0.0, "moment_bytes": 0.0}
    if framework.name in ("torchtitan", "automodel"):
        # FSDP2 keeps the sharded weights in fp32 and gathers them in 16 bit.
        changes |= {"master_bytes": 4.0, "param_bytes": 2.0}
    head = not s.flag("fp8_output_proj", default=False)
    return replace(recipe, head_in_16_bit=head, **changes)  # pyright: ignore[reportArgumentType]


RECIPES = (
    (r"nvfp4|fp4", "nvfp4"),
    (r"mxfp8|mx", "fp8-mx"),
    (r"block|subchannel|sub_channel|128x128", "fp8-blockwise"),
    (r"rowwise|row_wise", "fp8-rowwise"),
    (r"tensorwise|tensor_wise|current", "fp8-cs"),
    (r"fp8|e4m3|float8|delayed|int8", "fp8"),
    (r"bf16|bfloat16", "bf16"),
    (r"fp16|float16|half", "fp16"),
    (r"fp32|float32|tf32", "fp32"),
)
"""Words in which frameworks name a recipe; the first that is found counts."""

RECIPE_SETTINGS = ("fp8_recipe", "mixed_precision._ctor", "mixed_precision")
"""Settings that say which recipe, where the cell says only ``fp8`` or nothing."""


def _recipe(s: Settings) -> Precision:
    cell = s.cell("precision").lower()
    if cell in NOT_STATED:
        name = _recipe_of(s.text(*RECIPE_SETTINGS)) or _recipe_of_switches(s)
        s.assumed.append(f"precision = {name}: not stated in its cell")
        return precision(name)
    if cell == "fp8":
        detail = _recipe_of(s.text(*RECIPE_SETTINGS).replace("(current scaling not stated)", ""))
        cell = detail if detail.startswith("fp8") else cell
    try:
        return precision(cell)
    except JobError:
        nearest = _recipe_of(cell) or "bf16"
        s.assumed.append(f"precision {cell!r} is read as {nearest}")
        return precision(nearest)


def _recipe_of(text: str) -> str:
    plain = re.sub(r"[-\s]", "_", text)
    return next((name for words, name in RECIPES if re.search(words, plain)), "")


def _recipe_of_switches(s: Settings) -> str:
    """Return the recipe that Megatron-LM's switches choose; 16 bit without any."""
    if s.find("fp4_format") is not None:
        return "nvfp4"
    if s.find("fp8_format", "fp8") is not None or s.flag("float8", default=False):
        return "fp8"
    return "fp16" if s.flag("fp16", default=False) else "bf16"


def _reduces_in_16_bit(s: Settings, framework: Framework) -> bool:
    if s.flag("grad_reduce_in_bf16", default=False):
        return True
    if "16" in s.text("grad_reduce_dtype"):
        return True
    return not s.flag("grad_reduce_in_fp32", default=framework.reduces_in_fp32)


def _dtype_bytes(s: Settings, name: str, default: float) -> float:
    word = s.text(name)
    if word and word not in _BYTES:
        s.assumed.append(f"{name} = {word!r} is read as {default:g} bytes")
    return _BYTES.get(word, default)


def _composer(s: Settings) -> dict[str, float]:
    """Composer's mixed precision: PURE reduces gradients in 16 bit, DEFAULT in fp32."""
    pure = s.text("fsdp_mixed_precision", default="pure") == "pure"
    return {
        "master_bytes": 4.0,
        "grad_bytes": 4.0,
        "grad_reduce_bytes": 2.0 if pure else 4.0,
    }
