"""What parallel execution costs on this machine, side by side in one run.

    python bench/runtime_overhead.py [--rounds 5] [--out bench/results/runtime_overhead.md]

A 20M-parameter Llama, float32, one thread per process, forward + backward + AdamW. Every layout of
two ranks is timed against two independent copies on the same two cores; rounds alternate between
the cases, and the smallest time of each counts. Pipelines of sleeping stages show a schedule
without hardware for it.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

from meshwright.parallel.layout import Pipeline, from_text, layout
from meshwright.parallel.pipeline import build_schedule, simulate
from meshwright.runtime.engine import Engine, Settings
from meshwright.runtime.launch import run_ranks
from meshwright.runtime.pipeline_parallel import message_of
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
STEPS = 3
CASES = {
    "two independent copies": ("copies", GBS, SEQ_LEN),
    "TP2 with SP": ("tp=2", GBS, SEQ_LEN),
    "TP2 without SP": ("tp=2 sp=false", GBS, SEQ_LEN),
    "DP2, no_shard": ("dp=2 zero=no_shard mbs=2", GBS, SEQ_LEN),
    "DP2, optim (ZeRO-1)": ("dp=2 zero=optim mbs=2", GBS, SEQ_LEN),
    "DP2, optim_grads_params (ZeRO-3)": ("dp=2 zero=optim_grads_params mbs=2", GBS, SEQ_LEN),
    "PP2 1F1B, 4 microbatches": ("pp=2", GBS, SEQ_LEN),
    "PP2 interleaved, vpp 2": ("pp=2 vpp=2", GBS, SEQ_LEN),
    "PP2 ZB-V": ("pp=2 vpp=2 schedule=zb_v", GBS, SEQ_LEN),
}


Times = tuple[float, float]
"""Seconds of wall clock and of this process's CPU, the smallest of several steps."""


def timed(step: Callable[[], object]) -> Times:
    step()
    wall_s = cpu_s = float("inf")
    for _ in range(STEPS):
        if dist.is_initialized():
            dist.barrier()
        start_s, cpu_start_s = time.perf_counter(), time.process_time()
        step()
        wall_s = min(wall_s, time.perf_counter() - start_s)
        cpu_s = min(cpu_s, time.process_time() - cpu_start_s)
    return wall_s, cpu_s


def _tokens(gbs: int, seq_len: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, SHAPE.vocab_size, (gbs, seq_len + 1), generator=generator)


