"""What a layout makes of a model and a batch: stages, actions, holders of the embedding."""

from __future__ import annotations

from meshwright.parallel.layout import Layout, Pipeline
from meshwright.parallel.pipeline import Schedule, build_schedule
from meshwright.parallel.placement import Placement, place_by
from meshwright.runtime.shape import ModelShape


def placement_of(shape: ModelShape, x: Layout[int]) -> Placement:
    """Return what every pipeline stage holds."""
    return place_by(x, shape.num_layers, shape.mtp_layers)


def schedule_of(x: Layout[int], gbs: int) -> Schedule:
    """Return the order of actions of every pipeline rank."""
    microbatches = gbs // (x.dp * x.mbs)
    return build_schedule(Pipeline(x.schedule), x.pp, x.vpp, microbatches, x.microbatch_group_size)


def table_ranks(shape: ModelShape, placed: Placement) -> list[int]:
    """Return the pipeline ranks that hold the token embedding: its own, and where it is reused."""
    stages = {placed.embedding_stage}
    if shape.tie_word_embeddings:
        stages.add(placed.loss_stage)
    stages |= {stage for stage, count in enumerate(placed.mtp_layers) if count}
    return sorted({placed.rank_of_stage[stage] for stage in stages})


def streams_of(placed: Placement) -> tuple[int, ...]:
    """Return how many hidden states enter every stage side by side.

    One; behind a stage that computes prediction depths for a later loss, one more for each.
    """
    found = [1]
    for stage, depths in enumerate(placed.mtp_layers):
        found.append(found[-1] + (depths if stage != placed.loss_stage else 0))
    return tuple(found)
