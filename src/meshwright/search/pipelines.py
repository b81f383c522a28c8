"""Which pipelines are tried: degrees, schedules, and where the layers sit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from meshwright.describe.cluster import Cluster
from meshwright.describe.model import Model
from meshwright.errors import divisors
from meshwright.parallel.layout import Pipeline
from meshwright.parallel.placement import balanced_layout
from meshwright.search.space import Space

MOST_CHUNKS = 10
"""Model chunks of a pipeline rank that are tried: each costs messages, and the last ones gain
little."""


@dataclass(frozen=True)
class PipelineChoice:
    """Degrees, schedule and placement of a pipeline; ``account`` counts embedding and loss."""

    pp: int
    vpp: int
    schedule: Pipeline
    pipeline_layout: str | None
    account: int


def pipelines(model: Model, cluster: Cluster, space: Space) -> Iterator[PipelineChoice]:
    """Yield pipelines: degrees, schedule and a placement that splits the layers evenly.

    Layers that do not divide go by counting embedding and loss as layers where that divides, else
    by a balanced layout string.
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
                yield from _placements(model, pp, vpp, Pipeline(schedule), space)


def _chunks(layers: int, pp: int) -> list[int]:
    if pp == 1:
        return [1]
    most = max(layers // pp, 1)
    if layers % pp == 0:
        return [v for v in divisors(most) if v <= MOST_CHUNKS]
    return [v for v in (1, 2, 3, 4, 6, 8) if v <= most]


def _placements(
    model: Model, pp: int, vpp: int, schedule: Pipeline, space: Space
) -> Iterator[PipelineChoice]:
    layers, stages = model.num_layers, pp * vpp
    if layers % stages == 0:
        yield PipelineChoice(pp, vpp, schedule, None, 0)
    elif (layers + 2) % stages == 0:
        yield PipelineChoice(pp, vpp, schedule, None, 1)
    elif len(model.mtp_layers) <= 1 or stages < layers:
        text = balanced_layout(layers, stages, len(model.mtp_layers))
        yield PipelineChoice(pp, vpp, schedule, text, 0)
