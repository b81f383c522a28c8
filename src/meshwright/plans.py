"""The plan: one layout with its price, its findings and the reasons it was chosen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from meshwright.checks import Case, judge_one
from meshwright.cost.detail import TIME_TERMS, Estimate, estimate
from meshwright.cost.step import MEMORY_TERMS
from meshwright.describe.cluster import Cluster, build_cluster
from meshwright.describe.job import Job
from meshwright.describe.model import Model
from meshwright.errors import LayoutError
from meshwright.findings import Finding
from meshwright.parallel.layout import Layout, table, to_dict, to_text
from meshwright.search import Found, Progress, Ranked, Refuses, Space, search
from meshwright.starting_points import layouts
from meshwright.units import format_bytes, format_s

LARGEST_CLUSTER = 65_536
"""GPUs up to which a smallest working cluster is looked for."""


CLOSE_FRACTION = 0.002
"""Step times nearer than this are called equal in words; their order stays exact."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """One layout of a job on a cluster: its price, what the rules say of it, and why it was chosen.

    ``difference`` compares two.
    """

    model: Model
    cluster: Cluster
    job: Job
    layout: Layout[int]
    estimate: Estimate
    findings: list[Finding]
    why: list[str] = field(default_factory=list[str])

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object of the command line."""
        return {
            "layout": to_dict(self.layout),
            "estimate": self.estimate.to_dict(),
            "findings": [f.to_dict() for f in self.findings],
            "why": self.why,
        }


@dataclass(frozen=True, kw_only=True)
class StartingPlan:
    """What a guide would start with, priced as any layout is."""

    name: str
    source: str
    plan: Plan

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object of the command line."""
        return {"name": self.name, "source": self.source, **self.plan.to_dict()}


@dataclass(frozen=True, kw_only=True)
class Plans:
    """The answer of ``plan``: the best layouts in order, or what is closest when nothing fits.

    ``pareto`` is the front of peak memory against step time. ``smallest_cluster`` is a plan on the
    smallest cluster of the same GPUs on which something fits.
    """

    found: Found
    plans: list[Plan]
    pareto: list[Ranked]
    starting_points: list[StartingPlan]
    closest: Plan | None = None
    smallest_cluster: Plan | None = None

    @property
    def missing_bytes(self) -> float:
        """What the closest layout needs more than a rank may hold; 0 when something fits."""
        if self.closest is None:
            return 0.0
        return max(self.closest.estimate.peak_bytes - self.found.limit_bytes, 0.0)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object of the command line."""
        out: dict[str, Any] = {
            "searched": {
                "candidates": self.found.candidates,
                "legal": self.found.legal,
                "fit": self.found.fit,
                "simulated": self.found.simulated,
                "seconds": self.found.seconds,
            },
            "plans": [p.to_dict() for p in self.plans],
            "pareto": [
                {
                    "layout": to_dict(r.layout),
                    "step_time_s": r.step_time_s,
                    "peak_bytes": r.peak_bytes,
                }
                for r in self.pareto
            ],
            "starting_points": [s.to_dict() for s in self.starting_points],
        }
        if self.closest is not None:
            out["closest"] = {**self.closest.to_dict(), "missing_bytes": self.missing_bytes}
        if self.smallest_cluster is not None:
            out["smallest_cluster"] = {
                "gpus": self.smallest_cluster.layout.world_size,
                **self.smallest_cluster.to_dict(),
            }
        return out


def estimate_plan(model: Model, cluster: Cluster, job: Job, layout: Layout[int]) -> Plan:
    """Price one layout and judge it.

    Raises ``LayoutError`` with the first broken rule when the layout is illegal. A layout that
    does not fit is legal: its price says so.
    """
    x = table([layout])
    for finding in judge_one(Case(model=model, job=job, x=x, cluster=cluster)):
        if finding.severity == "error":
            raise LayoutError(finding.field, finding.value, finding.rule, finding.remedy)
    price = estimate(model, cluster, job, layout)
    priced = Case(
        model=model,
        job=job,
        x=x,
        cluster=cluster,
        peak_bytes=np.array([price.peak_bytes]),
        capacity_bytes=price.capacity_bytes,
    )
    return Plan(
        model=model,
        cluster=cluster,
        job=job,
        layout=layout,
        estimate=price,
        findings=judge_one(priced),
    )


