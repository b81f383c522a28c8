"""From blocks to ranks to the step: memory and a lower bound for all rows, simulation for some.

``price`` costs each distinct slice of each block once. Rows that share the shape of their pipeline
(``by_pipeline``) then meet the matrices of ``stages``: the only loop over rows in the package.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from meshwright.cost.blocks import BlockSeconds, block_seconds
from meshwright.cost.columns import Floats, Index, distinct, distinct_index
from meshwright.cost.comm import all_gather_s, distinct_spans, network, point_to_point_s
from meshwright.cost.data_parallel import (
    DataParallel,
    Weights,
    data_parallel,
    dp_comm_s,
    optimizer_s,
    rows_of,
)
from meshwright.cost.factors import Factors, factors_of
from meshwright.cost.memory import (
    BlockBytes,
    BytesPerParam,
    Placeholders,
    block_bytes,
    framework_bytes,
    grads_bytes_per_param,
    optimizer_bytes_per_param,
    placeholder_bytes,
    spare_fraction,
    update_bytes_per_param,
    weights_bytes_per_param,
    without_offloaded_layers,
    workspace_bytes,
)
from meshwright.cost.parameters import block_params_per_rank, trained_params_per_rank
from meshwright.cost.peak import HeldBytes, Phase, running_bytes, update_instead
from meshwright.cost.pricing import COMPUTE, NUM_KINDS, RECOMPUTE, Pricing, pricing
from meshwright.cost.slices import slice_keys, slices
from meshwright.cost.stages import (
    PIPELINE_COLUMNS,
    LayerFacts,
    PipelineKey,
    Stages,
    layer_facts,
    stages,
)
from meshwright.describe.cluster import Cluster
from meshwright.describe.job import Job
from meshwright.describe.model import Model
from meshwright.parallel.actions import schedule_module
from meshwright.parallel.layout import Layouts, Pipeline, Recompute, Zero, num_rows
from meshwright.parallel.pipeline import Simulation, build_schedule, simulate

MOST_SIMULATED = 1024
"""Micro-batches that are simulated one by one; what is longer repeats its last round."""


@dataclass(frozen=True)
class Priced:
    """Costs of the distinct slices of a table, [D, K] unless said; ``inverse`` [N] finds a row's.

    ``seconds[kind]`` hold forward and backward of every kind of work: [D, K, NUM_KINDS].
    """

    facts: LayerFacts
    inverse: Index
    forward: Floats
    backward: Floats
    weight_grad: Floats
    reruns: Floats
    by_kind_forward: Floats
    by_kind_backward: Floats
    kept: Floats
    whole: Floats
    logits: Floats
    loss_forward: Floats
    working: Floats
    back: Floats
    placeholders: Placeholders
    dense_params: Floats
    expert_params: Floats
    dense_trained: Floats
    expert_trained: Floats
    message_bytes: Floats
    sent_bytes: Floats
    """What a rank sends of a message between pipeline neighbours, [D]."""
    regather_s: Floats
    """Seconds to gather a message that was sent in parts, [D]."""
    gathered_bytes: Floats
    """Whole weights of the two largest layers, which ZeRO-3 has gathered at once, [D]."""
    is_full: NDArray[np.bool_]


def price(model: Model, cluster: Cluster, job: Job, x: Layouts, factors: Factors) -> Priced:
    """Price every distinct slice of every kind of block of a table."""
    found = distinct(x, slice_keys(x, cluster))
    part = slices(model, cluster, job, found.rows)
    p = pricing(part, job, cluster, factors)
    blocks = model.block_kinds
    seconds = [block_seconds(b, p) for b in blocks]
    sizes = [block_bytes(b, p, model.hidden_size) for b in blocks]
    dense, expert = block_params_per_rank(model, found.rows)
    trained = (dense, expert)
    if job.task == "lora":
        trained = trained_params_per_rank(model, job, found.rows)
    forward, backward = _stack(seconds)
    message = part.sp_tokens * model.hidden_size * job.precision.act_bytes
    sent, regather = scattered_message(message, job, p)
    if job.execution.offloaded_modules or job.execution.activation_offload_layers:
        add_offload_waits_s(model, cluster, job, sizes, forward, backward)
        sizes = without_offloaded_layers(sizes, model, job)
    return Priced(
        facts=layer_facts(model),
        inverse=found.inverse,
        forward=np.einsum("dkc->dk", forward),
        backward=np.einsum("dkc->dk", backward) - backward[:, :, RECOMPUTE],
        reruns=np.ascontiguousarray(backward[:, :, RECOMPUTE]),
        weight_grad=np.stack([s.weight_grad for s in seconds], axis=1),
        by_kind_forward=forward,
        by_kind_backward=backward,
        kept=np.stack([s.kept for s in sizes], axis=1),
        whole=np.stack([s.whole for s in sizes], axis=1),
        logits=np.stack([s.logits for s in sizes], axis=1),
        loss_forward=sizes[len(model.layer_kinds) + 1].forward,
        working=np.stack([s.working for s in sizes], axis=1),
        back=np.stack([s.back for s in sizes], axis=1),
        placeholders=placeholder_bytes(blocks, p),
        dense_params=dense,
        expert_params=expert,
        dense_trained=trained[0],
        expert_trained=trained[1],
        message_bytes=message,
        sent_bytes=sent,
        regather_s=regather,
        gathered_bytes=2.0
        * np.max((dense + expert)[:, : len(model.layer_kinds)], axis=1)
        * job.precision.param_bytes,
        is_full=(found.rows.recompute & int(Recompute.full)) != 0,
    )


def scattered_message(message_bytes: Floats, job: Job, p: Pricing) -> tuple[Floats, Floats]:
    """Return the bytes a rank sends to its pipeline neighbour, and seconds to gather them there.

    Without sequence parallelism every tensor-parallel rank has the whole message. Where they share
    the sending, each sends 1/tp of it, and NVLink gathers the parts. Ref: Narayanan et al.,
    arXiv:2104.04473, section 4.1 (scatter/gather optimization).
    """
    whole = (p.slice.sp == 0) & (p.slice.tp > 1)
    if not job.execution.scatters_messages:
        return message_bytes, np.zeros_like(message_bytes)
    gather_s = all_gather_s(message_bytes, p.slice.spans.tp, p.net)
    sent = np.where(whole, message_bytes / p.slice.tp, message_bytes)
    return sent, np.where(whole, gather_s, 0.0)


def add_offload_waits_s(
    model: Model,
    cluster: Cluster,
    job: Job,
    sizes: list[BlockBytes],
    forward: Floats,
    backward: Floats,
) -> None:
    """Add to compute [D, K, kinds] what moving activations to the host and back does not hide.

    max(bytes / host link - seconds of the block, 0) either way: a block's tensors leave while the
    next one runs and return while the one after it runs backward. Bytes are those of the offloaded
    modules, or of the share of layers that are offloaded whole. Ref: Megatron-LM,
    ``fine_grained_activation_offload``; TransformerEngine, ``cpu_offload``. Left out: the same
    link's other users.
    """
    whole = min(job.execution.activation_offload_layers / max(model.num_layers, 1), 1.0)
    for k, size in enumerate(sizes[: len(model.layer_kinds)]):
        moved_s = (size.back / 2.0 + whole * size.kept) / cluster.host.bytes_per_s
        for way in (forward, backward):
            spare = moved_s - np.einsum("dc->d", way[:, k])
            way[:, k, COMPUTE] += np.maximum(spare, 0.0)


def _stack(seconds: list[BlockSeconds]) -> tuple[Floats, Floats]:
    forward = np.stack([s.forward for s in seconds], axis=1)
    backward = np.stack([s.backward for s in seconds], axis=1)
    assert forward.shape[2] == NUM_KINDS
    return forward, backward


@dataclass(frozen=True)
class Group:
    """Rows [n] of a table that share a pipeline, and the slices [u] that occur among them.

    ``rows`` are their numbers in the table, ``slices`` rows of ``Priced``, ``slice_of`` [n] which
    of ``slices`` each row has.
    """

    key: PipelineKey
    rows: Index
    slices: Index
    slice_of: Index
    stages: Stages


def by_pipeline(job: Job, x: Layouts, priced: Priced) -> Iterator[Group]:
    """Yield the rows of a table in groups that share the shape of their pipeline."""
    num_microbatches = job.gbs // (x.dp * x.mbs)
    block = ((x.recompute & int(Recompute.block)) != 0).astype(np.int64)
    columns = [getattr(x, c) for c in PIPELINE_COLUMNS]
    columns += [num_microbatches, block, x.recompute_num_layers]
    first, group_of = distinct_index(columns)
    # Small integers sort by radix, many times faster.
    narrow = group_of.astype(np.uint16 if len(first) < 2**16 else np.int64)
    order = np.argsort(narrow, kind="stable")
    edges = np.searchsorted(narrow[order], np.arange(len(first) + 1))
    for g, representative in enumerate(first):
        rows = order[edges[g] : edges[g + 1]]
        shape = {c: int(getattr(x, c)[representative]) for c in PIPELINE_COLUMNS}
        key = PipelineKey(
            **shape,
            num_microbatches=int(num_microbatches[representative]),
            recompute_block=int(block[representative]),
            recompute_num_layers=int(x.recompute_num_layers[representative]),
            pipeline_layout=x.pipeline_layout,
        )
        occurring, slice_of = distinct_index([priced.inverse[rows]])
        yield Group(
            key=key,
            rows=rows,
            slices=priced.inverse[rows[occurring]],
            slice_of=slice_of,
            stages=stages(priced.facts, key),
        )


@dataclass(frozen=True)
class Table:
    """A table of layouts with all that pricing its rows needs; columns [N].

    ``message_s`` are the seconds of one message between pipeline neighbours that nothing hides;
    ``weights``, ``grads``, ``optimizer`` bytes per parameter; ``framework_bytes`` what software
    holds beside tensors, ``workspace_bytes`` its workspaces; ``update`` bytes per parameter that
    the update of the optimizer copies; ``dp`` the data-parallel collectives.
    """

    model: Model
    cluster: Cluster
    job: Job
    x: Layouts
    factors: Factors
    priced: Priced
    message_s: Floats
    weights: BytesPerParam
    grads: BytesPerParam
    optimizer: BytesPerParam
    framework_bytes: Floats
    workspace_bytes: Floats
    update: BytesPerParam
    dp: DataParallel

    @property
    def update_copies(self) -> bool:
        """Whether the update copies anything."""
        return bool(self.update.dense.any())


def prepare(
    model: Model, cluster: Cluster, job: Job, x: Layouts, factors: Factors | None = None
) -> Table:
    """Price the distinct slices of a table, and what each row pays per byte and parameter."""
    used = factors or factors_of(cluster)
    return price_rows(model, cluster, job, x, used, price(model, cluster, job, x, used))


def with_rows(t: Table, x: Layouts, inverse: Index) -> Table:
    """Return the same pricing for other rows ``x``, whose slices are ``inverse`` of the priced."""
    priced = replace(t.priced, inverse=inverse)
    return price_rows(t.model, t.cluster, t.job, x, t.factors, priced)


def price_rows(
    model: Model, cluster: Cluster, job: Job, x: Layouts, factors: Factors, priced: Priced
) -> Table:
    """Price what each row pays beside its slice; ``priced.inverse`` says which slice it has."""
    net = network(cluster, factors)
    over, mesh_of = distinct_spans(x, cluster)
    crosses = over.pp_crosses[mesh_of]
    hidden = factors.pp_hidden_fraction * float(job.execution.overlap_pp_comm)
    message_s = point_to_point_s(priced.sent_bytes[priced.inverse], crosses, net)
    message_s = message_s + priced.regather_s[priced.inverse]
    return Table(
        model=model,
        cluster=cluster,
        job=job,
        x=x,
        factors=factors,
        priced=priced,
        message_s=message_s * np.where(x.vpp > 1, 1.0 - hidden, 1.0),
        weights=weights_bytes_per_param(job, x),
        grads=grads_bytes_per_param(job, x),
        optimizer=optimizer_bytes_per_param(job, x),
        framework_bytes=framework_bytes(x, factors),
        workspace_bytes=workspace_bytes(cluster.gpu, job, x, has_experts=model.is_moe),
        update=update_bytes_per_param(job, x),
        dp=data_parallel(cluster, job, x, factors),
    )


MEMORY_TERMS = (
    "weights_bytes",
    "grads_bytes",
    "optimizer_bytes",
    "activations_bytes",
    "logits_bytes",
    "buffers_bytes",
    "framework_bytes",
)


def memory_of_candidates(
    t: Table, g: Group, phase: Phase | None = None
) -> Iterator[dict[str, Floats]]:
    """Yield the bytes [n] of each memory term at each peak that a rank of a group could have.

    weights, grads, optimizer = parameters of the rank * bytes per parameter. Of a ``phase``, or of
    the one that holds most: ``forward``, everything held and the loss at work; ``backward``, the
    first one, everything held and what the head needs, or the layers when the head is through;
    ``optimizer``, the state and what its update copies. activations = held micro-batches * kept;
    buffers = what is alive beside them, layers that are run again included, messages, workspaces
    and gathered ZeRO-3 weights. Ref: Rajbhandari et al., arXiv:1910.02054, section 3 (shards);
    Narayanan et al., arXiv:2104.04473, section 2.2 (held micro-batches); Korthikanti et al.,
    arXiv:2205.05198, section 4 (kept). Left out: fragmentation beyond the fitted share.
    """
    s, p, at, rows = g.stages, t.priced, g.slices, g.rows
    dense, expert = p.dense_params[at], p.expert_params[at]
    all_trained = p.dense_trained is p.dense_params
    dense_trained = dense if all_trained else p.dense_trained[at]
    expert_trained = expert if all_trained else p.expert_trained[at]
    per_param = (t.weights, t.grads, t.optimizer, t.update)
    weights, grads, optimizer, update = (_of_rows(b, rows) for b in per_param)
    is_gathered = t.x.zero[rows] == Zero.optim_grads_params
    gathered = np.where(is_gathered, p.gathered_bytes[at][g.slice_of], 0.0)
    framework, workspaces = t.framework_bytes[rows], t.workspace_bytes[rows]
    placeholders, of_block = p.placeholders.bytes[at], p.placeholders.of_block

    def held_by(params: Floats, candidate: int) -> Floats:
        return np.einsum("nk,k->n", params, s.held_params[candidate])[g.slice_of]

    unused = spare_fraction(t.job, t.factors)
    tables = slice(p.facts.num_layer_kinds, p.facts.num_layer_kinds + 2)

    sizes = HeldBytes(
        kept=p.kept[at],
        whole=p.whole[at],
        logits=p.logits[at],
        loss_forward=p.loss_forward[at],
        working=p.working[at],
        back=p.back[at],
        message=p.message_bytes[at],
        is_full=p.is_full[at],
    )
    splits = schedule_module(Pipeline(g.key.schedule)).SPLITS_BACKWARD
    head = p.facts.num_layer_kinds + 1
    candidates = running_bytes(sizes, s, g.key, phase, head=head, splits=splits)
    for q, running in enumerate(candidates):
        of_dense, of_expert = held_by(dense, q), held_by(expert, q)
        learns = of_dense if all_trained else held_by(dense_trained, q)
        learns_expert = of_expert if all_trained else held_by(expert_trained, q)
        shapes = (np.einsum("uk,k->u", of_block, s.present[q]) > 0).astype(np.float64)
        stays = np.einsum("nu,u->n", placeholders, shapes)[g.slice_of] + workspaces
        held = {
            "weights_bytes": of_dense * weights.dense + of_expert * weights.expert,
            "grads_bytes": learns * grads.dense + learns_expert * grads.expert,
            "optimizer_bytes": learns * optimizer.dense + learns_expert * optimizer.expert,
            "activations_bytes": running.activations[g.slice_of],
            "logits_bytes": running.logits[g.slice_of],
            "buffers_bytes": running.buffers[g.slice_of] + gathered,
        }
        if weights.table is not None:
            of_tables = np.einsum("nk,k->n", dense[:, tables], s.held_params[q][tables])
            held["weights_bytes"] += of_tables[g.slice_of] * (weights.table - weights.dense)
        if phase == "optimizer" or (phase is None and t.update_copies):
            copies = learns * update.dense + learns_expert * update.expert
            update_instead(held, copies, always=phase == "optimizer")
        held["buffers_bytes"] = held["buffers_bytes"] + stays
        # What the allocator holds beside live tensors counts with context and communicators.
        spare = unused * (held["logits_bytes"] + held["buffers_bytes"])
        yield {**held, "framework_bytes": framework + spare}


def _of_rows(per_param: BytesPerParam, rows: Index) -> BytesPerParam:
    table = None if per_param.table is None else per_param.table[rows]
    return BytesPerParam(per_param.dense[rows], per_param.expert[rows], table)


def peak_bytes(t: Table, g: Group) -> Floats:
    """Return the peak bytes [n] of the fullest rank."""
    peak = np.zeros(len(g.rows))
    for terms in memory_of_candidates(t, g):
        np.maximum(peak, sum(terms.values()), out=peak)
    return peak


def pipeline_bound_s(t: Table, g: Group) -> Floats:
    """Return a lower bound [n] of the pipeline's time that no order of the same actions can beat.

    max over lines of fill + own work + drain; see ``parallel.pipeline.bound_coefficients``. It
    orders the search and is in no estimate. Ref: as ``simulate_group``.
    """
    s, p, at = g.stages, t.priced, g.slices
    work = (
        np.einsum("nk,rk->nr", p.forward[at], s.bound_forward)
        + np.einsum("nk,rk->nr", p.reruns[at], s.bound_reruns)
        + np.einsum("nk,rk->nr", p.backward[at], s.bound_backward)
    )
    bound = np.zeros(len(g.rows))
    for line, messages in enumerate(s.bound_p2p):
        time = work[:, line][g.slice_of] + t.message_s[g.rows] * messages
        np.maximum(bound, time, out=bound)
    # A line counts what waits at most once, and it may run beside the drain.
    return bound - deferred_head_s(t, g)


def stage_seconds(t: Table, g: Group) -> tuple[Floats, Floats, Floats]:
    """Return forward, whole backward and its weight part [n, S] of a micro-batch on each stage."""
    s, p = g.stages, t.priced
    at = g.slices[g.slice_of]
    forward = np.einsum("nk,sk->ns", p.forward[at], s.runs)
    backward = np.einsum("nk,sk->ns", p.backward[at], s.runs) + np.einsum(
        "nk,sk->ns", p.reruns[at], s.reruns
    )
    backward[:, -1] -= deferred_head_s(t, g) / g.key.num_microbatches
    return forward, backward, np.einsum("nk,sk->ns", p.weight_grad[at], s.runs)


def deferred_head_s(t: Table, g: Group) -> Floats:
    """Return the seconds [n] of the head's weight gradients that wait for the end of the pipeline.

    min(limit, micro-batches) * weight gradient of the head: the last rank computes them when its
    part of the schedule is over, while the others still drain. Ref: Megatron-LM,
    ``defer_embedding_wgrad_compute``, ``wgrad_deferral_limit``.
    """
    waiting = min(t.job.execution.deferred_head_microbatches, g.key.num_microbatches)
    splits = schedule_module(Pipeline(g.key.schedule)).SPLITS_BACKWARD
    if g.key.pp == 1 or splits or not waiting:
        return np.zeros(len(g.rows))
    head = t.priced.facts.num_layer_kinds + 1
    return waiting * t.priced.weight_grad[g.slices[g.slice_of], head]


def simulate_group(t: Table, g: Group, message_s: Floats) -> Simulation:
    """Simulate the schedule of a group for its rows; ``message_s`` [n] delays each message.

    A stage takes the sum of the seconds of its blocks; ``parallel.pipeline.simulate`` starts each
    action as soon as it can; the bubble is what the slowest rank waits. Weight gradients of the
    head that are deferred come last on its rank.
    Ref: Narayanan et al., arXiv:2104.04473, section 2.2; Qi et al., arXiv:2401.10241.
    """
    key = g.key
    forward, backward, weight = stage_seconds(t, g)

    def run(num_microbatches: int) -> Simulation:
        schedule = build_schedule(
            Pipeline(key.schedule), key.pp, key.vpp, num_microbatches, key.microbatch_group_size
        )
        return simulate(schedule, forward, backward, message_s, weight)

    deferred = deferred_head_s(t, g)

    m = key.num_microbatches
    if m <= MOST_SIMULATED:
        return _then_deferred(run(m), deferred)
    # A long pipeline repeats itself: after its start every round takes what the last one took.
    rounds = max(m // key.pp, 1)
    cycle = key.microbatch_group_size or (m // rounds if m % rounds == 0 else key.pp)
    fewer = m - (m - MOST_SIMULATED // 2) // cycle * cycle
    first, second = run(fewer), run(fewer + cycle)
    more = (m - fewer) / cycle

    def after(a: Floats, b: Floats) -> Floats:
        return a + more * (b - a)

    whole = Simulation(
        after(first.step_s, second.step_s),
        after(first.busy_s, second.busy_s),
        after(first.rank_end_s, second.rank_end_s),
    )
    return _then_deferred(whole, deferred)


def _then_deferred(found: Simulation, deferred_s: Floats) -> Simulation:
    """Return a simulation whose last rank works ``deferred_s`` [n] longer."""
    if not deferred_s.any():
        return found
    busy, ends = found.busy_s.copy(), found.rank_end_s.copy()
    busy[:, -1] += deferred_s
    ends[:, -1] += deferred_s
    return Simulation(np.maximum(found.step_s, ends[:, -1]), busy, ends)


def beside_pipeline_s(t: Table, g: Group) -> tuple[Floats, Floats]:
    """Return exposed data-parallel seconds and optimizer seconds [n], each of its slowest rank."""
    s, p, at = g.stages, t.priced, g.slices
    dp_s, opt_s = np.zeros(len(g.rows)), np.zeros(len(g.rows))
    local = rows_of(t.dp, g.rows)
    kinds = (p.dense_params, p.expert_params, p.dense_trained, p.expert_trained)
    weights = [per_kind[at] for per_kind in kinds]
    forwards, backwards, reruns = p.forward[at], p.backward[at], p.reruns[at]

    def of_rank(per_kind: Floats, counts: Floats) -> Floats:
        return np.einsum("nk,k->n", per_kind, counts)

    for r in s.dp_ranks:
        held = [of_rank(per_kind, s.params[r])[g.slice_of] for per_kind in weights]
        whole, trained = Weights(*held[:2]), Weights(*held[2:])
        forward = of_rank(forwards, s.own[r])
        backward = of_rank(backwards, s.own[r]) + of_rank(reruns, s.own_reruns[r])
        exposed = dp_comm_s(
            t.job,
            t.factors,
            local,
            whole,
            trained,
            forward[g.slice_of],
            backward[g.slice_of],
            g.key.num_microbatches,
        )
        np.maximum(dp_s, exposed, out=dp_s)
        update = optimizer_s(t.job, t.cluster, t.factors, local, trained)
        np.maximum(opt_s, update, out=opt_s)
    return dp_s, opt_s


@dataclass(frozen=True)
class Bounds:
    """Columns [N]: peak bytes of the fullest rank, a lower bound of the step's seconds."""

    peak_bytes: Floats
    bound_s: Floats


def bounds(t: Table) -> Bounds:
    """Return memory and a lower bound of the step time of every row."""
    n = num_rows(t.x)
    peak, bound = np.zeros(n), np.zeros(n)
    for g in by_pipeline(t.job, t.x, t.priced):
        peak[g.rows] = peak_bytes(t, g)
        dp_s, optimizer = beside_pipeline_s(t, g)
        bound[g.rows] = pipeline_bound_s(t, g) + (dp_s + optimizer)
    return Bounds(peak, bound)


def simulated_step_s(t: Table) -> Floats:
    """Return the step time [N] of every row, its pipeline simulated."""
    out = np.zeros(num_rows(t.x))
    for g in by_pipeline(t.job, t.x, t.priced):
        dp_s, optimizer = beside_pipeline_s(t, g)
        pipeline = simulate_group(t, g, t.message_s[g.rows]).step_s
        out[g.rows] = pipeline + (dp_s + optimizer)
    return out
