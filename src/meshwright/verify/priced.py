"""What the cost model says that a rank sends and holds, in bytes.

Bytes sent are the cost model's own seconds on a cluster whose links carry one byte a second, start
without delay and hide nothing, and whose cards work in no time on what arrives: then seconds are
bytes. No formula of ``cost`` is written again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from meshwright.cost.data_parallel import Weights, dp_comm_s, rows_of
from meshwright.cost.exchange import tensor_parallel_s
from meshwright.cost.factors import Factors
from meshwright.cost.pricing import CP, EP, TP, Pricing, pricing
from meshwright.cost.slices import slices
from meshwright.cost.stages import stages
from meshwright.cost.step import Group, Table, by_pipeline, memory_of_candidates, prepare
from meshwright.describe.cluster import Cluster, Link, load_cluster
from meshwright.describe.job import Execution, Job, precision
from meshwright.describe.model import Block, Model, OpKind
from meshwright.parallel.layout import Layout, Zero, table
from meshwright.runtime.stages import streams_of

HELD = ("weights_bytes", "grads_bytes", "optimizer_bytes")
"""The terms of memory that do not depend on kernels."""


@dataclass(frozen=True, kw_only=True)
class Priced:
    """Per pipeline rank: bytes that one rank sends in a step along each axis, and holds."""

    sent: list[dict[str, float]]
    held: list[dict[str, float]]


def runtime_job(seq_len: int, gbs: int, dtype: str) -> Job:
    """Return the job as the runtime executes it on CPU: nothing overlapped."""
    execution = Execution(
        overlap_grad_reduce=False,
        overlap_param_gather=False,
        overlap_tp_comm=False,
        overlap_cp_comm=False,
        overlap_pp_comm=False,
        cuda_graphs="full",
    )
    return Job(seq_len=seq_len, gbs=gbs, precision=precision(dtype), execution=execution)


def priced(model: Model, job: Job, x: Layout[int]) -> Priced:
    """Return what the cost model says of a layout.

    Axes: ``tp cp ep pp``, ``dp`` (dense weights) and ``edp`` (experts).
    """
    t, group = _prepared(model, job, x)
    return Priced(sent=_sent(t, group), held=_held(t, group))


def differences(model: Model, job: Job, x: Layout[int]) -> list[dict[str, float]]:
    """Return, per pipeline rank and axis, the bytes that the runtime sends beyond the price.

    - ``tp``, less: under SP a tensor-parallel region keeps its gathered input, where the price has
      it gathered again in backward.
    - ``tp``, more: gradients of weights that every TP rank holds whole are summed over TP once a
      step (norms of single heads; under SP every norm, router and down-projection), and the price
      leaves that out.
    - ``tied``, more: gradients of a table that several pipeline ranks hold (tied, MTP) are summed,
      also left out.
    - ``pp``, more: prediction depths computed before the stage of the loss travel to it beside the
      hidden states, where the price knows one message a border.
    """
    t, group = _prepared(model, job, x)
    p = pricing(slices(model, t.cluster, job, t.x), job, t.cluster, t.factors)
    kinds = model.block_kinds
    again = np.array([_gathered_bytes(block, p) for block in kinds]) * float(x.sp)
    whole = np.array([_whole_params(block, sp=bool(x.sp)) for block in kinds]) * float(x.tp > 1)
    table_params = np.array([_table_params(block) for block in kinds]) / x.tp
    shards = float(t.dp.dense_shards[0]) if x.zero >= Zero.optim else 1.0
    grad_bytes = job.precision.grad_bytes / shards
    copies = np.einsum("pk,k->p", group.stages.params, table_params)
    holders = float(np.count_nonzero(copies))
    found: list[dict[str, float]] = []
    for rank in range(x.pp):
        runs, holds = group.stages.own[rank], group.stages.params[rank]
        kept = group.key.num_microbatches * float(np.einsum("k,k->", runs, again))
        summed = 2.0 * (x.tp - 1) / x.tp * float(np.einsum("k,k->", holds, whole))
        both = 2.0 * (holders - 1.0) / holders * float(copies[rank])
        beside = group.key.num_microbatches * _depths_sent(group, rank) * float(t.message_s[0])
        found.append({"tp": summed * grad_bytes - kept, "tied": both * grad_bytes, "pp": beside})
    return found


def _depths_sent(g: Group, rank: int) -> int:
    """Return how many prediction depths a rank hands on (or back, as gradients) a micro-batch."""
    placement = g.stages.placement
    owners, entering = placement.rank_of_stage, streams_of(placement)
    return sum(
        (entering[stage] - 1) * ((owners[stage - 1] == rank) + (owners[stage] == rank))
        for stage in range(1, len(owners))
        if owners[stage - 1] != owners[stage]
    )


def activations_bytes(model: Model, job: Job, x: Layout[int]) -> float:
    """Return what the cost model keeps for backward on the first rank: activations and logits."""
    t, group = _prepared(model, job, x)
    columns = next(iter(memory_of_candidates(t, group)))
    return float(columns["activations_bytes"][0] + columns["logits_bytes"][0])


def _gathered_bytes(block: Block, p: Pricing) -> float:
    entries = [comm for op in block.ops for comm in op.comm if comm.kind == "enter_tp"]
    return float(sum(tensor_parallel_s(comm, p)[0][0] for comm in entries))


def _whole_params(block: Block, *, sp: bool) -> float:
    """Return the weights that every TP rank holds whole and sees a part of the gradient of."""
    ops = (op for op in block.ops if op.holder == "all" and (sp or op.name == "qk_norm"))
    return float(sum(op.params for op in ops))


def _table_params(block: Block) -> float:
    return float(sum(op.params for op in block.ops if op.kind is OpKind.embedding))


def _prepared(model: Model, job: Job, x: Layout[int]) -> tuple[Table, Group]:
    t = prepare(model, _byte_per_second(x.world_size), job, table([x]), _FREE)
    (pruned,) = by_pipeline(job, t.x, t.priced)
    return t, replace(pruned, stages=stages(t.priced.facts, pruned.key, every_rank=True))


def _byte_per_second(num_gpus: int) -> Cluster:
    # A card whose switches do not reduce: every byte of a sum passes the link, as over gloo.
    link, cluster = Link(bytes_per_s=1.0, latency_s=0.0), load_cluster(f"{num_gpus}xA100")
    return replace(
        cluster,
        gpu=replace(cluster.gpu, hbm_bytes_per_s=math.inf),
        gpus_per_node=num_gpus,
        nvlink_domain=num_gpus,
        intra_node=link,
        inter_node=link,
    )


_FREE = Factors(
    link_fraction=1.0,
    pcie_fraction=1.0,
    network_fraction=1.0,
    link_all_to_all_fraction=1.0,
    all_to_all_fraction=1.0,
    collective_s=0.0,
    kernel_s=0.0,
    straggler_fraction=0.0,
    dp_contention_fraction=0.0,
)


def _sent(t: Table, g: Group) -> list[dict[str, float]]:
    both = (t.priced.by_kind_forward + t.priced.by_kind_backward)[g.slices[0]]
    m = g.key.num_microbatches
    by_kind = m * np.einsum("pk,kc->pc", g.stages.own, both)
    owners = g.stages.placement.rank_of_stage
    found: list[dict[str, float]] = []
    for rank in range(g.key.pp):
        # Every border between stages of two ranks is crossed forward by one, backward by the other.
        messages = sum((a == rank) + (b == rank) for a, b in pairwise(owners) if a != b)
        dense, expert = _weights(t, g, rank)
        nothing = np.zeros(1)
        found.append(
            {
                "tp": float(by_kind[rank, TP]),
                "cp": float(by_kind[rank, CP]),
                "ep": float(by_kind[rank, EP]),
                "pp": m * messages * float(t.message_s[0]),
                "dp": _dp_bytes(t, Weights(dense, nothing), m),
                "edp": _dp_bytes(t, Weights(nothing, expert), m),
            }
        )
    return found


def _weights(t: Table, g: Group, rank: int) -> tuple[np.ndarray, np.ndarray]:
    held = g.stages.params[rank]
    dense = np.einsum("nk,k->n", t.priced.dense_params[g.slices], held)
    return dense, np.einsum("nk,k->n", t.priced.expert_params[g.slices], held)


def _dp_bytes(t: Table, weights: Weights, num_microbatches: int) -> float:
    dp = rows_of(t.dp, np.arange(1))
    nothing = np.zeros(1)
    seconds = dp_comm_s(t.job, t.factors, dp, weights, weights, nothing, nothing, num_microbatches)
    return float(seconds[0])


def _held(t: Table, g: Group) -> list[dict[str, float]]:
    found: dict[int, dict[str, float]] = {}
    terms = zip(g.stages.candidate_rank, memory_of_candidates(t, g), strict=True)
    for rank, columns in terms:
        found[rank] = {name: float(columns[name][0]) for name in HELD}
    return [found[rank] for rank in range(g.key.pp)]
