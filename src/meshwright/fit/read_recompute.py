"""Settings of a measured run -> what it recomputes, in each framework's words."""

from __future__ import annotations

import re
from dataclasses import dataclass

from meshwright.fit.framework import Framework
from meshwright.fit.settings import NO, NOT_STATED, YES, Settings
from meshwright.parallel.layout import Recompute

CHECKPOINTING = (
    "gradient_checkpointing",
    "activation_checkpointing",
    "checkpoint_activations",
    "fsdp_activation_checkpointing",
    "recompute_activations_full",
)
"""Switches that other frameworks than Megatron have for recomputing whole layers."""

WHOLE = ("full", "ac", "checkpointing", "activation checkpointing", "gradient checkpointing")

MODULES = {m.name: m for m in Recompute if 0 < m < Recompute.full}
NEAREST_MODULE = {
    **dict.fromkeys(("attn", "attention", "self_attention", "core_attention"), "core_attn"),
    **dict.fromkeys(("norm", "rmsnorm", "layer_norm", "input_layernorm"), "layernorm"),
    **dict.fromkeys(("ffn", "feed_forward"), "mlp"),
    **dict.fromkeys(("experts", "moe_layer"), "moe"),
    "shared_expert": "shared_experts",
    "mla": "mla_up_proj",
}


@dataclass(frozen=True)
class Recomputation:
    """What is dropped and computed again; ``num_layers`` of a method, 0 where it has none.

    ``by_op``: torchtitan's selective checkpointing by op, which keeps every second matmul.
    """

    modules: Recompute = Recompute.none
    num_layers: int = 0
    by_op: bool = False


def read_recompute(s: Settings, framework: Framework, layers_per_stage: int) -> Recomputation:
    """Return what a run recomputes. Unknown words are not priced and are listed."""
    text = re.sub(r"\s+", " ", s.cell("recompute").lower().replace("-", "_"))
    if text in NOT_STATED and text != "none":
        text = _from_settings(s, framework)
    kind, _, detail = text.partition(":")
    every = re.search(r"every (\d+)(?:nd|rd|th)? ?layer|layer.*every (\d+)", text)
    if every is None and kind == "selective" and framework.name == "torchtitan":
        every = re.fullmatch(r"(\d+)()", detail)
    if every is not None:
        share = max(int(every[1] or every[2]), 1)
        return _block(max(layers_per_stage // share, 1))
    if text in NO:
        return Recomputation()
    if text in YES or text in WHOLE or re.match(r"full|uniform|block", text):
        return _whole_layers(s, text)
    if kind == "selective":
        return _selective(s, framework, detail)
    names = _names(text)
    if any(name in MODULES or name in NEAREST_MODULE for name in names):
        return Recomputation(_modules(s, names))
    s.assumed.append(f"recompute {text!r} is read as none")
    return Recomputation()


def _block(num_layers: int) -> Recomputation:
    return Recomputation(Recompute.full | Recompute.block, num_layers)


def _whole_layers(s: Settings, text: str) -> Recomputation:
    """Return the recomputation of ``full``, ``full:block:5``, ``uniform:1``, ``full (uniform)``."""
    if not text.startswith(("full", "uniform", "block")):
        s.assumed.append(f"recompute {text!r} is read as full")
    count = re.search(r"\d+", text)
    number = min(int(count[0][:6]), 2**16) if count and not text.isdigit() else 0
    if "block" in text and number:
        return _block(number)
    return Recomputation(Recompute.full, number)


def _selective(s: Settings, framework: Framework, detail: str) -> Recomputation:
    names = _names(detail.partition("(")[0])
    if framework.name == "torchtitan" and not names:
        names = ["op"]
    if "op" in names:
        return Recomputation(_modules(s, [n for n in names if n != "op"]), by_op=True)
    return Recomputation(_modules(s, names or ["core_attn"]))


def _from_settings(s: Settings, framework: Framework) -> str:
    kind = s.text("recompute_granularity", "activations_checkpoint_granularity")
    kind = kind or s.text("activation_checkpoint.mode")
    if kind == "full":
        method = s.text("recompute_method", "activations_checkpoint_method")
        number = s.whole("recompute_num_layers", "activations_checkpoint_num_layers")
        return f"full:{method}:{number}" if method and number else "full"
    if kind == "selective":
        names = s.items("recompute_modules") or s.items("activation_checkpoint.selective_ac_option")
        return "selective:" + "+".join(names) if names else "selective"
    if s.flag("recompute_activations", default=False):
        return "selective:core_attn"
    if s.flag(*CHECKPOINTING, default=False):
        return "full"
    if s.flag("activation_checkpointing_in_recipe_at_main", default=False) and _is_parallel(s):
        s.assumed.append("recompute = full: not stated, as in a later recipe")
        return "full"
    if not kind:
        s.assumed.append(f"recompute = {framework.recompute}: not stated, as {framework.name} does")
        return framework.recompute
    if kind not in NO:
        s.assumed.append(f"recomputing {kind!r} is not known and not priced")
    return "none"


def _is_parallel(s: Settings) -> bool:
    """Return whether a run has several GPUs: Automodel's manager of them is what checkpoints."""
    return (s.number("n_gpus") or 2) > 1


def _names(text: str) -> list[str]:
    return re.findall(r"[a-z0-9_]+", text)


def _modules(s: Settings, names: list[str]) -> Recompute:
    flags = Recompute.none
    for name in names:
        known = MODULES.get(name) or MODULES.get(NEAREST_MODULE.get(name, ""))
        if known is not None:
            flags |= known
        else:
            s.assumed.append(f"recomputing {name!r} is not known and not priced")
    return flags
