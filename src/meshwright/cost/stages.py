"""Which blocks each pipeline rank holds and runs: matrices from block costs to rank costs.

Everything here depends on the pipeline and the model's layers alone, so it is made once for all
rows that share them. [S] are virtual stages in model order, [P] pipeline ranks, [K] block kinds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from meshwright.cost.columns import Floats, Index
from meshwright.describe.model import Model
from meshwright.parallel.actions import schedule_module
from meshwright.parallel.layout import Pipeline
from meshwright.parallel.pipeline import bound_coefficients, held_microbatches
from meshwright.parallel.placement import Placement, place_by


@dataclass(frozen=True)
class PipelineKey:
    """What the rows of a group share: the shape of their pipeline."""

    schedule: int
    pp: int
    vpp: int
    num_microbatches: int
    microbatch_group_size: int
    first: int
    last: int
    account_for_embedding: int
    account_for_loss: int
    recompute_block: int
    recompute_num_layers: int
    pipeline_layout: str | None


PIPELINE_COLUMNS = (
    "schedule",
    "pp",
    "vpp",
    "microbatch_group_size",
    "first",
    "last",
    "account_for_embedding",
    "account_for_loss",
)


@dataclass(frozen=True)
class LayerFacts:
    """What placement needs of a model: hashable, small."""

    pattern: tuple[int, ...]
    num_layer_kinds: int
    num_mtp: int
    tied: bool

    @property
    def num_kinds(self) -> int:
        """K: layer kinds, embedding, head, MTP layers."""
        return self.num_layer_kinds + 2 + self.num_mtp


def layer_facts(model: Model) -> LayerFacts:
    """Return the facts of a model that placement needs."""
    return LayerFacts(
        pattern=model.layer_pattern,
        num_layer_kinds=len(model.layer_kinds),
        num_mtp=len(model.mtp_layers),
        tied=model.tie_word_embeddings,
    )


@dataclass(frozen=True)
class Stages:
    """Counts of blocks.

    ``runs`` [S, K]: blocks a virtual stage runs per micro-batch. ``reruns`` [S, K]: those of them
    that full recomputation runs again. ``own`` [P, K] and ``own_reruns`` [P, K]: the same by rank.
    ``params`` [P, K]: blocks whose weights a rank holds (a tied table is held at both ends).
    Memory candidates, one row for each combination of held micro-batches that could be the peak,
    [Q, K]: ``held`` micro-batches of what is kept of recomputable blocks, ``held_whole`` of blocks
    that full recomputation leaves whole, ``alive`` recomputed layers that are whole while they run
    backward (of one kind at a time),
    ``held_params`` and ``present`` of the candidate's rank ``candidate_rank`` [Q].
    ``dp_ranks`` are the ranks whose data parallelism or update could be the slowest.
    ``bound_*`` [R, K] and ``bound_p2p`` [R]: a lower bound of the pipeline time is the maximum over
    R of forward.f + reruns.r + backward.b + p2p * message.
    """

    placement: Placement
    runs: Floats
    reruns: Floats
    own: Floats
    own_reruns: Floats
    params: Floats
    held: Floats
    held_whole: Floats
    alive: Floats
    held_params: Floats
    present: Floats
    candidate_rank: tuple[int, ...]
    dp_ranks: tuple[int, ...]
    bound_forward: Floats
    bound_reruns: Floats
    bound_backward: Floats
    bound_p2p: Floats


@lru_cache(maxsize=8192)
def stages(facts: LayerFacts, key: PipelineKey, every_rank: bool = False) -> Stages:
    """Return the matrices of a pipeline; ``every_rank`` keeps memory candidates that cannot win.

    Raises ``LayoutError`` when the layers cannot be placed.
    """
    kind, m, group = Pipeline(key.schedule), key.num_microbatches, key.microbatch_group_size
    layers = _layers(facts, replace(key, num_microbatches=0, microbatch_group_size=0))
    # More micro-batches than these are never held, so their number does not matter beyond.
    enough = schedule_module(kind).enough_microbatches(key.pp, key.vpp, m, group)
    held = _held(facts, replace(key, num_microbatches=enough), every_rank)
    fwd, bwd, p2p = bound_coefficients(kind, key.pp, key.vpp, m)
    lines = np.concatenate(
        [
            np.einsum("rs,sk->rk", fwd, layers.runs),
            np.einsum("rs,sk->rk", bwd, layers.reruns),
            np.einsum("rs,sk->rk", bwd, layers.runs),
            p2p[:, None],
        ],
        axis=1,
    )
    lines = lines[_maximal(lines)]
    k = facts.num_kinds
    return Stages(
        placement=layers.placement,
        runs=layers.runs,
        reruns=layers.reruns,
        own=layers.own,
        own_reruns=layers.own_reruns,
        params=layers.params,
        held=held.held,
        held_whole=held.held_whole,
        alive=held.alive,
        held_params=layers.params[list(held.rank)],
        present=(layers.own[list(held.rank)] > 0).astype(np.float64),
        candidate_rank=held.rank,
        dp_ranks=layers.dp_ranks,
        bound_forward=lines[:, :k],
        bound_reruns=lines[:, k : 2 * k],
        bound_backward=lines[:, 2 * k : 3 * k],
        bound_p2p=lines[:, 3 * k],
    )


@dataclass(frozen=True)
class _Layers:
    """The part of ``Stages`` that no number of micro-batches changes."""

    placement: Placement
    runs: Floats
    reruns: Floats
    own: Floats
    own_reruns: Floats
    params: Floats
    dp_ranks: tuple[int, ...]


@lru_cache(maxsize=2048)
def _layers(facts: LayerFacts, key: PipelineKey) -> _Layers:
    placement = place_by(key, len(facts.pattern), facts.num_mtp)
    rank = np.asarray(placement.rank_of_stage)
    runs = _runs(facts, placement)
    reruns = _reruns(facts, runs, key)
    params = _params(facts, placement, runs, key.pp)
    own, own_reruns = _by_rank(runs, rank, key.pp), _by_rank(reruns, rank, key.pp)
    # Of ranks with equal work, the one with more weights to send is never faster.
    slow = _maximal(np.concatenate([params, own, -own, own_reruns, -own_reruns], axis=1))
    return _Layers(placement, runs, reruns, own, own_reruns, params, tuple(slow))


@dataclass(frozen=True)
class _Held:
    """The memory candidates of ``Stages``."""

    held: Floats
    held_whole: Floats
    alive: Floats
    rank: tuple[int, ...]


@lru_cache(maxsize=2048)
def _held(facts: LayerFacts, key: PipelineKey, every_rank: bool) -> _Held:
    layers = _layers(facts, replace(key, num_microbatches=0, microbatch_group_size=0))
    by_rank = held_microbatches(
        Pipeline(key.schedule),
        key.pp,
        key.vpp,
        key.num_microbatches,
        key.microbatch_group_size,
    )
    rank_of = np.repeat(np.arange(key.pp), [len(rows) for rows in by_rank])
    times = np.concatenate(by_rank).astype(np.float64)
    at = (np.asarray(layers.placement.rank_of_stage), np.asarray(layers.placement.chunk_of_stage))
    inputs = _kept_inputs(facts, layers.runs, layers.reruns, key)
    held = np.einsum("qv,qvk->qk", times, _by_chunk(inputs, at, key)[rank_of])
    whole = _by_chunk(layers.runs - layers.reruns, at, key)
    held_whole = np.einsum("qv,qvk->qk", times, whole[rank_of])
    most = _by_chunk(layers.reruns, at, key).max(axis=1)
    alive = _alive(facts, most, key)[rank_of]
    if schedule_module(Pipeline(key.schedule)).SPLITS_BACKWARD:
        # Weight gradients come after all input gradients of a stage: all its layers are whole.
        alive = most[rank_of]
    if every_rank:
        return _Held(held, held_whole, alive, tuple(rank_of.tolist()))
    present = (layers.own > 0).astype(np.float64)
    weighs = np.concatenate(
        [held, held_whole, alive, layers.params[rank_of], present[rank_of]], axis=1
    )
    keep = _maximal(weighs)
    return _Held(held[keep], held_whole[keep], alive[keep], tuple(rank_of[keep].tolist()))


def _by_chunk(counts: Floats, at: tuple[Index, Index], key: PipelineKey) -> Floats:
    """Return counts [S, K] of virtual stages by rank and chunk, [P, vpp, K]."""
    out = np.zeros((key.pp, key.vpp, counts.shape[1]))
    out[at] = counts
    return out


def _runs(facts: LayerFacts, placement: Placement) -> Floats:
    runs = np.zeros((len(placement.layers), facts.num_kinds))
    for stage, layers in enumerate(placement.layers):
        for layer in layers:
            runs[stage, facts.pattern[layer]] += 1.0
    embedding, head = facts.num_layer_kinds, facts.num_layer_kinds + 1
    runs[placement.embedding_stage, embedding] += 1.0
    runs[placement.loss_stage, head] += 1.0
    depth = 0
    for stage, count in enumerate(placement.mtp_layers):
        for _ in range(count):
            # Every MTP depth embeds its tokens and runs the head once more.
            runs[stage, head + 1 + depth] += 1.0
            runs[stage, embedding] += 1.0
            runs[placement.loss_stage, head] += 1.0
            depth += 1
    return runs


def _params(facts: LayerFacts, placement: Placement, runs: Floats, pp: int) -> Floats:
    embedding, head = facts.num_layer_kinds, facts.num_layer_kinds + 1
    # Shared weights are held once a rank, however often they run.
    rank = np.asarray(placement.rank_of_stage)
    params = _by_rank(runs, rank, pp)
    for shared in (embedding, head):
        params[:, shared] = np.minimum(params[:, shared], 1.0)
    loss_rank = placement.rank_of_stage[placement.loss_stage]
    if facts.tied:
        params[loss_rank, embedding] = 1.0
    return params


def _reruns(facts: LayerFacts, runs: Floats, key: PipelineKey) -> Floats:
    """Return the blocks that full recomputation runs again: layers, never embedding or head."""
    reruns = runs.copy()
    reruns[:, facts.num_layer_kinds : facts.num_layer_kinds + 2] = 0.0
    if key.recompute_block:
        layers = runs[:, : facts.num_layer_kinds]
        # The first N layers of each stage; kinds share them in the order they stand.
        before = np.cumsum(layers, axis=1) - layers
        left = np.maximum(key.recompute_num_layers - before, 0.0)
        reruns[:, : facts.num_layer_kinds] = np.minimum(layers, left)
    return reruns


def _kept_inputs(facts: LayerFacts, runs: Floats, reruns: Floats, key: PipelineKey) -> Floats:
    """Return how many layer inputs (or whole layers, without full recomputation) a stage keeps."""
    if key.recompute_block or key.recompute_num_layers <= 1:
        return reruns
    inputs = reruns.copy()
    layers = inputs[:, : facts.num_layer_kinds]
    total = np.maximum(layers.sum(axis=1, keepdims=True), 1.0)
    inputs[:, : facts.num_layer_kinds] = layers / total * np.ceil(total / key.recompute_num_layers)
    return inputs


def _alive(facts: LayerFacts, most: Floats, key: PipelineKey) -> Floats:
    """Return how many layers of each kind [P, K] are whole at once while they are run again.

    One, or a group of N; kinds take turns. ``most`` [P, K] are those of a rank's largest chunk.
    """
    together = 1.0 if key.recompute_block else float(max(key.recompute_num_layers, 1))
    alive = (most > 0).astype(np.float64)
    if together > 1.0:
        layers = most[:, : facts.num_layer_kinds]
        rows = np.arange(len(alive))
        alive[rows, layers.argmax(axis=1)] = np.minimum(together, layers.sum(axis=1))
    return alive


def _by_rank(counts: Floats, rank: np.ndarray, pp: int) -> Floats:
    out = np.zeros((pp, counts.shape[1]))
    np.add.at(out, rank, counts)
    return out


def _maximal(rows: Floats) -> list[int]:
    """Return the rows that no other row exceeds everywhere (the first of equal ones)."""
    _, first = np.unique(rows, axis=0, return_index=True)
    first = np.sort(first)
    some = rows[first]
    covers = np.all(some[:, None, :] >= some[None, :, :], axis=2)
    return first[covers.sum(axis=0) == 1].tolist()
