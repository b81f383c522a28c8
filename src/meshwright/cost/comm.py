"""Seconds of a collective over a group of ranks that spans NVLink domains.

Alpha-beta over two levels. A group has ``size`` ranks, of which ``inside`` share an NVLink domain
(the worst place decides). What stays inside moves over NVLink; what leaves uses the network card of
every member, all groups of the axis being busy at once. Ring and hierarchical algorithms pipeline
the two, so the slower one counts. Ref: Thakur, Rabenseifner, Gropp, IJHPCA 2005 (cost of ring
collectives); NCCL's documented "bus bandwidth". Left out: congestion of the fabric above the rail,
in-network reduction, and tree algorithms for short messages.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from meshwright.cost.columns import Floats, Index, distinct_index
from meshwright.cost.factors import Factors
from meshwright.describe.cluster import Cluster
from meshwright.parallel.layout import Ints, Layouts, take
from meshwright.parallel.mesh import dense_mesh, expert_mesh, members_sharing_columns


@dataclass(frozen=True)
class Span:
    """A group of ranks, row by row: its ``size``, and how many members share a domain."""

    size: Floats
    inside: Floats


@dataclass(frozen=True)
class Network:
    """Speeds that collectives reach on a cluster, in bytes/s per GPU and one direction, and s."""

    link_bytes_per_s: float
    network_bytes_per_s: float
    link_all_to_all_fraction: float
    all_to_all_fraction: float
    dispatch_fraction: float
    link_latency_s: float
    network_latency_s: float
    start_s: float
    reduces_in_switch: bool
    """NVLink SHARP: the switch adds up what all ranks send, and sends the sum to all."""


def network(cluster: Cluster, factors: Factors) -> Network:
    """Return the speeds in force: datasheet bandwidth times the fitted share of it."""
    on_nvlink = cluster.nvlink_domain > 1 or cluster.num_gpus == 1
    reached = factors.link_fraction if on_nvlink else factors.pcie_fraction
    return Network(
        link_bytes_per_s=cluster.intra_node.bytes_per_s * reached,
        network_bytes_per_s=cluster.inter_node.bytes_per_s * factors.network_fraction,
        link_all_to_all_fraction=factors.link_all_to_all_fraction,
        all_to_all_fraction=factors.all_to_all_fraction,
        dispatch_fraction=factors.dispatch_fraction,
        link_latency_s=cluster.intra_node.latency_s,
        network_latency_s=cluster.inter_node.latency_s,
        start_s=factors.collective_s,
        reduces_in_switch=cluster.nvls,
    )


def span(size: Ints, stride: Ints, domain: int) -> Span:
    """Return the span of the groups of an axis (``size``, ``stride`` in ranks)."""
    inside = members_sharing_columns(size, stride, domain)
    return Span(size.astype(np.float64), inside.astype(np.float64))


@dataclass(frozen=True)
class Spans:
    """The groups of the axes that communicate inside a stage, row by row."""

    tp: Span
    cp: Span
    ep: Span
    etp: Span
    pp_crosses: Floats
    """1.0 where a pipeline neighbour sits in another domain."""


def spans(x: Layouts, cluster: Cluster) -> Spans:
    """Return the spans of the groups of a table, from the strides of its two meshes."""
    some, inverse = distinct_spans(x, cluster)

    def spread(one: Span) -> Span:
        return Span(one.size[inverse], one.inside[inverse])

    return Spans(
        tp=spread(some.tp),
        cp=spread(some.cp),
        ep=spread(some.ep),
        etp=spread(some.etp),
        pp_crosses=some.pp_crosses[inverse],
    )


def distinct_spans(x: Layouts, cluster: Cluster) -> tuple[Spans, Index]:
    """Return the spans [D] of the distinct meshes of a table, and which mesh each row [N] has."""
    first, inverse = distinct_index([x.tp, x.cp, x.dp, x.pp, x.ep, x.etp])
    return _spans(take(x, first), cluster.scale_up_domain), inverse


def _spans(x: Layouts, domain: int) -> Spans:
    axes = {a.name: a for a in (*dense_mesh(x).axes, *expert_mesh(x).axes)}

    def of(name: str) -> Span:
        return span(axes[name].size, axes[name].stride, domain)

    pp = of("pp")
    return Spans(
        tp=of("tp"),
        cp=of("cp"),
        ep=of("ep"),
        etp=of("etp"),
        pp_crosses=(pp.inside < pp.size).astype(np.float64),
    )


def all_gather_s(total_bytes: Floats, over: Span, net: Network) -> Floats:
    """All-gather, or reduce-scatter: ``total_bytes`` is the whole (gathered) tensor.

    max over levels of bytes / bandwidth, plus latency per step:
    NVLink carries total * (g-1)/g; the network total * (1 - inside/g), by ``inside`` cards.
    Ref: as the module. Left out: NVLink SHARP, which sends no less here.
    """
    g, inside = over.size, over.inside
    within = total_bytes * (g - 1) / g / net.link_bytes_per_s
    across = total_bytes * (1 - inside / g) / (inside * net.network_bytes_per_s)
    return np.where(g > 1, np.maximum(within, across) + _latency_s(over, net), 0.0)


def all_reduce_s(total_bytes: Floats, over: Span, net: Network) -> Floats:
    """All-reduce of ``total_bytes``: a reduce-scatter and an all-gather.

    Where the switch of one domain reduces, each rank sends its part once and gets the sum:
    total * (1 + 1/g) / NVLink instead of 2 * total * (g-1)/g. Ref: as the module; Klenk et al.,
    ISCA 2020 (in-network reduction on shared-memory switches). Left out: its limits on channels.
    """
    both = 2.0 * all_gather_s(total_bytes, over, net)
    if not net.reduces_in_switch:
        return both
    g = over.size
    once = total_bytes * (1.0 + 1.0 / g) / net.link_bytes_per_s + _latency_s(over, net)
    return np.where((g > 1) & (over.inside == g), np.minimum(once, both), both)


def all_to_all_s(local_bytes: Floats, over: Span, net: Network) -> Floats:
    """All-to-all: every rank sends ``local_bytes`` in all, 1/g of it to each member.

    max(local * (inside-1)/g / NVLink, local * (g-inside)/g / network) + latency. Ref: as the
    module. Left out: imbalance between experts (see ``forced_balance``).
    """
    g, inside = over.size, over.inside
    within = local_bytes * (inside - 1) / g / (net.link_bytes_per_s * net.link_all_to_all_fraction)
    across = local_bytes * (g - inside) / g / (net.network_bytes_per_s * net.all_to_all_fraction)
    return np.where(g > 1, np.maximum(within, across) + _latency_s(over, net), 0.0)


def dispatch_s(
    token_bytes: Floats, handled_bytes: Floats, topk: Floats, over: Span, net: Network
) -> Floats:
    """Dispatch or combine of DeepEP and HybridEP: a token goes once to each rank that needs it.

    ``token_bytes``: all tokens of a rank, once; ``handled_bytes``: what NVLink could move while
    multiprocessors sort and copy them. Of g ranks each gets a token with probability
    1 - (1 - 1/g)^topk; over the network it goes once to each domain, 1 - (1 - inside/g)^topk.
    Ref: DeepSeek-AI, arXiv:2412.19437, section 3.2.2; github.com/deepseek-ai/DeepEP. Left out:
    routing limited to few nodes, and the multiprocessors that the kernels take from compute.
    """
    g, inside = over.size, over.inside
    ranks = (g - 1) * (1 - (1 - 1 / g) ** topk)
    domains = (g / inside - 1) * (1 - (1 - inside / g) ** topk)
    within = (token_bytes + handled_bytes) * ranks / (net.link_bytes_per_s * net.dispatch_fraction)
    across = token_bytes * domains / (net.network_bytes_per_s * net.dispatch_fraction)
    return np.where(g > 1, np.maximum(within, across) + _latency_s(over, net), 0.0)


def ring_step_s(message_bytes: Floats, over: Span, net: Network) -> Floats:
    """One step of a ring: every rank passes ``message_bytes`` to its neighbour.

    message / bandwidth + latency. Where the ring leaves the domain, one network link of it paces
    the step. Ref: as the module. Left out: what two rings over the same links take from each other.
    """
    crosses = over.inside < over.size
    speed = np.where(crosses, net.network_bytes_per_s, net.link_bytes_per_s)
    latency = np.where(crosses, net.network_latency_s, net.link_latency_s)
    return np.where(over.size > 1, message_bytes / speed + latency, 0.0)


def point_to_point_s(message_bytes: Floats, crosses: Floats, net: Network) -> Floats:
    """One message between pipeline neighbours.

    message / bandwidth + latency, over NVLink or the network. Ref: as the module. Left out: other
    messages over the same links.
    """
    within = message_bytes / net.link_bytes_per_s + net.link_latency_s
    across = message_bytes / net.network_bytes_per_s + net.network_latency_s
    return np.where(crosses > 0, across, within)


def _latency_s(over: Span, net: Network) -> Floats:
    domains = over.size / over.inside
    hops = np.where(over.inside > 1, np.log2(np.maximum(over.inside, 1.0)), 0.0)
    far_hops = np.log2(np.maximum(domains, 1.0))
    return net.start_s + hops * net.link_latency_s + far_hops * net.network_latency_s