def plan(
    model: Model,
    cluster: Cluster,
    job: Job,
    *,
    top: int = 5,
    space: Space | None = None,
    max_memory_bytes: float | None = None,
    with_pareto: bool = False,
    refuses: Refuses | None = None,
    progress: Progress | None = None,
) -> Plans:
    """Search for the ``top`` fastest layouts that fit and explain them.

    When nothing fits, ``plans`` is empty, ``closest`` is the layout that misses by least and
    ``smallest_cluster`` the smallest cluster of the same GPUs on which a layout fits.

    ``refuses`` says why a layout may be no answer, as that a framework cannot run it.

    Raises ``LayoutError`` when no layout at all is legal, or all that fit are refused.
    """
    found = search(
        model,
        cluster,
        job,
        top=top,
        space=space,
        max_memory_bytes=max_memory_bytes,
        with_pareto=with_pareto,
        refuses=refuses,
        progress=progress,
    )
    if found.closest is None:
        raise _nothing_legal(model, cluster, job, space)
    if found.refused is not None and not found.best:
        why = found.refused
        raise LayoutError(
            "plan",
            f"{found.fit:,} layouts that fit",
            f"The framework can run none of them, most often for {why.field}: {why.rule}",
            why.remedy or "Leave the framework out to see them, or loosen the limits.",
        )
    starts = _starting_plans(model, cluster, job)
    plans = [estimate_plan(model, cluster, job, r.layout) for r in found.best]
    if plans:
        plans[0] = replace(plans[0], why=_why(plans, starts, found))
        for i in range(1, len(plans)):
            plans[i] = replace(plans[i], why=[_gap("It takes", plans[i], plans[0], "the best")])
        return Plans(found=found, plans=plans, pareto=found.pareto, starting_points=starts)
    return Plans(
        found=found,
        plans=[],
        pareto=[],
        starting_points=starts,
        closest=estimate_plan(model, cluster, job, found.closest.layout),
        smallest_cluster=_smallest_cluster(model, cluster, job, space, max_memory_bytes, progress),
    )


def _nothing_legal(model: Model, cluster: Cluster, job: Job, space: Space | None) -> LayoutError:
    limits = ", ".join(f"{k} in {list(v)}" for k, v in (space or Space()).allowed.items())
    return LayoutError(
        "plan",
        limits or f"gbs = {job.gbs} on {cluster.num_gpus} GPUs",
        f"No layout is legal: the batch of {job.gbs} must be a multiple of mbs*dp, "
        f"dp*cp*tp*pp must be {cluster.num_gpus}, and tp must divide {model.num_heads} heads.",
        "Loosen the limits, or use a batch with more divisors.",
    )


def _smallest_cluster(
    model: Model,
    cluster: Cluster,
    job: Job,
    space: Space | None,
    max_memory_bytes: float | None,
    progress: Progress | None,
) -> Plan | None:
    """Return a plan on the first larger cluster on which something fits.

    Sizes tried: more of the GPUs of a node while the cluster is less than one, then 1 to 32 nodes,
    then 2^k and 3*2^k nodes, between which hardly any batch divides.
    """
    for larger in _larger_clusters(cluster):
        found = search(
            model,
            larger,
            job,
            top=1,
            space=space,
            max_memory_bytes=max_memory_bytes,
            progress=progress,
        )
        if found.best:
            return estimate_plan(model, larger, job, found.best[0].layout)
    return None


def _larger_clusters(cluster: Cluster) -> Iterator[Cluster]:
    usual = build_cluster(cluster.gpu.name, 1024)
    node = cluster.gpus_per_node
    if cluster.num_nodes == 1 and cluster.name == f"{cluster.num_gpus}x{cluster.gpu.name}":
        # Fewer GPUs than the usual node are taken as part of one.
        node = max(node, usual.gpus_per_node)
        for gpus in (2**k for k in range(7)):
            if cluster.num_gpus < gpus < node:
                yield build_cluster(cluster.gpu.name, gpus)
    for nodes in sorted(
        {*range(1, 33), *(2**k for k in range(17)), *(3 * 2**k for k in range(16))}
    ):
        gpus = nodes * node
        if cluster.num_gpus < gpus <= LARGEST_CLUSTER:
            yield with_gpus(cluster, gpus, node)


def with_gpus(cluster: Cluster, num_gpus: int, gpus_per_node: int | None = None) -> Cluster:
    """Return a cluster of the same GPUs and links with another number of GPUs."""
    gpus_per_node = gpus_per_node or min(cluster.gpus_per_node, num_gpus)
    usual = build_cluster(cluster.gpu.name, num_gpus, gpus_per_node=gpus_per_node)
    if gpus_per_node != cluster.gpus_per_node:
        return usual
    domain = max(cluster.nvlink_domain, usual.nvlink_domain if cluster.nvlink_domain > 1 else 1)
    return replace(cluster, num_gpus=num_gpus, nvlink_domain=domain, name=usual.name)


