"""When every action of a pipeline runs agrees with the price of the step, and overlaps nothing."""

from __future__ import annotations

from itertools import pairwise

import pytest

from meshwright.cost.detail import estimate
from meshwright.cost.timeline import timeline
from meshwright.describe.cluster import load_cluster
from meshwright.describe.job import Job
from meshwright.parallel.layout import from_text
from strategies import dense_model

MODEL, CLUSTER, JOB = dense_model(), load_cluster("16xH100"), Job(seq_len=4096, gbs=64)


@pytest.mark.parametrize(
    "text", ["pp=4", "pp=4 vpp=2", "pp=4 schedule=zb_h1", "pp=4 schedule=zb_v", "pp=2 last=6", ""]
)
def test_the_timeline_ends_where_the_pipeline_of_the_step_ends(text: str) -> None:
    x = from_text(text, gpus=16)
    ran = timeline(MODEL, CLUSTER, JOB, x, JOB.gbs // (x.dp * x.mbs))
    time = estimate(MODEL, CLUSTER, JOB, x).time
    pipeline_s = sum(time.values()) - time["dp_comm_s"] - time["optimizer_s"]
    assert max(r.start_s + r.duration_s for r in ran) == pytest.approx(pipeline_s)


def test_a_rank_runs_one_action_at_a_time() -> None:
    ran = timeline(MODEL, CLUSTER, JOB, from_text("pp=4 schedule=zb_v", gpus=16), 8)
    for rank in range(4):
        mine = sorted((r.start_s, r.duration_s) for r in ran if r.rank == rank)
        for (start, duration), (following, _) in pairwise(mine):
            assert start + duration <= following + 1e-12
