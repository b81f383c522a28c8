"""When every action of a pipeline runs: what a picture of the schedule shows."""

from __future__ import annotations

from dataclasses import dataclass

from meshwright.cost.step import by_pipeline, prepare, stage_seconds
from meshwright.describe.cluster import Cluster
from meshwright.describe.job import Job
from meshwright.describe.model import Model
from meshwright.parallel.actions import Action, build_schedule
from meshwright.parallel.layout import Layout, Pipeline, table
from meshwright.parallel.pipeline import simulate


@dataclass(frozen=True)
class Ran:
    """One action on its pipeline rank: when it starts, and for how long it runs, in seconds."""

    rank: int
    action: Action
    start_s: float
    duration_s: float


def timeline(
    model: Model, cluster: Cluster, job: Job, layout: Layout[int], num_microbatches: int
) -> list[Ran]:
    """Return every action of a step that has so many micro-batches, rank by rank.

    Ref: as ``cost.step.simulate_group``, which prices whole steps. Left out: what comes after the
    pipeline, weight gradients of the head that wait for it, the exchange of gradients, the update.
    """
    t = prepare(model, cluster, job, table([layout]))
    (group,) = by_pipeline(job, t.x, t.priced)
    forward, backward, weight = stage_seconds(t, group)
    key = group.key
    schedule = build_schedule(
        Pipeline(key.schedule), key.pp, key.vpp, num_microbatches, key.microbatch_group_size
    )
    start_s = simulate(schedule, forward, backward, t.message_s, weight, starts=True).start_s
    assert start_s is not None
    seconds = {"F": forward, "B": backward, "I": backward - weight, "W": weight}
    return [
        Ran(rank, a, float(at), float(seconds[a.kind][0, schedule.stage(rank, a.chunk)]))
        for rank, actions in enumerate(schedule.ranks)
        for a, at in zip(actions, start_s[rank][0], strict=True)
    ]
