"""One layout in full: every term of time and memory, and every pipeline rank.

The same formulas as the table's, not reduced to the slowest and fullest rank.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from meshwright.cost.compute import supported_dtype
from meshwright.cost.factors import Factors
from meshwright.cost.flops import model_flops_per_step
from meshwright.cost.peak import PHASES
from meshwright.cost.pricing import COMPUTE, CP, EP, TP
from meshwright.cost.stages import stages
from meshwright.cost.step import (
    MEMORY_TERMS,
    Group,
    Table,
    beside_pipeline_s,
    by_pipeline,
    memory_of_candidates,
    prepare,
    simulate_group,
)
from meshwright.describe.cluster import Cluster
from meshwright.describe.job import Job
from meshwright.describe.model import Model
from meshwright.parallel.layout import Layout, table

BAND_FRACTION = 0.10
"""Half-width of "borderline" around the capacity. Compared with it is the peak with the allocator's
spare blocks and what software holds. Of 63 runs with measured reserved or device memory 60 hold
less than 1/0.9 of that peak, so what is said to fit fits in 95 of 100 (docs/accuracy.md)."""

TIME_TERMS = (
    "compute_s",
    "recompute_s",
    "tp_comm_s",
    "cp_comm_s",
    "ep_comm_s",
    "pp_comm_s",
    "bubble_s",
    "dp_comm_s",
    "optimizer_s",
)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What one layout costs.

    ``time`` (s, exposed, of the slowest rank) sums to ``step_time_s``; ``memory`` (bytes, of the
    fullest rank at its peak) sums to ``peak_bytes``. ``stages`` has one entry a pipeline
    rank: the terms at its peak, and the peak of each phase (``forward``, ``backward``,
    ``optimizer``).
    ``mfu_fraction`` relates model FLOP/s to the dense peak of the precision that matmuls run in.
    """

    step_time_s: float
    tokens_per_s_per_gpu: float
    model_flops_per_s_per_gpu: float
    mfu_fraction: float
    time: dict[str, float]
    peak_bytes: float
    capacity_bytes: float
    memory: dict[str, float]
    stages: list[dict[str, Any]]
    assumed: list[str]

    @property
    def margin_fraction(self) -> float:
        """Share of the capacity that stays free; negative when it does not fit."""
        return (self.capacity_bytes - self.peak_bytes) / self.capacity_bytes

    @property
    def verdict(self) -> str:
        """``fits``, ``borderline`` (capacity within the model's error) or ``does not fit``."""
        if abs(self.margin_fraction) <= BAND_FRACTION:
            return "borderline"
        return "fits" if self.margin_fraction > 0 else "does not fit"

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object of the command line."""
        return {
            "step_time_s": self.step_time_s,
            "tokens_per_s_per_gpu": self.tokens_per_s_per_gpu,
            "model_flops_per_s_per_gpu": self.model_flops_per_s_per_gpu,
            "mfu_fraction": self.mfu_fraction,
            "time": self.time,
            "peak_bytes": self.peak_bytes,
            "capacity_bytes": self.capacity_bytes,
            "margin_fraction": self.margin_fraction,
            "fits": self.margin_fraction >= 0,
            "verdict": self.verdict,
            "memory": self.memory,
            "stages": self.stages,
            "assumed": self.assumed,
        }


def capacity_bytes(cluster: Cluster, job: Job) -> float:
    """Return what the card offers to the process, less what the user reserves."""
    return float(cluster.capacity_bytes) - job.reserved_bytes


def estimate(
    model: Model,
    cluster: Cluster,
    job: Job,
    layout: Layout[int],
    factors: Factors | None = None,
) -> Estimate:
    """Price one layout in full.

    Raises ``LayoutError`` when its layers cannot be placed or its batch does not divide.
    """
    t = prepare(model, cluster, job, table([layout]), factors)
    (pruned,) = by_pipeline(job, t.x, t.priced)
    group = replace(pruned, stages=stages(t.priced.facts, pruned.key, every_rank=True))
    time = _time(t, group)
    ranks = _ranks(t, group)
    fullest = max(ranks, key=lambda r: r["peak_bytes"])
    step_time_s = sum(time.values())
    gpus = layout.world_size
    flops_per_s = model_flops_per_step(model, job) / step_time_s / gpus
    peak = cluster.gpu.peak_flops_per_s
    return Estimate(
        step_time_s=step_time_s,
        tokens_per_s_per_gpu=job.tokens_per_step / step_time_s / gpus,
        model_flops_per_s_per_gpu=flops_per_s,
        mfu_fraction=flops_per_s / peak[matmul_dtype(cluster, job)],
        time=time,
        peak_bytes=fullest["peak_bytes"],
        capacity_bytes=capacity_bytes(cluster, job),
        memory={term: fullest[term] for term in MEMORY_TERMS},
        stages=ranks,
        assumed=[*model.assumed, *cluster.assumed, *job.assumed],
    )


def matmul_dtype(cluster: Cluster, job: Job) -> str:
    """Return the format that the job's matmuls run in on this card."""
    return supported_dtype(cluster.gpu, job.precision.matmul)


