"""The laws of costs hold whatever a framework's switches are, alone and together."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.cost.columns import Floats
from meshwright.cost.detail import estimate
from meshwright.cost.step import bounds, prepare, simulated_step_s
from meshwright.describe.job import Job, precision
from meshwright.parallel.layout import Layouts, num_rows, row, take
from strategies import Situation, situations_with_rows

ROUNDING = 1e-12
OFFLOADED = frozenset({"moe_act", "expert_fc1", "core_attn", "attn_norm", "qkv_linear"})
CHOICES: dict[str, tuple[Any, ...]] = {
    "deferred_head_microbatches": (0, 1, 22),
    "dispatcher": ("alltoall", "allgather", "deepep", "hybridep"),
    "capacity_factor": (None, 1.5),
    "packed_sample_tokens": (0, 500),
    "activation_offload_layers": (0, 3),
    "offloaded_modules": (frozenset(), OFFLOADED),
    "cuda_graphs": ("none", "full"),
    **dict.fromkeys(
        (
            *("asynchronous_tp", "overlap_ep_comm", "delay_weight_grad", "flash_attention"),
            *("fp8_attention", "transformer_engine", "fused_kernels", "fused_cross_entropy"),
            *("compiled_cross_entropy", "in_place_cross_entropy", "caches_quantised_weights"),
            *("grouped_gemm", "fused_experts", "forced_balance", "neighbouring_experts"),
            *("recompute_every_second_matmul", "blocking_checkpoints", "scatters_messages"),
        ),
        (False, True),
    ),
}
switches = st.fixed_dictionaries({name: st.sampled_from(of) for name, of in CHOICES.items()})
recipes = st.sampled_from(["bf16", "fp8", "fp8-cs", "fp8-rowwise", "fp8-mx", "nvfp4"])


def costs(s: Situation, job: Job, x: Layouts) -> tuple[Floats, Floats, Floats]:
    """Return peak bytes, bound and simulated seconds of every row."""
    t = prepare(s.model, s.cluster, job, x)
    found = bounds(t)
    return found.peak_bytes, found.bound_s, simulated_step_s(t)


@settings(max_examples=40)
@given(situations_with_rows(min_rows=3, max_rows=12), switches, recipes)
def test_rows_cost_what_they_cost_alone_above_their_bound_whatever_the_switches(
    drawn: tuple[Situation, list[int]], chosen: dict[str, Any], recipe: str
) -> None:
    s, rows = drawn
    job = replace(s.job, precision=precision(recipe), execution=replace(s.job.execution, **chosen))
    x = s.rows(rows)
    together = costs(s, job, x)
    for values in together:
        assert np.all(np.isfinite(values))
        assert np.all(values > 0)
    peak, bound, step = together
    assert np.all(bound <= step * (1 + ROUNDING))
    for i in range(num_rows(x)):
        alone = costs(s, job, take(x, np.array([i])))
        assert [a[i] for a in together] == [a[0] for a in alone]
    e = estimate(s.model, s.cluster, job, row(x, 0))
    assert abs(e.step_time_s / step[0] - 1) < ROUNDING
    assert abs(e.peak_bytes / peak[0] - 1) < ROUNDING
    assert min(*e.time.values(), *e.memory.values()) >= 0
