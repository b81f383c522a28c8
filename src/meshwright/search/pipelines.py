"""Which pipelines are tried: degrees, schedules, and where the layers sit."""

from __future__ import annotations

from collections.abc import Iterator

from meshwright.describe.cluster import Cluster
from meshwright.describe.model import Model
from meshwright.errors import divisors
from meshwright.parallel.layout import Pipeline
from meshwright.search.placements import PipelineChoice, Work, choice_for, worth_trying
from meshwright.search.space import Space

MOST_CHUNKS = 10
"""Model chunks of a pipeline rank that are tried: each costs messages, and the last ones gain
little."""


def pipelines(
    model: Model, cluster: Cluster, space: Space, works: list[Work]
) -> Iterator[PipelineChoice]:
    """Yield pipelines: degrees, schedule and placement.

    Layers that divide are split evenly (as are those that do with embedding and loss counted as
    layers). Where they do not, or where an uneven split makes the slowest rank faster for one of
    ``works``, the split that suits ``works`` is tried.
    """
    layers = model.num_layers
    degrees = [d for d in divisors(cluster.num_gpus) if d <= min(layers, 64)]
    for pp in space.choices("pp", degrees, cluster.num_gpus):
        chunks = space.choices("vpp", _chunks(layers, pp))
        for vpp in (v for v in chunks if pp * v <= layers):
            schedules = [Pipeline.one_f_one_b] if vpp == 1 else [Pipeline.interleaved]
            if pp > 1 and vpp == 1:
                schedules.append(Pipeline.zb_h1)
            if pp > 1 and vpp == 2:
                schedules.append(Pipeline.zb_v)
            for schedule in space.choices("schedule", schedules):
                yield from _placements(model, pp, vpp, Pipeline(schedule), works)


def _chunks(layers: int, pp: int) -> list[int]:
    if pp == 1:
        return [1]
    most = max(layers // pp, 1)
    if layers % pp == 0:
        return [v for v in divisors(most) if v <= MOST_CHUNKS]
    return [v for v in (1, 2, 3, 4, 6, 8) if v <= most]


def _placements(
    model: Model, pp: int, vpp: int, schedule: Pipeline, works: list[Work]
) -> Iterator[PipelineChoice]:
    layers, stages, mtp = model.num_layers, pp * vpp, len(model.mtp_layers)
    even = None
    if layers % stages == 0:
        even = (layers // stages,) * stages
    elif (layers + 2) % stages == 0:
        each = (layers + 2) // stages
        even = (each - 1, *(each,) * (stages - 2), each - 1)
    if even is not None:
        yield choice_for(even, pp, schedule, mtp)
    if stages == 1 or (mtp > 1 and stages == layers):
        return
    uneven = worth_trying(works, even, pp, stages, schedule)
    if uneven is not None:
        yield choice_for(uneven, pp, schedule, mtp)