def _time(t: Table, g: Group) -> dict[str, float]:
    p, s, m = t.priced, g.stages, float(g.key.num_microbatches)
    # The same row twice: with messages between stages, and without.
    twice = replace(g, rows=np.repeat(g.rows, 2), slice_of=np.repeat(g.slice_of, 2))
    simulated = simulate_group(t, twice, t.message_s[g.rows] * np.array([1.0, 0.0]))
    slowest = int(np.argmax(simulated.busy_s[0]))
    both = (p.by_kind_forward + p.by_kind_backward)[g.slices[0]]
    work = m * np.einsum("k,kc->c", s.own[slowest], both)
    again = m * float(np.einsum("k,k->", s.own_reruns[slowest], p.reruns[g.slices[0]]))
    dp_s, optimizer_s = beside_pipeline_s(t, g)
    compute = float(work[COMPUTE])
    comm = {"tp_comm_s": TP, "cp_comm_s": CP, "ep_comm_s": EP}
    own = compute + again + sum(float(work[c]) for c in comm.values())
    whole, quiet = simulated.step_s.tolist()
    return {
        "compute_s": compute,
        "recompute_s": again,
        **{name: float(work[c]) for name, c in comm.items()},
        # A pipeline of one rank has no bubble; sums in another order differ in the last bit.
        "pp_comm_s": max(whole - quiet, 0.0),
        "bubble_s": max(quiet - own, 0.0),
        "dp_comm_s": float(dp_s[0]),
        "optimizer_s": float(optimizer_s[0]),
    }


def _ranks(t: Table, g: Group) -> list[dict[str, Any]]:
    fullest: dict[int, dict[str, Any]] = {}
    candidates = zip(g.stages.candidate_rank, memory_of_candidates(t, g), strict=True)
    for rank, columns in candidates:
        terms = {k: float(v[0]) for k, v in columns.items()}
        total = sum(terms.values())
        if rank not in fullest or total > fullest[rank]["peak_bytes"]:
            fullest[rank] = {"peak_bytes": total, **terms}
    for phase in PHASES:
        name = f"{phase}_peak_bytes"
        phases = zip(g.stages.candidate_rank, memory_of_candidates(t, g, phase), strict=True)
        for rank, columns in phases:
            total = sum(float(v[0]) for v in columns.values())
            fullest[rank][name] = max(fullest[rank].get(name, 0.0), total)
    placement = g.stages.placement
    layers = [0] * g.key.pp
    for stage, held in enumerate(placement.layers):
        layers[placement.rank_of_stage[stage]] += len(held)
    return [{"stage": rank, "layers": layers[rank], **fullest[rank]} for rank in range(g.key.pp)]
