"""What is wrong with a launch before it starts: the framework's own rules, then the layout's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from meshwright.checks import Case, all_checks, judge_one
from meshwright.errors import LaunchError, MeshwrightError
from meshwright.findings import Finding, Severity
from meshwright.frameworks.advice import advice
from meshwright.frameworks.launch import Launch
from meshwright.frameworks.launch_findings import (
    JUDGES_ITSELF,
    evaluation,
    fragmentation,
    idle,
    other_size,
    told,
)
from meshwright.frameworks.read import read_launch
from meshwright.frameworks.rl_memory import judge_memory
from meshwright.frameworks.saved import launch_of, load_saved
from meshwright.parallel.layout import Layout, row, table, to_dict

if TYPE_CHECKING:
    from meshwright.cost.detail import Estimate
    from meshwright.describe.cluster import Cluster
    from meshwright.describe.job import Job
    from meshwright.describe.model import Model
    from meshwright.plan_document import Saved

_ORDER: Final[dict[Severity, int]] = {"error": 0, "warning": 1, "note": 2}


@dataclass(frozen=True, kw_only=True)
class CheckResult:
    """What is known of a launch: findings (errors first), layout, model, job and price.

    ``layout`` is None when the settings make none. ``estimate`` is None when a cluster, the model
    or the job is not known or the layout is not legal; ``unpriced`` then says which.
    """

    launch: Launch
    findings: list[Finding]
    layout: Layout[int] | None = None
    model: Model | None = None
    job: Job | None = None
    cluster: Cluster | None = None
    estimate: Estimate | None = None
    unpriced: str = ""
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
        else:
            out["unpriced"] = self.unpriced
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
    """Check a launch: a file, or the words of a command; or a plan document.

    ``cluster`` ("64xH100") adds topology, memory and time; its GPUs are the world where the launch
    does not state one. Raises ``MeshwrightError`` when the input cannot be read at all.
    """
    from meshwright.describe.cluster import load_cluster

    machine = None if cluster is None else load_cluster(cluster)
    saved = load_saved(source)
    if saved is not None:
        return _check_saved(saved, str(source), gpus, machine)
    env = {**_facts_of(machine), **(env or {})}
    launch = read_launch(source, gpus=gpus, framework=framework, env=env)
    if machine is not None and gpus is None and launch.gpus is None:
        launch = read_launch(source, gpus=machine.num_gpus, framework=framework, env=env)
    if machine is not None:
        return check_launch_read(launch, machine)
    asked_for = launch.cluster()
    facts = {**_facts_of(asked_for), **env}
    if facts != env:
        launch = read_launch(source, gpus=gpus, framework=framework, env=facts)
    elif _CAPABILITY not in env and any(f.severity == "error" for f in launch.findings):
        newer = read_launch(source, gpus=gpus, framework=framework, env={**env, **_BLACKWELL})
        launch = replace(launch, findings=_on_some_gpu(launch.findings, newer.findings))
    return check_launch_read(launch, asked_for)


_CAPABILITY: Final = "site.device_capability"
_BLACKWELL: Final = {_CAPABILITY: [10, 0]}


def _on_some_gpu(older: Iterable[Finding], newer: Iterable[Finding]) -> tuple[Finding, ...]:
    """Return the findings of Hopper where the GPU is not known: what Blackwell takes says so."""
    on_both = {f.id for f in newer if f.severity == "error"}
    unknown = "Which GPU it runs on is not known: Blackwell would start, --cluster decides."
    return tuple(
        replace(f, message=f"{f.message} {unknown}")
        if f.severity == "error" and f.id not in on_both
        else f
        for f in older
    )


def _facts_of(machine: Cluster | None) -> dict[str, object]:
    """Return what rules ask of a machine: the compute capability of its GPU, if it has one."""
    if machine is None:
        return {}
    major, dot, minor = machine.gpu.compute_capability.partition(".")
    if not (dot and major.isdecimal() and minor.isdecimal()):
        return {}
    return {_CAPABILITY: [int(major), int(minor)]}


def check_launch_read(launch: Launch, cluster: Cluster | None = None) -> CheckResult:
    """Check a launch that was read already."""
    findings = [_weighed(f, launch) for f in launch.findings]
    stopped = any(f.severity == "error" for f in findings)
    layout, problem = _try(launch.layout)
    model, shape_problem = _try(launch.model)
    job, job_problem = _try(lambda: launch.job(layout))
    if not stopped:
        # What a framework's own examination lets pass starts; that we cannot price it is a note.
        weight: Severity = "note" if launch.framework in JUDGES_ITSELF else "error"
        findings += [_finding(p, weight) for p in (problem, shape_problem) if p is not None]
    findings += told(launch)
    if layout is not None and model is not None and job is not None:
        return _judge(launch, findings, layout, model, job, cluster)
    return CheckResult(
        launch=launch,
        findings=sorted(findings, key=_rank),
        layout=layout,
        model=model,
        job=job,
        cluster=cluster,
        unpriced=_unknown(problem, shape_problem or job_problem),
        unread=launch.unread,
    )


def _check_saved(
    saved: Saved, origin: str, gpus: int | None, cluster: Cluster | None
) -> CheckResult:
    world = saved.layout.world_size
    if gpus not in (None, world):
        rule = f"The plan is for {world} GPUs."
        raise LaunchError("gpus", gpus, rule, "Plan anew for another number of them.")
    launch = launch_of(saved, origin)
    return _judge(launch, [], saved.layout, saved.model, saved.job, cluster or saved.cluster)


def _judge(
    launch: Launch,
    findings: list[Finding],
    layout: Layout[int],
    model: Model,
    job: Job,
    cluster: Cluster | None,
) -> CheckResult:
    """Return what the rules of layouts add to ``findings``, and the price."""
    stopped = any(f.severity == "error" for f in findings)
    fits = cluster is None or cluster.num_gpus == layout.world_size
    findings = findings + idle(findings, layout, launch)
    findings += advice(launch, model, job, layout, cluster if fits else None)
    case = Case(model=model, job=job, x=table([layout]), cluster=cluster if fits else None)
    heard = judge_one(case)
    judged = _new(findings, heard, launch)
    estimate, unpriced = _price(case, heard if stopped else judged)
    if estimate is not None:
        judged = _new(findings, _judged_again(case, estimate), launch)
        judged += [
            *judge_memory(launch, model, job, layout, estimate),
            *evaluation(launch, layout, estimate),
            *fragmentation(launch, estimate),
        ]
    findings += judged
    if cluster is not None and not fits:
        findings.append(other_size(cluster, layout))
        unpriced = findings[-1].rule
    return CheckResult(
        launch=launch,
        findings=sorted((f for f in findings if not _is_idle(f, launch)), key=_rank),
        layout=layout,
        model=model,
        job=job,
        cluster=cluster,
        estimate=estimate,
        unpriced=unpriced,
        unread=launch.unread,
    )


def _rank(finding: Finding) -> int:
    return _ORDER[finding.severity]


def _is_idle(finding: Finding, launch: Launch) -> bool:
    """Say whether a note is about a default that does nothing in this launch."""
    words = launch.words
    if finding.severity != "note":
        return False
    if finding.id.endswith("-etp_default"):
        return not words.get("num_moe_experts")
    chunks = words.get("virtual_pipeline_model_parallel_size")
    return finding.id == "MLM-MPC-group_default" and chunks in (None, 1)


def _unknown(layout: MeshwrightError | None, other: MeshwrightError | None) -> str:
    """Return why a launch cannot be priced: what of it is not known."""
    problem = layout or other
    if problem is not None:
        return str(problem)
    return "The launch neither names a known model nor gives its shape."


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


def _price(case: Case, judged: Iterable[Finding]) -> tuple[Estimate | None, str]:
    """Return the price, or why there is none: what rules of the layout forbid is not priced.

    What the framework refuses for other reasons (an environment variable, a file) is priced all the
    same: memory and time are worth knowing when that is mended.
    """
    illegal = [f for f in judged if f.severity == "error"]
    if illegal:
        return None, illegal[0].message
    if case.cluster is None:
        return None, "On which GPUs it runs is not known: give --cluster."
    from meshwright.cost.detail import estimate

    try:
        return estimate(case.model, case.cluster, case.job, row(case.x, 0)), ""
    except MeshwrightError as error:
        return None, str(error)


def _judged_again(case: Case, price: Estimate) -> list[Finding]:
    """Return what the rules say when they know the peak."""
    peak = np.array([price.peak_bytes])
    return judge_one(replace(case, peak_bytes=peak, capacity_bytes=price.capacity_bytes))


def _new(said: Iterable[Finding], judged: Iterable[Finding], launch: Launch) -> list[Finding]:
    """Return what the rules add; a framework that asked its own rules is not asked again.

    What a framework lets pass and only a library beneath it refuses is a warning there.
    """
    ids = {f.id for f in said}
    own = launch.framework in JUDGES_ITSELF
    beneath = {c.id for c in all_checks() if c.library} if own else set[str]()
    return [
        replace(f, severity="warning") if f.id in beneath else f
        for f in judged
        if f.id not in ids
        and f.id not in _ELSEWHERE.get(launch.framework, ())
        and not (own and f.severity == "error" and f.id.startswith("MLM-"))
        and not (f.field == _CONNECTIONS and _connections_known(f, launch))
    ]


_ELSEWHERE: Final = {
    "skyrl": ("MB-CFG-pad_fixed", "MLM-NMB-gbs_div"),
    "verl": ("MB-CFG-pad_fixed",),
}
"""Rules of other frameworks' data paths: these two exchange sequences of any length, and SkyRL
rounds samples down to its ranks; its own rules judge the batch."""

_CONNECTIONS: Final = "env.CUDA_DEVICE_MAX_CONNECTIONS"


def _connections_known(finding: Finding, launch: Launch) -> bool:
    """Say whether the launch itself answers what a rule asks of the environment.

    Megatron's own rules look at it; torchtitan's overlap wants many connections, never one.
    """
    value = launch.env.get("CUDA_DEVICE_MAX_CONNECTIONS")
    if finding.severity == "warning":
        return launch.framework == "torchtitan"
    if finding.id == "MLM-ARG-conn":
        return launch.framework in (*JUDGES_ITSELF, "torchtitan") or value == "1"
    return value != "1"


__all__ = ["CheckResult", "check", "check_launch_read", "grids"]