def _starting_plans(model: Model, cluster: Cluster, job: Job) -> list[StartingPlan]:

    out: dict[str, StartingPlan] = {}
    for point, layout in layouts(model, cluster, job):
        # Several guides may start with the same layout: the first to say so is named.
        if to_text(layout) not in out:
            priced = estimate_plan(model, cluster, job, layout)
            start = StartingPlan(name=point.name, source=point.source, plan=priced)
            out[to_text(layout)] = start
    return list(out.values())


def difference(a: Estimate, b: Estimate) -> dict[str, dict[str, float]]:
    """Return term by term what ``a`` costs more than ``b``: the terms add up to the gap.

    ``time`` in seconds sums to the gap of the step times, ``memory`` in bytes to that of the peaks.
    """
    return {
        "time": {k: a.time[k] - b.time[k] for k in TIME_TERMS},
        "memory": {k: a.memory[k] - b.memory[k] for k in MEMORY_TERMS},
    }


def _why(plans: Sequence[Plan], starts: Sequence[StartingPlan], found: Found) -> list[str]:
    best = plans[0]
    e = best.estimate
    why = [
        f"It is the fastest of {found.fit:,} layouts that fit, of {found.legal:,} legal ones.",
        f"Its fullest rank needs {format_bytes(e.peak_bytes)} of "
        f"{format_bytes(e.capacity_bytes)}: {e.margin_fraction:.0%} stays free.",
        _where_time_goes(e),
    ]
    close = [p for p in plans if _share(p, best) <= CLOSE_FRACTION]
    if len(close) > 1:
        why.append(
            f"Ranks 1-{len(close)} lie within {CLOSE_FRACTION:.1%}, closer than the model can "
            "tell: choose among them by margin and by what your framework runs."
        )
    others = [p for p in plans if p not in close and _degrees(p.layout) != _degrees(best.layout)]
    for other in others[:1]:
        label = f"The next best with other degrees ({_degrees(other.layout)}) takes"
        why.append(_gap(label, other, best, "it"))
    fitting = [s for s in starts if s.plan.estimate.margin_fraction >= 0]
    for start in sorted(fitting or starts, key=lambda s: s.plan.estimate.step_time_s)[:1]:
        label = f"The guides' start ({start.name}: {_degrees(start.plan.layout)}) takes"
        why.append(_gap(label, start.plan, best, "it") + _misfit(start.plan.estimate))
    return why


def _share(slower: Plan, faster: Plan) -> float:
    return slower.estimate.step_time_s / faster.estimate.step_time_s - 1.0


def _misfit(e: Estimate) -> str:
    if e.margin_fraction >= 0:
        return ""
    return f" It does not fit: {format_bytes(e.peak_bytes - e.capacity_bytes)} too much."


def _degrees(x: Layout[int]) -> str:
    shown = [f"tp={x.tp}", f"pp={x.pp}"]
    shown += [f"{k}={v}" for k, v in (("vpp", x.vpp), ("cp", x.cp), ("ep", x.ep)) if v > 1]
    return " ".join(shown)


def _where_time_goes(e: Estimate) -> str:
    parts = sorted(e.time.items(), key=lambda kv: -kv[1])[:3]
    shown = ", ".join(f"{k[:-2].replace('_', ' ')} {v / e.step_time_s:.0%}" for k, v in parts)
    return f"Where its step goes: {shown}."


def _gap(label: str, slower: Plan, faster: Plan, than: str) -> str:
    """Say how much longer a plan takes and which terms make the gap."""
    gap = slower.estimate.step_time_s - faster.estimate.step_time_s
    share = gap / faster.estimate.step_time_s
    terms = difference(slower.estimate, faster.estimate)["time"]
    large = [(k, v) for k, v in terms.items() if abs(v) >= 0.1 * max(abs(gap), 1e-9)]
    large.sort(key=lambda kv: -abs(kv[1]))
    shown = ", ".join(
        f"{k[:-2].replace('_', ' ')} {'+' if v > 0 else '-'}{format_s(abs(v))}"
        for k, v in large[:4]
    )
    longer = "longer" if gap >= 0 else "less"
    text = f"{label} {format_s(abs(gap))} ({abs(share):.1%}) {longer} than {than}"
    return f"{text}: {shown}." if shown else f"{text}."
