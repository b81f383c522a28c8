"""What is wrong with a launch before it starts: the framework's own rules, then the layout's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from meshwright.errors import MeshwrightError
from meshwright.findings import Finding, Severity
from meshwright.frameworks.launch import Launch
from meshwright.frameworks.read import read_launch
from meshwright.parallel.layout import Layout, Zero, table, to_dict
from meshwright.units import format_bytes

if TYPE_CHECKING:
    from meshwright.cost.detail import Estimate
    from meshwright.describe.cluster import Cluster
    from meshwright.describe.job import Job
    from meshwright.describe.model import Model

_ORDER: Final[dict[Severity, int]] = {"error": 0, "warning": 1, "note": 2}
_OWN_RULES: Final = frozenset({"megatron-lm", "megatron-bridge"})
"""Frameworks whose own examination is complete: Megatron's rules are not asked a second time."""


@dataclass(frozen=True, kw_only=True)
class CheckResult:
    """What is known of a launch: findings (errors first), layout, model, job and price.

    ``layout`` is None when the settings make none; ``estimate`` when a cluster, the model or the
    job is not known, or the launch would not start.
    """

    launch: Launch
    findings: list[Finding]
    layout: Layout[int] | None = None
    model: Model | None = None
    job: Job | None = None
    cluster: Cluster | None = None
    estimate: Estimate | None = None
    unread: tuple[str, ...] = field(default=())

    @property
    def ok(self) -> bool:
        """Whether nothing that was found would stop the launch."""
        return not any(f.severity == "error" for f in self.findings)

    @property
    def grids(self) -> dict[str, dict[str, int]] | None:
        """Return both process grids over the same ranks, outermost axis first."""
        return None if self.layout is None else grids(self.layout)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object of the command line."""
        out: dict[str, Any] = {
            "framework": self.launch.framework,
            "ok": self.ok,
            "findings": [f.to_dict() for f in self.findings],
            "layout": None if self.layout is None else to_dict(self.layout),
            "grids": self.grids,
            "launch": self.launch.to_dict(),
            "unread": list(self.unread),
        }
        if self.model is not None:
            out["model"] = self.model.name
        if self.estimate is not None:
            out["estimate"] = self.estimate.to_dict()
        return out


def grids(x: Layout[int]) -> dict[str, dict[str, int]]:
    """Return the dense and the expert grid: DP*CP*TP = EDP*EP*ETP ranks a pipeline stage."""
    return {
        "dense": {"pp": x.pp, "dp": x.dp, "cp": x.cp, "tp": x.tp},
        "expert": {"pp": x.pp, "edp": x.edp, "ep": x.ep, "etp": x.etp},
    }


def check(
    source: str | Path | Sequence[str],
    *,
    gpus: int | None = None,
    cluster: str | None = None,
    framework: str | None = None,
    env: Mapping[str, object] | None = None,
) -> CheckResult:
    """Check a launch: a file, or the words of a command.

    ``cluster`` ("64xH100") adds topology, memory and time; its GPUs are the world where the launch
    does not state one. Raises ``MeshwrightError`` when the input cannot be read at all.
    """
    from meshwright.describe.cluster import load_cluster

    machine = None if cluster is None else load_cluster(cluster)
    env = {**_facts_of(machine), **(env or {})}
    launch = read_launch(source, gpus=gpus, framework=framework, env=env)
    if machine is not None and gpus is None and launch.gpus is None:
        launch = read_launch(source, gpus=machine.num_gpus, framework=framework, env=env)
    return check_launch_read(launch, machine or launch.cluster())


def _facts_of(machine: Cluster | None) -> dict[str, object]:
    """Return what rules ask of a machine: the compute capability of its GPU, if it has one."""
    if machine is None:
        return {}
    major, dot, minor = machine.gpu.compute_capability.partition(".")
    if not (dot and major.isdecimal() and minor.isdecimal()):
        return {}
    return {"site.device_capability": [int(major), int(minor)]}


def check_launch_read(launch: Launch, cluster: Cluster | None = None) -> CheckResult:
    """Check a launch that was read already."""
    findings = [_weighed(f, launch) for f in launch.findings]
    stopped = any(f.severity == "error" for f in findings)
    layout, problem = _try(launch.layout)
    model, shape_problem = _try(launch.model)
    job, _ = _try(lambda: launch.job(layout))
    if not stopped:
        # What a framework's own examination lets pass starts; that we cannot price it is a note.
        weight: Severity = "note" if launch.framework in _OWN_RULES else "error"
        findings += [_finding(p, weight) for p in (problem, shape_problem) if p is not None]
    findings += _told(launch)
    estimate = None
    if layout is not None and model is not None and job is not None:
        findings += _idle(findings, layout, launch)
        fits = cluster is None or cluster.num_gpus == layout.world_size
        legal = not stopped and problem is None
        judged, estimate = _judge(model, job, layout, cluster if fits else None, legal)
        findings += _new(findings, judged, launch)
        findings += _rollout(launch, estimate)
        if cluster is not None and not fits:
            findings.append(_other_size(cluster, layout))
    findings.sort(key=lambda f: _ORDER[f.severity])
    return CheckResult(
        launch=launch,
        findings=findings,
        layout=layout,
        model=model,
        job=job,
        cluster=cluster,
        estimate=estimate,
        unread=launch.unread,
    )


def _weighed(finding: Finding, launch: Launch) -> Finding:
    """Return a silent default as a warning where it changes the experts' grid."""
    words = launch.words
    splits = bool(words.get("num_moe_experts")) and words.get("tensor_model_parallel_size") != 1
    if finding.severity == "note" and finding.id.endswith("-etp_default") and splits:
        return replace(finding, severity="warning")
    return finding


