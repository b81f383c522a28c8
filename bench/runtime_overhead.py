"""What parallel execution costs on this machine: pairs of wall-clock times, one beside the other.

    python bench/runtime_overhead.py [--rounds 5] [--only TEXT] [--out PATH]

A 20M-parameter Llama, float32, one thread per process, forward + backward + AdamW. In the same two
processes a step of the layout follows a step of two independent copies, A B A B ..., and the median
of the ratios of neighbours counts: what disturbs the machine for longer than a step disturbs both.
A pipeline is held against its schedule, simulated with the CPU seconds of its own stages.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from meshwright.parallel.layout import from_text, layout
from meshwright.parallel.pipeline import Action, simulate
from meshwright.runtime import pipeline_parallel
from meshwright.runtime.engine import Engine, Settings
from meshwright.runtime.launch import run_ranks
from meshwright.runtime.shape import ModelShape

SHAPE = ModelShape(
    hidden_size=384,
    num_layers=8,
    num_heads=6,
    num_kv_heads=6,
    head_dim=64,
    ffn_hidden_size=1024,
    vocab_size=8192,
)
SEQ_LEN, GBS = 512, 4
LONG_SEQ_LEN = 4096
COPIES = {
    "TP2 with SP": ("tp=2 mbs=4", 1.16),
    "TP2 without SP": ("tp=2 sp=false mbs=4", 1.16),
    "DP2, no_shard": ("dp=2 zero=no_shard mbs=2", 1.08),
    "DP2, optim (ZeRO-1)": ("dp=2 zero=optim mbs=2", 1.08),
    "DP2, optim_grads_params (ZeRO-3)": ("dp=2 zero=optim_grads_params mbs=2", 1.18),
}
"""Layouts against two independent copies, and the ratio to stay below."""
PIPELINES = {
    "PP2 1F1B": "pp=2",
    "PP2 interleaved, vpp 2": "pp=2 vpp=2",
    "PP2 ZB-H1": "pp=2 schedule=zb_h1",
    "PP2 ZB-V": "pp=2 vpp=2 schedule=zb_v",
}
"""Layouts against the theory of their schedule, four micro-batches; the goal is 1.03."""


def engine_of(text: str, rank: int, gbs: int, seq_len: int) -> Callable[[], object]:
    """Return a training step of a layout; ``copy`` is one process by itself."""
    alone = text == "copy"
    x = layout(mbs=gbs) if alone else from_text(text)
    engine = Engine(SHAPE, x, Settings(seq_len=seq_len, gbs=gbs), rank=0 if alone else rank)
    rows = engine.own_rows(tokens(gbs, seq_len))
    return lambda: engine.step(rows)


def tokens(gbs: int, seq_len: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, SHAPE.vocab_size, (gbs, seq_len + 1), generator=generator)


def together_s(step: Callable[[], object]) -> float:
    """Return this rank's seconds of a step that all ranks begin together."""
    if dist.is_initialized():
        dist.barrier()
    start_s = time.perf_counter()
    step()
    return time.perf_counter() - start_s


def in_turn(a: Callable[[], object], b: Callable[[], object], rounds: int) -> list[list[float]]:
    """Return the seconds of a and of b, step after step, the first of each left out."""
    together_s(a), together_s(b)
    return [[together_s(a), together_s(b)] for _ in range(rounds)]


