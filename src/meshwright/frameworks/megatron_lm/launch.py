"""A Megatron-LM command line, examined: what it becomes, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from meshwright.findings import Finding
from meshwright.frameworks.megatron_lm import (
    attention,
    batch,
    cuda_graphs,
    expert_communication,
    hybrid_pattern,
    model,
    moe,
    parallel,
    pipeline,
    pipeline_layout,
    precision,
    recompute,
    sequence,
    sharding,
    training,
    weight_shards,
)
from meshwright.frameworks.megatron_lm.arguments import (
    UnusableArgument,
    by_name,
    defaults,
    parse,
)
from meshwright.frameworks.megatron_lm.rules import (
    Rule,
    Settings,
    Spelling,
    examine,
    in_order,
)
from meshwright.frameworks.site import Site, site_of

TOPICS = (
    parallel,
    weight_shards,
    batch,
    pipeline,
    pipeline_layout,
    hybrid_pattern,
    sharding,
    precision,
    model,
    attention,
    sequence,
    moe,
    expert_communication,
    recompute,
    cuda_graphs,
    training,
)

STAGES = (
    "validate_args",
    "num_microbatches",
    "config_from_args",
    "transformer_config",
    "ddp_config",
    "optimizer_config",
    "parallel_state",
    "layer_placement",
    "schedule",
    "layer_spec",
    "sp_shape",
    "moe_dispatcher",
    "moe_forward",
    "module_build",
    "fsdp_wrap",
)
"""What happens to a command line once it is parsed, in order; each stage asks its own rules."""

NOT_ON_THE_COMMAND_LINE: dict[str, Any] = {
    "cpu_offloading": False,
    "data_parallel_size": None,
    "expert_gtp_weight_remat_size": 1,
    "batch_p2p_comm": True,
    "gtp_weight_remat_size": 1,
    "mtp_standalone": False,
    "variable_seq_lengths": False,
    "moe_router_topk_limited_devices": None,
    "virtual_pipeline_model_parallel_size": None,
}
"""Settings that Megatron-LM only derives."""


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """A launch as the framework ends up seeing it.

    ``values`` holds every setting; ``sources`` says where each comes from: ``flag``, ``default``,
    ``derived`` or the id of the rule that changed it. ``changes`` maps a setting that the
    framework overwrote to (before, after). ``findings``: errors first.
    """

    values: dict[str, Any]
    sources: dict[str, str]
    changes: dict[str, tuple[object, object]]
    findings: list[Finding] = field(default_factory=list[Finding])

    @property
    def accepted(self) -> bool:
        """Whether the framework would start training."""
        return not any(f.severity == "error" for f in self.findings)


@cache
def rules() -> tuple[Rule, ...]:
    """Return every rule in the order in which Megatron-LM asks."""
    return in_order(STAGES, *(topic.RULES for topic in TOPICS))


class CommandLine:
    """How settings are written as Megatron-LM flags."""

    def name(self, setting: str) -> str:
        """Return the flag of a setting, or its name when it has none."""
        argument = by_name().get(_FLAG_OF.get(setting, setting))
        return argument.flags[0] if argument is not None else setting

    def write(self, setting: str, value: str | None) -> str:
        """Return the flag with its value; a switch that is to be off is ``no --flag``."""
        argument = by_name().get(_FLAG_OF.get(setting, setting))
        if argument is None:
            return setting if value is None else f"{setting}={value}"
        flag = argument.flags[0]
        if argument.action == "store":
            return flag if value is None else f"{flag} {value}"
        turned_on = (value or "true") == "true"
        given = turned_on == (argument.action != "off") or value is None
        return flag if given else f"no {flag}"


_FLAG_OF = {"virtual_pipeline_model_parallel_size": "num_virtual_stages_per_pipeline_rank"}


def resolve(argv: Sequence[str], gpus: int, env: Mapping[str, object] | None = None) -> Resolved:
    """Return what Megatron-LM makes of the flags ``argv`` on ``gpus`` ranks.

    ``env`` holds environment variables and what is known of the machine (``site_of``).
    Whatever is wrong with ``argv`` is a finding.
    """
    base = defaults() | NOT_ON_THE_COMMAND_LINE
    site = site_of(env)
    try:
        given = parse(argv)
    except UnusableArgument as refused:
        return refused_launch(base, refused, "MLM-ARGPARSE")
    return examined(base, given, rules(), CommandLine(), site, gpus)


def examined(
    base: Mapping[str, Any],
    given: Mapping[str, Any],
    rules: Sequence[Rule],
    spelling: Spelling,
    site: Site,
    gpus: int,
) -> Resolved:
    """Return what becomes of the settings ``given`` above ``base`` when the rules are asked."""
    values = {**base, **given}
    settings = Settings(values, site=site, world_size=gpus, given=given)
    seen = examine(rules, settings, spelling)
    sources = dict.fromkeys(base, "default") | dict.fromkeys(given, "flag")
    return Resolved(
        values=settings.values(),
        sources=sources | seen.sources,
        changes=seen.changes,
        findings=seen.findings,
    )


def refused_launch(base: Mapping[str, Any], refused: UnusableArgument, name: str) -> Resolved:
    """Return a launch whose arguments cannot be read at all: one finding, called ``name``."""
    finding = Finding(
        id=name,
        severity="error",
        field=refused.flag or "argv",
        value=refused.value,
        rule=refused.rule,
        remedy=refused.remedy,
        message=f"{refused.rule} {refused.remedy}".strip(),
    )
    sources = dict.fromkeys(base, "default")
    return Resolved(values=dict(base), sources=sources, changes={}, findings=[finding])


def check(argv: Sequence[str], gpus: int, env: Mapping[str, object] | None = None) -> list[Finding]:
    """Return what is wrong with a Megatron-LM launch, what it would stop at first."""
    return resolve(argv, gpus, env).findings
