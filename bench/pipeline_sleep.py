"""Pipelines larger than this machine: our executor with stages that sleep, against the simulation.

    python bench/pipeline_sleep.py [--forward-ms 40] [--rounds 2] [--out PATH]

A stage that sleeps needs no core, so eight pipeline ranks show a real schedule on two cores: the
runtime's own loop, messages and autograd, only the layers are replaced. Forward takes t, the input
half of backward t and its weight half t; a model chunk of vpp takes t / vpp. A stage of 20 to 50 ms
is that of a real micro-batch. The smallest of the rounds counts: what is late is the machine's.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from meshwright.describe.job import Execution
from meshwright.parallel.layout import SCHEDULE_TEXT, Pipeline, layout
from meshwright.parallel.pipeline import build_schedule, simulate
from meshwright.runtime.groups import build_groups
from meshwright.runtime.launch import run_ranks
from meshwright.runtime.pipeline_parallel import Pipeline as Runner
from meshwright.runtime.tensor_parallel import WeightGradients

PP = 8
CASES = [
    (Pipeline.gpipe, 1, 8),
    (Pipeline.one_f_one_b, 1, 8),
    (Pipeline.one_f_one_b, 1, 32),
    (Pipeline.interleaved, 2, 8),
    (Pipeline.interleaved, 4, 16),
    (Pipeline.zb_h1, 1, 8),
    (Pipeline.zb_v, 2, 8),
]


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, chunk: SleepingChunk) -> torch.Tensor:
        ctx.chunk = chunk
        time.sleep(chunk.forward_s)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        chunk: SleepingChunk = ctx.chunk
        time.sleep(chunk.forward_s)
        if chunk.later is not None and chunk.later.deferring:
            chunk.later.queue.append(lambda: time.sleep(chunk.forward_s))
        else:
            time.sleep(chunk.forward_s)
        return grad, None


class SleepingChunk:
    """What the executor needs of a model chunk; its compute is sleep."""

    def __init__(self, stage: int, last: int, later: WeightGradients | None) -> None:
        self.plan = SimpleNamespace(stage=stage, loss=stage == last)
        self.forward_s, self.later = 0.0, later
        self.losses = [torch.zeros(())]

    def __call__(self, x: torch.Tensor | None, batch: object) -> torch.Tensor:
        """Sleep through a forward pass."""
        out = _Sleep.apply(torch.zeros(1, requires_grad=True) if x is None else x, self)
        return out.sum() if self.plan.loss else out


def executed_s(rank: int, kind: int, vpp: int, microbatches: int, forward_s: float) -> float:
    """Return the seconds of this rank's second step, from a common start to its end."""
    schedule = build_schedule(Pipeline(kind), PP, vpp, microbatches)
    x = layout(pp=PP, vpp=vpp, schedule=Pipeline(kind))
    groups = build_groups(x, rank, num_kv_heads=1, tied_stages=[0])
    splits = any(action.kind == "W" for action in schedule.ranks[0])
    later = WeightGradients() if splits else None
    context: Any = SimpleNamespace(
        groups=groups, aux_losses=[], expert_counts={}, later=later, execution=Execution()
    )
    nothing: Any = SimpleNamespace(
        before_backward=lambda chunk, *, last: None, after_backward=lambda chunk, *, last: None
    )
    last = len(schedule.rank_of_stage) - 1
    chunks: Any = [
        SleepingChunk(schedule.stage(rank, number), last, later) for number in range(vpp)
    ]
    runner = Runner(context, chunks, schedule, nothing)
    batches: Any = [None] * microbatches
    # The first step connects the ranks and imports what autograd needs.
    runner.run(batches, lambda: torch.zeros(1))
    for chunk in chunks:
        chunk.forward_s = forward_s / vpp
    dist.barrier()
    start_s = time.perf_counter()
    runner.run(batches, lambda: torch.zeros(1))
    return time.perf_counter() - start_s


def simulated_s(kind: Pipeline, vpp: int, microbatches: int, forward_s: float) -> float:
    """Return the planner's seconds of the same schedule."""
    schedule = build_schedule(kind, PP, vpp, microbatches)
    forward = np.full((1, PP * vpp), forward_s / vpp)
    result = simulate(schedule, forward, 2 * forward, np.zeros(1), forward)
    return float(np.max(result.step_s))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--forward-ms", type=float, default=40.0)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    forward_s = given.forward_ms / 1000
    lines = [
        "# Executed against simulated pipelines",
        "",
        f"{datetime.date.today()}, {PP} pipeline ranks that sleep on {os.cpu_count()} cores, load "
        f"average {os.getloadavg()[0]:.1f}; a stage takes {given.forward_ms:g} ms forward and "
        "twice that backward.",
        "",
        "| schedule | vpp | micro-batches | simulated s | executed s | ratio |",
        "|---|---|---|---|---|---|",
    ]
    for kind, vpp, microbatches in CASES:
        theory_s = simulated_s(kind, vpp, microbatches, forward_s)
        words = (int(kind), vpp, microbatches, forward_s)
        found_s = min(
            max(run_ranks(PP, executed_s, *words, timeout_s=120)) for _ in range(given.rounds)
        )
        lines.append(
            f"| {SCHEDULE_TEXT[kind]} | {vpp} | {microbatches} | {theory_s:.3f} | {found_s:.3f} "
            f"| {found_s / theory_s:.3f} |"
        )
        print(lines[-1], file=sys.stderr, flush=True)
    text = "\n".join(lines) + "\n"
    if given.out:
        given.out.write_text(text, encoding="utf-8")
    sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
