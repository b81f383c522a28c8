"""What one rank sees of one micro-batch of one layer: degrees and tokens as float columns."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from meshwright.cost.columns import Floats, distinct_index
from meshwright.cost.comm import Spans, distinct_spans, spans
from meshwright.describe.cluster import Cluster
from meshwright.describe.job import Job
from meshwright.describe.model import Model, Saved, Where
from meshwright.parallel.layout import CpComm, Ints, Layouts


@dataclass(frozen=True)
class Slice:
    """Columns [D] over distinct rows; tokens are those of one micro-batch.

    ``tokens`` = mbs * seq_len / cp; ``sp_tokens`` divides them by TP under sequence parallelism;
    ``routed_tokens`` = sp_tokens * topk * etp arrive at the experts of a rank (balanced routing,
    times the capacity factor where one pads), ``destinations`` of which each token has.
    """

    tp: Floats
    cp: Floats
    ep: Floats
    etp: Floats
    sp: Ints
    cp_comm: Ints
    recompute: Ints
    tokens: Floats
    sp_tokens: Floats
    routed_tokens: Floats
    destinations: Floats
    seq_len: int
    spans: Spans
    hierarchical_cp: tuple[int, ...] | None = None

    def op_tokens(self, where: Where) -> Floats:
        """Return the tokens an op runs on: whole inside a TP region, divided between regions."""
        if where in ("expert", "routed"):
            return self.routed_tokens
        return self.tokens if where == "tp" else self.sp_tokens

    def feature_divisor(self, where: Where) -> Floats:
        """Return what divides the features of a tensor: TP, ETP or nothing."""
        if where == "tp":
            return self.tp
        return self.etp if where == "expert" else np.ones_like(self.tp)

    def elements(self, saved: Saved) -> Floats:
        """Return the elements of a kept tensor on one rank."""
        return saved.elements / self.feature_divisor(saved.where) * self.op_tokens(saved.where)


SLICE_COLUMNS = ("tp", "cp", "ep", "etp", "mbs", "sp", "cp_comm", "recompute")


def slice_keys(x: Layouts, cluster: Cluster) -> list[Ints]:
    """Return the columns that a slice depends on, the spans of its groups included."""
    over, mesh_of = distinct_spans(x, cluster)
    inside = [over.tp.inside, over.cp.inside, over.ep.inside, over.etp.inside]
    _, alike = distinct_index([i.astype(np.int64) for i in inside])
    return [getattr(x, c) for c in SLICE_COLUMNS] + [alike[mesh_of]]


def slices(model: Model, cluster: Cluster, job: Job, x: Layouts) -> Slice:
    """Return the slice of each row of ``x``."""
    tp, cp, ep, etp = (c.astype(np.float64) for c in (x.tp, x.cp, x.ep, x.etp))
    tokens = x.mbs * float(job.seq_len) / cp
    over = spans(x, cluster)
    sp_tokens = np.where(x.sp > 0, tokens / tp, tokens)
    capacity = job.execution.capacity_factor or 1.0
    topk = max(model.topk, 1)
    destinations = np.full_like(ep, topk * capacity)
    if job.execution.neighbouring_experts:
        # They lie on few ranks beside each other, over a network within one domain.
        ranks = np.clip(topk * ep / max(model.num_experts, 1), 1.0, topk)
        destinations = np.where(over.ep.inside < over.ep.size, 1.0, ranks)
    return Slice(
        tp=tp,
        cp=cp,
        ep=ep,
        etp=etp,
        sp=x.sp,
        cp_comm=x.cp_comm,
        recompute=x.recompute,
        tokens=tokens,
        sp_tokens=sp_tokens,
        routed_tokens=sp_tokens * topk * etp * capacity,
        destinations=destinations,
        seq_len=job.seq_len,
        spans=over,
        hierarchical_cp=x.hierarchical_cp,
    )


def is_ring(cp_comm: Ints) -> Ints:
    """Return 1 where context parallelism passes keys and values round a ring."""
    return ((cp_comm == CpComm.p2p) | (cp_comm == CpComm.a2a_p2p)).astype(np.int64)


def is_all_to_all(cp_comm: Ints) -> Ints:
    """Return 1 where context parallelism exchanges heads."""
    return ((cp_comm == CpComm.a2a) | (cp_comm == CpComm.a2a_p2p)).astype(np.int64)
