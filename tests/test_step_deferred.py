"""Weight gradients of the head that wait for the drain of the pipeline."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from meshwright.cost.detail import estimate
from meshwright.cost.step import bounds, prepare, simulated_step_s
from meshwright.describe.cluster import load_cluster
from meshwright.describe.job import Execution, Job
from meshwright.describe.models import load_model
from meshwright.parallel.layout import Layout, Pipeline, layout, table

LLAMA = load_model("llama3-8b")
CLUSTER = load_cluster("16xH100")


def job(waiting: int) -> Job:
    execution = Execution(deferred_head_microbatches=waiting)
    return Job(seq_len=4096, gbs=32, execution=execution)


def step_s(waiting: int, x: Layout[int]) -> float:
    return estimate(LLAMA, CLUSTER, job(waiting), x).step_time_s


@pytest.mark.parametrize("vpp", [1, 4])
def test_the_more_gradients_wait_the_shorter_a_step_that_the_head_paces(vpp: int) -> None:
    x = layout(tp=2, pp=4, vpp=vpp, gpus=16)
    steps = [step_s(waiting, x) for waiting in (0, 1, 4, 16)]
    assert steps == sorted(steps, reverse=True)
    assert steps[-1] < 0.99 * steps[0]
    assert step_s(1000, x) == step_s(16, x)


def test_no_gradient_waits_without_a_drain() -> None:
    assert step_s(16, layout(tp=2, gpus=16)) == step_s(0, layout(tp=2, gpus=16))
    split = layout(tp=2, pp=4, gpus=16, schedule=Pipeline.zb_h1)
    assert step_s(16, split) == step_s(0, split)


def test_the_terms_of_a_step_still_add_up() -> None:
    found = estimate(LLAMA, CLUSTER, job(16), layout(tp=2, pp=4, vpp=2, gpus=16))
    assert sum(found.time.values()) == pytest.approx(found.step_time_s)


@pytest.mark.parametrize("waiting", [0, 3, 16])
def test_the_bound_stays_below_the_step(waiting: int) -> None:
    made = [layout(tp=tp, pp=pp, vpp=v, gpus=16) for tp, pp, v in ((1, 2, 4), (2, 4, 1), (1, 8, 2))]
    for x in made:
        priced = prepare(LLAMA, CLUSTER, replace(job(waiting), gbs=64), table([x]))
        assert np.all(bounds(priced).bound_s <= simulated_step_s(priced) * (1 + 1e-12))
