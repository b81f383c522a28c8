"""Megatron-Bridge overrides, examined: what they become, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from meshwright.findings import Finding
from meshwright.frameworks.megatron_bridge import (
    config,
    data,
    mixed_precision,
    overlap,
    sharding,
    training,
)
from meshwright.frameworks.megatron_bridge.settings import Overrides, defaults, parse
from meshwright.frameworks.megatron_lm import arguments
from meshwright.frameworks.megatron_lm import launch as megatron_lm
from meshwright.frameworks.megatron_lm.arguments import UnusableArgument
from meshwright.frameworks.megatron_lm.launch import (
    NOT_ON_THE_COMMAND_LINE,
    Resolved,
    examined,
    refused_launch,
)
from meshwright.frameworks.megatron_lm.rules import Rule, in_order
from meshwright.frameworks.site import site_of

STAGES = (
    "mixed_precision",
    "data_parallel",
    "comm_overlap",
    "dataset",
    "ddp_config",
    "optimizer_config",
    "cuda_graphs",
    "transformer_config",
    "validate",
    "num_microbatches",
    "parallel_state",
    "provider_checks",
    "layer_placement",
    "schedule",
    "layer_spec",
    "sp_shape",
    "moe_dispatcher",
    "moe_forward",
    "module_build",
    "fsdp_wrap",
)
"""What happens to a configuration, in order; each stage asks its own rules."""

_AFTER_START = ("layer_spec", "sp_shape", "moe_dispatcher", "moe_forward", "module_build")

TOPICS = (mixed_precision, overlap, sharding, config, data, training)

_CORE_BASE: dict[str, Any] = {
    "group_query_attention": True,
    "bias_swiglu_fusion": False,
    "mixed_precision": None,
    "dataset_kind": "mock",
    "mtp_hsm": False,
}


@cache
def rules() -> tuple[Rule, ...]:
    """Return every rule in the order in which Bridge asks: its own and Megatron Core's.

    What only fails once the model is built or fed is a warning here: Bridge itself accepts it.
    """
    core = [_softened(rule) for topic in megatron_lm.TOPICS for rule in topic.RULES]
    return in_order(STAGES, core, *(topic.RULES for topic in TOPICS))


def _softened(rule: Rule) -> Rule:
    late = rule.stage in _AFTER_START and rule.severity == "error"
    return replace(rule, severity="warning", final=False) if late else rule


@cache
def _base() -> dict[str, Any]:
    return arguments.defaults() | NOT_ON_THE_COMMAND_LINE | defaults() | _CORE_BASE


def resolve(argv: Sequence[str], gpus: int, env: Mapping[str, object] | None = None) -> Resolved:
    """Return what Megatron-Bridge makes of the overrides ``argv`` on ``gpus`` ranks.

    ``env`` holds environment variables and what is known of the machine (``site_of``).
    Whatever is wrong with ``argv`` is a finding.
    """
    base = _base()
    site = site_of(env)
    try:
        given = parse(argv)
    except UnusableArgument as refused:
        return refused_launch(base, refused, "MB-OVERRIDE")
    return examined(base, given, rules(), Overrides(), site, gpus)


def check(argv: Sequence[str], gpus: int, env: Mapping[str, object] | None = None) -> list[Finding]:
    """Return what is wrong with a Megatron-Bridge launch, what it would stop at first."""
    return resolve(argv, gpus, env).findings