def time_layout(rank: int, text: str, gbs: int, seq_len: int) -> Times:
    copies = text == "copies"
    x = layout(mbs=gbs // 2) if copies else from_text(text)
    if x.pp == 1 and not copies and x.dp == 1:
        x = replace(x, mbs=gbs)
    own = gbs // 2 if copies else gbs
    settings = Settings(seq_len=seq_len, gbs=own)
    engine = Engine(SHAPE, x, settings, rank=0 if copies else rank)
    rows = engine.own_rows(_tokens(own, seq_len))
    return timed(lambda: engine.step(rows))


def time_plain(rank: int, gbs: int, seq_len: int) -> Times:
    """The same model in plain PyTorch, with its optimizer."""
    model = Plain()
    adamw = torch.optim.AdamW(model.parameters(), fused=True)
    rows = _tokens(gbs, seq_len)

    def step() -> None:
        loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad(set_to_none=True)

    return timed(step)


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


FORWARD_S = 0.02


def sleep_through(rank: int, kind: int, pp: int, vpp: int, microbatches: int) -> float:
    """Run a schedule whose stages sleep: forward t, backward 2t, messages of one element."""
    schedule = build_schedule(Pipeline(kind), pp, vpp, microbatches)
    owners = schedule.rank_of_stage
    kept: list[tuple[torch.Tensor, object]] = []

    def tag(kind: str, stage: int, microbatch: int) -> int:
        return ((kind == "F") * len(owners) + stage) * microbatches + microbatch

    dist.barrier()
    start_s = time.perf_counter()
    for action in schedule.ranks[rank]:
        stage = schedule.stage(rank, action.chunk)
        source = stage - 1 if action.kind == "F" else stage + 1
        if 0 <= source < len(owners) and owners[source] != rank:
            name = "F" if action.kind == "F" else "B"
            work = dist.irecv(
                torch.zeros(1), owners[source], tag=tag(name, stage, action.microbatch)
            )
            assert work is not None
            work.wait()
        time.sleep(FORWARD_S / vpp * (1 if action.kind == "F" else 2))
        sent = message_of(schedule, rank, action)
        if sent is not None and sent[1] != rank:
            message, to = sent
            x = torch.zeros(1)
            name = tag(message.kind, message.stage, message.microbatch)
            kept.append((x, dist.isend(x, to, tag=name)))
    dist.barrier()
    return time.perf_counter() - start_s


def simulated_s(kind: int, pp: int, vpp: int, microbatches: int) -> float:
    import numpy as np

    schedule = build_schedule(Pipeline(kind), pp, vpp, microbatches)
    forward = np.full((1, pp * vpp), FORWARD_S / vpp)
    return float(np.max(simulate(schedule, forward, 2 * forward, np.zeros(1)).step_s))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    best: dict[str, Times] = {}

    def keep(name: str, ranks: list[Times]) -> None:
        wall_s, cpu_s = max(r[0] for r in ranks), sum(r[1] for r in ranks)
        before = best.get(name, (float("inf"), float("inf")))
        best[name] = min(before[0], wall_s), min(before[1], cpu_s)
        print(f"{name}: {wall_s:.3f} s, {cpu_s:.3f} s CPU", file=sys.stderr, flush=True)

    for _ in range(given.rounds):
        for name, (text, gbs, seq_len) in CASES.items():
            keep(name, run_ranks(2, time_layout, text, gbs, seq_len, timeout_s=600))
        keep("plain", run_ranks(1, time_plain, 2, SEQ_LEN, timeout_s=600))
        keep("one", run_ranks(1, time_layout, "copies", GBS, SEQ_LEN, timeout_s=600))
        keep("cp1", run_ranks(1, time_layout, "tp=1", 1, 4096, timeout_s=600))
        keep("cp2", run_ranks(2, time_layout, "cp=2", 1, 4096, timeout_s=600))
    pipelines = [
        (Pipeline.one_f_one_b, 8, 1, 8),
        (Pipeline.one_f_one_b, 8, 1, 32),
        (Pipeline.interleaved, 8, 2, 8),
        (Pipeline.interleaved, 8, 4, 16),
    ]
    sleeping = [
        (
            case,
            min(
                max(run_ranks(case[1], sleep_through, *map(int, case), timeout_s=120))
                for _ in range(2)
            ),
        )
        for case in pipelines
    ]
    text = summary(best, sleeping)
    if given.out:
        given.out.write_text(text, encoding="utf-8")
    sys.stdout.write(text)
    return 0


def summary(
    best: dict[str, Times], sleeping: list[tuple[tuple[Pipeline, int, int, int], float]]
) -> str:
    copies = best["two independent copies"]
    load = os.getloadavg()[0]
    lines = [
        "# Runtime overhead on CPU",
        "",
        f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores, "
        f"load average {load:.1f}, gloo over loopback, one thread per process.",
        "",
        "Smallest of several rounds. CPU seconds are those of all ranks together: they count what",
        "is computed and copied, not what is waited for, and bear a busy machine better.",
        "",
        f"| {SHAPE.num_layers} layers, width {SHAPE.hidden_size}, {GBS} x {SEQ_LEN} tokens "
        "| s/step | against two copies | CPU s/step | against two copies |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {n} | {best[n][0]:.3f} | {best[n][0] / copies[0]:.2f} "
        f"| {best[n][1]:.3f} | {best[n][1] / copies[1]:.2f} |"
        for n in CASES
    ]
    one, plain, cp1, cp2 = (best[name] for name in ("one", "plain", "cp1", "cp2"))
    lines += [
        "",
        f"One process against plain PyTorch: {one[0] / plain[0]:.3f} of its seconds, "
        f"{one[1] / plain[1]:.3f} of its CPU seconds ({one[1]:.3f}, {plain[1]:.3f}).",
        f"CP2 (ring) on one sequence of 4,096 tokens: {cp1[0] / cp2[0]:.2f}x one rank, "
        f"{cp2[1] / cp1[1]:.2f} of its CPU seconds.",
        "",
        "Sleeping stages, 8 pipeline ranks on these cores, against the planner's simulation:",
        "",
        "| schedule | vpp | microbatches | simulated s | executed s | ratio |",
        "|---|---|---|---|---|---|",
    ]
    for (kind, pp, vpp, microbatches), executed_s in sleeping:
        theory_s = simulated_s(kind, pp, vpp, microbatches)
        lines.append(
            f"| {kind.name} | {vpp} | {microbatches} | {theory_s:.3f} | {executed_s:.3f} "
            f"| {executed_s / theory_s:.3f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