def against_copies(rank: int, text: str, rounds: int) -> list[list[float]]:
    copy = engine_of("copy", rank, GBS // 2, SEQ_LEN)
    return in_turn(copy, engine_of(text, rank, GBS, SEQ_LEN), rounds)


def context_parallel(rank: int, rounds: int) -> list[list[float]]:
    """One rank with a long sequence while the other waits, then both with half of it each."""
    one = engine_of("copy", rank, 1, LONG_SEQ_LEN) if rank == 0 else lambda: None
    return in_turn(one, engine_of("cp=2", rank, 1, LONG_SEQ_LEN), rounds)


def against_plain(rank: int, rounds: int) -> list[list[float]]:
    """The same model in plain PyTorch with optimizer and clipping, then one process of ours."""
    model = Plain()
    adamw = torch.optim.AdamW(model.parameters(), fused=True)
    rows = tokens(GBS // 2, SEQ_LEN)

    def step() -> None:
        loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad(set_to_none=True)

    return in_turn(step, engine_of("copy", rank, GBS // 2, SEQ_LEN), rounds)


def pipeline(rank: int, text: str, rounds: int) -> list[tuple[float, float, dict[Any, float]]]:
    """Return per step its seconds until the last message and CPU seconds by action and stage."""
    x = from_text(text)
    engine = Engine(SHAPE, x, Settings(seq_len=SEQ_LEN, gbs=GBS), rank=rank)
    rows = engine.own_rows(tokens(GBS, SEQ_LEN))
    spent: dict[Any, list[float]] = {}
    perform = pipeline_parallel._Step.perform
    run = engine.pipeline.run
    seconds = 0.0

    def timed(self: Any, action: Action) -> None:
        start_s = time.thread_time()
        perform(self, action)
        stage = engine.schedule.stage(rank, action.chunk)
        spent.setdefault((action.kind, stage), []).append(time.thread_time() - start_s)

    def timed_run(*args: Any) -> Any:
        nonlocal seconds
        start_s = time.perf_counter()
        found = run(*args)
        seconds = time.perf_counter() - start_s
        return found

    pipeline_parallel._Step.perform = timed
    engine.pipeline.run = timed_run
    found: list[tuple[float, float, dict[Any, float]]] = []
    for number in range(rounds + 1):
        spent.clear()
        whole_s = together_s(lambda: engine.step(rows))
        if number:
            means = {key: statistics.mean(values) for key, values in spent.items()}
            found.append((seconds, whole_s, means))
    return found


def theory_s(text: str, means: dict[Any, float]) -> float:
    """Return the simulated seconds of a schedule from the mean seconds of its actions."""
    from meshwright.runtime.stages import schedule_of

    schedule = schedule_of(from_text(text), GBS)
    stages = range(len(schedule.rank_of_stage))
    forward = np.array([[means["F", stage] for stage in stages]])
    weights = np.array([[means.get(("W", stage), 0.0) for stage in stages]])
    # ZB-V runs some backward passes whole: their input half is what the weight half leaves.
    inputs = np.array(
        [
            [
                means["I", stage]
                if ("I", stage) in means
                else means["B", stage] - weights[0, stage]
                for stage in stages
            ]
        ]
    )
    result = simulate(schedule, forward, inputs + weights, np.zeros(1), weights)
    return float(np.max(result.step_s))


class Plain(torch.nn.Module):
    """The model of ``SHAPE`` as one would write it."""

    def __init__(self) -> None:
        super().__init__()
        h, f = SHAPE.hidden_size, SHAPE.ffn_hidden_size

        def linear(i: int, o: int) -> torch.nn.Linear:
            return torch.nn.Linear(i, o, bias=False)

        self.embedding = torch.nn.Embedding(SHAPE.vocab_size, h)
        self.layers = torch.nn.ModuleList(
            torch.nn.ModuleDict(
                {n: linear(h, h) for n in "qkvo"}
                | {"gate": linear(h, f), "up": linear(h, f), "down": linear(f, h)}
                | {"norm1": torch.nn.RMSNorm(h), "norm2": torch.nn.RMSNorm(h)}
            )
            for _ in range(SHAPE.num_layers)
        )
        self.norm, self.head = torch.nn.RMSNorm(h), linear(h, SHAPE.vocab_size)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the logits of ``[b, s]`` tokens."""
        x = self.embedding(tokens)
        angles = torch.arange(tokens.shape[1])[:, None] * torch.logspace(0, -4, 32)[None]
        cos, sin = (torch.cat([t, t], -1) for t in (angles.cos(), angles.sin()))

        def turn(t: torch.Tensor) -> torch.Tensor:
            left, right = t.chunk(2, -1)
            return t * cos + torch.cat([-right, left], -1) * sin

        for layer in self.layers:
            y = layer["norm1"](x)
            q, k, v = (layer[n](y).unflatten(-1, (6, 64)).transpose(1, 2) for n in "qkv")
            y = F.scaled_dot_product_attention(turn(q), turn(k), v, is_causal=True)
            x = x + layer["o"](y.transpose(1, 2).flatten(-2))
            y = layer["norm2"](x)
            x = x + layer["down"](F.silu(layer["gate"](y)) * layer["up"](y))
        return self.head(self.norm(x))


def slowest(ranks: list[list[list[float]]]) -> list[list[float]]:
    """Return per round the seconds of the slowest rank, for both of a pair."""
    return np.max(np.array(ranks), axis=0).tolist()


def pair_line(name: str, rounds: list[list[float]], limit: float, *, speed_up: bool = False) -> str:
    ratios = [a / b if speed_up else b / a for a, b in rounds]
    a_s, b_s = (statistics.median(column) for column in zip(*rounds, strict=True))
    ratio = statistics.median(ratios)
    spread = f"{min(ratios):.2f}-{max(ratios):.2f}"
    goal = f"{'>=' if speed_up else '<='} {limit:.2f}"
    return f"| {name} | {a_s:.3f} | {b_s:.3f} | {ratio:.3f} | {spread} | {goal} |"


def pipeline_line(name: str, text: str, ranks: list[list[Any]]) -> str:
    executed: list[float] = []
    expected: list[float] = []
    for one in zip(*ranks, strict=True):
        executed.append(max(seconds for seconds, _, _ in one))
        merged = {key: value for _, _, means in one for key, value in means.items()}
        expected.append(theory_s(text, merged))
    ratios = [a / b for a, b in zip(executed, expected, strict=True)]
    return (
        f"| {name} | {statistics.median(expected):.3f} | {statistics.median(executed):.3f} "
        f"| {statistics.median(ratios):.3f} | {min(ratios):.2f}-{max(ratios):.2f} | <= 1.03 |"
    )


def measured(rounds: int, only: str) -> list[str]:
    lines: list[str] = []

    def add(name: str, line: Callable[[], str]) -> None:
        if only.lower() in name.lower():
            lines.append(line())
            print(lines[-1], file=sys.stderr, flush=True)

    for name, (text, limit) in COPIES.items():
        case = (text, rounds)
        add(
            name,
            lambda n=name, c=case, m=limit: pair_line(
                n, slowest(run_ranks(2, against_copies, *c, timeout_s=600)), m
            ),
        )
    add(
        "one process",
        lambda: pair_line(
            "one process, against plain PyTorch",
            slowest(run_ranks(1, against_plain, rounds, timeout_s=600)),
            1.03,
        ),
    )
    add(
        "CP2",
        lambda: pair_line(
            f"CP2 ring, {LONG_SEQ_LEN:,} tokens, times as fast as one rank",
            slowest(run_ranks(2, context_parallel, rounds, timeout_s=600)),
            1.84,
            speed_up=True,
        ),
    )
    for name, text in PIPELINES.items():
        add(
            name,
            lambda n=name, t=text: pipeline_line(
                f"{n}, against its schedule", t, run_ranks(2, pipeline, t, rounds, timeout_s=600)
            ),
        )
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="only the cases whose name has this in it")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    before = os.getloadavg()[0]
    lines = measured(given.rounds, given.only)
    text = "\n".join(
        [
            "# Runtime overhead on CPU",
            "",
            f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores, load average "
            f"{before:.1f} at the start, gloo over loopback, one thread per process, "
            f"{SHAPE.num_layers} layers, width {SHAPE.hidden_size}, {GBS} x {SEQ_LEN} tokens.",
            "",
            f"Medians of {given.rounds} pairs of steps, taken in turn in the same processes.",
            "",
            "| case | it is held against, s | s/step | ratio | lowest-highest | goal |",
            "|---|---|---|---|---|---|",
            *lines,
            "",
        ]
    )
    if given.out:
        given.out.write_text(text, encoding="utf-8")
    sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