def _try(make: Any) -> tuple[Any, MeshwrightError | None]:
    try:
        return make(), None
    except MeshwrightError as error:
        return None, error


def _finding(error: MeshwrightError, severity: Severity) -> Finding:
    return Finding(
        id=f"unusable.{error.field.rpartition('.')[2]}",
        severity=severity,
        field=error.field,
        value=error.value,
        rule=error.rule,
        remedy=error.remedy,
        message=str(error),
    )


def _judge(
    model: Model, job: Job, x: Layout[int], cluster: Cluster | None, legal: bool
) -> tuple[list[Finding], Estimate | None]:
    """Return what the rules say of the layout, and its price when it would run."""
    from meshwright.checks import Case, judge_one

    case = Case(model=model, job=job, x=table([x]), cluster=cluster)
    judged = judge_one(case)
    if not legal or cluster is None or any(f.severity == "error" for f in judged):
        return judged, None
    import numpy as np

    from meshwright.cost.detail import estimate

    price = estimate(model, cluster, job, x)
    priced = replace(
        case, peak_bytes=np.array([price.peak_bytes]), capacity_bytes=price.capacity_bytes
    )
    return judge_one(priced), price


def _new(said: Iterable[Finding], judged: Iterable[Finding], launch: Launch) -> list[Finding]:
    """Return what the rules add; a framework that asked its own rules is not asked again."""
    ids = {f.id for f in said}
    own = launch.framework in _OWN_RULES
    return [
        replace(f, severity="warning") if own and f.id in _TRANSFORMER_ENGINE else f
        for f in judged
        if f.id not in ids
        and f.id not in _ELSEWHERE.get(launch.framework, ())
        and not (own and f.severity == "error" and f.id.startswith("MLM-"))
        and not (f.field == _CONNECTIONS and _connections_known(f, launch))
    ]


_ELSEWHERE: Final = {
    "skyrl": ("MB-CFG-pad_fixed",),
    "verl": ("MB-CFG-pad_fixed",),
}
"""Rules of other frameworks' data paths: these two exchange sequences of any length."""

_TRANSFORMER_ENGINE: Final = ("a2a_divides_heads", "ring_sees_whole_sequences")
"""What Megatron itself accepts and Transformer Engine refuses later, depending on its version."""

_CONNECTIONS: Final = "env.CUDA_DEVICE_MAX_CONNECTIONS"


def _connections_known(finding: Finding, launch: Launch) -> bool:
    """Say whether the launch itself answers what a rule asks of the environment.

    Megatron's own rules look at it; torchtitan's overlap wants many connections, never one.
    """
    value = launch.env.get("CUDA_DEVICE_MAX_CONNECTIONS")
    if finding.severity == "warning":
        return launch.framework == "torchtitan"
    if finding.id == "MLM-ARG-conn":
        return launch.framework in (*_OWN_RULES, "torchtitan") or value == "1"
    return value != "1"


def _note(
    name: str, field_name: str, value: object, rule: str, remedy: str, severity: Severity
) -> Finding:
    shown = "" if value is None else f" = {value}"
    return Finding(
        id=name,
        severity=severity,
        field=field_name,
        value=value,
        rule=rule,
        remedy=remedy,
        message=f"{field_name}{shown}: {rule} {remedy}",
    )


def _told(launch: Launch) -> list[Finding]:
    """Return what the launch does without saying so that no rule of its framework tells."""
    words = launch.words
    found: list[Finding] = []
    if launch.gpus is None:
        rule = "The launch does not say how many processes it starts; the smallest world is taken."
        found.append(_note("gpus_unknown", "gpus", None, rule, "Give --gpus.", "note"))
    found += _vocabulary(words)
    connections = launch.env.get("CUDA_DEVICE_MAX_CONNECTIONS")
    sharded = words.get("use_torch_fsdp2") or words.get("use_megatron_fsdp")
    if sharded and connections == "1" and launch.framework not in _OWN_RULES:
        rule = (
            "Fully sharded training overlaps gathers with compute over several queues; with one"
            " connection the overlap is lost without a message."
        )
        remedy = "Unset it, or use 16 or 32."
        name = "CUDA_DEVICE_MAX_CONNECTIONS"
        found.append(_note("MLM-ENV-fsdp", name, connections, rule, remedy, "warning"))
    if _is_unbalanced(words):
        rule = (
            "Nothing balances the experts: no auxiliary loss, no router bias, no capacity. Some"
            " ranks will get far more tokens than others, and all wait for them."
        )
        remedy = "Use an auxiliary loss coefficient of 0.01, or a router bias."
        value = words.get("moe_aux_loss_coeff")
        found.append(
            _note("experts_are_balanced", "moe_aux_loss_coeff", value, rule, remedy, "warning")
        )
    return found


def _rollout(launch: Launch, price: Estimate | None) -> list[Finding]:
    """Return a warning when generation and training on the same GPUs do not fit side by side."""
    fraction = launch.words.get("rollout_memory_fraction")
    if price is None or not isinstance(fraction, int | float) or not 0 < fraction <= 1:
        return []
    rest = (1 - fraction) * price.capacity_bytes
    if price.peak_bytes <= rest:
        return []
    rule = (
        f"Generation keeps {format_bytes(fraction * price.capacity_bytes)} of each GPU and leaves"
        f" {format_bytes(rest)}; training peaks at {format_bytes(price.peak_bytes)}. It fits only"
        " where the engine gives its memory back, and not while weights are synchronised."
    )
    remedy = "Lower the rollout's share, or split training further (ep, tp, pp, offload)."
    name = "rollout_and_training_share_a_gpu"
    return [_note(name, "rollout_memory_fraction", fraction, rule, remedy, "warning")]


def _vocabulary(words: Mapping[str, Any]) -> list[Finding]:
    """Return a finding when a vocabulary that is not padded does not split over TP."""
    size, tp = words.get("vocab_size"), words.get("tensor_model_parallel_size")
    if words.get("should_pad_vocab") is not False or not isinstance(size, int):
        return []
    if not isinstance(tp, int) or tp < 1 or size % tp == 0:
        return []
    rule = f"It is not padded and does not split over tp = {tp}."
    padded = -(-size // (128 * tp)) * 128 * tp
    remedy = f"Set should_pad_vocab=true, which makes it {padded}."
    return [_note("vocabulary_splits_over_tp", "model.vocab_size", size, rule, remedy, "error")]


def _is_unbalanced(words: Mapping[str, Any]) -> bool:
    """Say whether a launch that has experts states that nothing balances them."""
    kind, coefficient = words.get("moe_router_load_balancing_type"), words.get("moe_aux_loss_coeff")
    stated = kind == "none" or (kind is not None and not coefficient and kind != "sinkhorn")
    held = words.get("moe_router_enable_expert_bias") or words.get("moe_expert_capacity_factor")
    return bool(words.get("num_moe_experts")) and stated and not held


def _idle(said: Iterable[Finding], x: Layout[int], launch: Launch) -> list[Finding]:
    """Return what is asked for and does nothing in this layout."""
    if x.zero != Zero.optim or x.dp * x.cp > 1 or any("dist_opt" in f.id for f in said):
        return []
    shared = bool(launch.words.get("num_moe_experts")) and x.edp > 1
    if shared or not launch.words.get("use_distributed_optimizer"):
        return []
    rule = "With dp*cp = 1 there is nobody to share the optimizer with: every rank holds it whole."
    remedy = "Count it whole, or use more GPUs."
    name = "use_distributed_optimizer"
    return [_note("optimizer_is_not_shared", name, True, rule, remedy, "warning")]


def _other_size(cluster: Cluster, x: Layout[int]) -> Finding:
    rule = f"The launch starts {x.world_size} processes; the cluster has {cluster.num_gpus} GPUs."
    remedy = f"Start {cluster.num_gpus} processes, or check on {x.world_size} GPUs."
    severity: Severity = "error" if x.world_size > cluster.num_gpus else "warning"
    return _note("cluster_size", "gpus", x.world_size, rule, remedy, severity)


__all__ = ["CheckResult", "check", "check_launch_read", "grids"]
