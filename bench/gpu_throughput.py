"""Model FLOP/s and MFU of one GPU, beside plain compiled PyTorch of the same shape, step by step.

    python bench/gpu_throughput.py [--steps 20] [--out PATH]
    python bench/gpu_throughput.py --smoke                the same on a CPU with a tiny shape

A 1B-class Llama and a small mixture of experts train in bfloat16 through ``torch.compile``: the
runtime (bfloat16 weights, float32 master weights), and a model written as one would with PyTorch
alone (float32 weights under autocast). A step of one follows a step of the other; medians count.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meshwright.cost.flops import model_flops_per_step
from meshwright.describe.gpu import load_gpu
from meshwright.describe.job import Job
from meshwright.errors import ClusterError
from meshwright.parallel.layout import layout
from meshwright.runtime.engine import Engine, Settings
from meshwright.runtime.shape import ModelShape, MoeShape
from meshwright.verify.described import described


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model and its batch: ``seq_len`` in tokens, ``gbs`` in sequences, all in one pass."""

    shape: ModelShape
    seq_len: int
    gbs: int


LLAMA = ModelShape(
    hidden_size=2048,
    num_layers=16,
    num_heads=32,
    num_kv_heads=8,
    head_dim=64,
    ffn_hidden_size=8192,
    vocab_size=128256,
    tie_word_embeddings=True,
)
MOE = ModelShape(
    hidden_size=1024,
    num_layers=12,
    num_heads=16,
    num_kv_heads=16,
    head_dim=64,
    ffn_hidden_size=4096,
    vocab_size=32000,
    moe=MoeShape(num_experts=16, topk=4, ffn_hidden_size=1024),
    moe_layers=tuple(range(12)),
)
CASES = {
    "Llama, 1.2B": Case(shape=LLAMA, seq_len=4096, gbs=2),
    "MoE, 16 experts, top 4": Case(shape=MOE, seq_len=4096, gbs=4),
}


def tiny(case: Case) -> Case:
    """Return the case with sizes that a CPU trains in a moment."""
    moe = case.shape.moe
    small = replace(
        case.shape,
        hidden_size=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2 if case.shape.num_kv_heads < case.shape.num_heads else 4,
        head_dim=16,
        ffn_hidden_size=128,
        vocab_size=128,
        moe=None if moe is None else replace(moe, num_experts=4, topk=2, ffn_hidden_size=32),
        moe_layers=case.shape.moe_layers[:2],
    )
    return Case(shape=small, seq_len=64, gbs=2)


class PlainLayer(nn.Module):
    """A decoder layer with PyTorch alone."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        h, d = shape.hidden_size, shape.head_dim
        self.shape = shape
        self.norms = nn.ModuleList(nn.RMSNorm(h) for _ in range(2))
        self.q = nn.Linear(h, shape.num_heads * d, bias=False)
        self.kv = nn.Linear(h, 2 * shape.num_kv_heads * d, bias=False)
        self.o = nn.Linear(shape.num_heads * d, h, bias=False)
        if shape.moe is None:
            self.gate_up = nn.Linear(h, 2 * shape.ffn_hidden_size, bias=False)
            self.down = nn.Linear(shape.ffn_hidden_size, h, bias=False)
        else:
            e, f = shape.moe.num_experts, shape.moe.ffn_hidden_size
            self.router = nn.Linear(h, e, bias=False)
            self.up_ehf = nn.Parameter(torch.randn(e, h, 2 * f) * 0.02)
            self.down_efh = nn.Parameter(torch.randn(e, f, h) * 0.02)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return the residual stream ``[b, s, h]`` after the layer."""
        shape, y = self.shape, self.norms[0](x)

        def heads(t: Tensor) -> Tensor:
            return t.unflatten(-1, (-1, shape.head_dim)).transpose(1, 2)

        def turn(t: Tensor) -> Tensor:
            left, right = t.chunk(2, -1)
            return (t * cos + torch.cat([-right, left], -1) * sin).to(t.dtype)

        k, v = (heads(t) for t in self.kv(y).chunk(2, -1))
        q = turn(heads(self.q(y)))
        y = F.scaled_dot_product_attention(q, turn(k), v, is_causal=True, enable_gqa=True)
        x = x + self.o(y.transpose(1, 2).flatten(-2))
        y = self.norms[1](x)
        return x + (self.mlp(y) if shape.moe is None else self.experts(y))

    def mlp(self, y: Tensor) -> Tensor:
        """Return the feed-forward network's output."""
        gate, up = self.gate_up(y).chunk(2, -1)
        return self.down(F.silu(gate) * up)

    def experts(self, y: Tensor) -> Tensor:
        """Return the chosen experts' outputs: rows sorted by expert, two grouped products."""
        assert self.shape.moe is not None
        moe, rows = self.shape.moe, y.flatten(0, 1)
        weights, chosen = self.router(rows).float().softmax(-1).topk(moe.topk)
        weights = weights / weights.sum(-1, keepdim=True)
        order = chosen.flatten().argsort()
        counts = torch.zeros(moe.num_experts, dtype=torch.int32, device=y.device)
        counts = counts.index_add(0, chosen.flatten(), torch.ones_like(chosen.flatten()).int())
        ends = counts.cumsum(0).int()
        half = torch.bfloat16
        sent = rows[order // moe.topk].to(half)
        gate, up = F.grouped_mm(sent, self.up_ehf.to(half), offs=ends).chunk(2, -1)
        out = F.grouped_mm(F.silu(gate) * up, self.down_efh.to(half), offs=ends)
        out = out * weights.flatten()[order].unsqueeze(-1)
        summed = torch.zeros_like(rows, dtype=out.dtype).index_add(0, order // moe.topk, out)
        return summed.to(y.dtype).view_as(y)


class Plain(nn.Module):
    """The whole model with PyTorch alone."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.embedding = nn.Embedding(shape.vocab_size, shape.hidden_size)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.layers = nn.ModuleList(PlainLayer(shape) for _ in range(shape.num_layers))
        self.norm = nn.RMSNorm(shape.hidden_size)
        self.head = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)
        if shape.tie_word_embeddings:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return the logits of ``[b, s]`` tokens."""
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.head(self.norm(x))


def plain_step(case: Case, rows: Tensor, backend: str) -> Callable[[], float]:
    """Return a training step of the plain model."""
    device = rows.device
    model = Plain(case.shape).to(device)
    for layer in model.layers:
        layer.compile(backend=backend)
    adamw = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    half = case.shape.head_dim // 2
    angles = torch.arange(case.seq_len, device=device)[:, None] * torch.logspace(
        0, -4, half, device=device
    )
    cos, sin = (torch.cat([t, t], -1) for t in (angles.cos(), angles.sin()))

    def step() -> float:
        with torch.autocast(device.type, torch.bfloat16):
            logits = model(rows[:, :-1], cos, sin)
            loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def own_step(case: Case, rows: Tensor, backend: str) -> Callable[[], float]:
    """Return a training step of the runtime."""
    settings = Settings(
        seq_len=case.seq_len,
        gbs=case.gbs,
        dtype=torch.bfloat16,
        device=rows.device,
        compile=backend,
    )
    engine = Engine(case.shape, layout(mbs=case.gbs), settings)
    return lambda: engine.step(rows).loss


def timed_s(step: Callable[[], float], device: torch.device) -> float:
    """Return the seconds of a step, which ends by reading its loss."""
    start_s = time.perf_counter()
    loss = step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    if loss - loss != 0.0:
        raise ArithmeticError(f"the loss is {loss}")
    return time.perf_counter() - start_s


def measured(name: str, case: Case, steps: int, backend: str, device: torch.device) -> list[str]:
    """Return a line of the table for the runtime and for plain PyTorch."""
    generator = torch.Generator().manual_seed(0)
    size = (case.gbs, case.seq_len + 1)
    rows = torch.randint(0, case.shape.vocab_size, size, generator=generator).to(device)
    makers = {"meshwright": own_step, "plain PyTorch": plain_step}
    runs = {who: maker(case, rows, backend) for who, maker in makers.items()}
    for step in runs.values():
        timed_s(step, device), timed_s(step, device)
    seconds: dict[str, list[float]] = {who: [] for who in runs}
    for _ in range(steps):
        for who, step in runs.items():
            seconds[who].append(timed_s(step, device))
    flops = model_flops_per_step(described(case.shape), Job(seq_len=case.seq_len, gbs=case.gbs))
    peak = peak_flops_per_s(device)
    lines: list[str] = []
    for who, found in seconds.items():
        median_s = statistics.median(found)
        rate = flops / median_s
        mfu = f"{rate / peak:.1%}" if peak else "unknown"
        tokens = case.gbs * case.seq_len / median_s
        lines.append(
            f"| {name} | {who} | {median_s:.4f} | {min(found):.4f}-{max(found):.4f} "
            f"| {tokens:,.0f} | {rate / 1e12:.3g} | {mfu} |"
        )
        print(lines[-1], file=sys.stderr, flush=True)
    return lines


def peak_flops_per_s(device: torch.device) -> float:
    """Return the GPU's dense bfloat16 rate by its data sheet, 0 where it is not known."""
    if device.type != "cuda":
        return 0.0
    try:
        return load_gpu(torch.cuda.get_device_name(device)).peak_flops_per_s["bf16"]
    except ClusterError:
        return 0.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--smoke", action="store_true", help="a tiny shape, also on a CPU")
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if not (torch.cuda.is_available() or given.smoke):
        print("error: this benchmark needs a GPU; --smoke tries it on a CPU", file=sys.stderr)
        return 2
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, tiny shapes"
    lines: list[str] = []
    for name, case in CASES.items():
        chosen, shown = (tiny(case), f"tiny: {name}") if given.smoke else (case, name)
        lines += measured(shown, chosen, given.steps, given.backend, device)
    text = "\n".join(
        [
            "# One GPU in bfloat16, compiled",
            "",
            f"{datetime.date.today()}, {where}, torch {torch.__version__}; medians of "
            f"{given.steps} steps, taken in turn in one process.",
            "",
            "| model | run | s/step | lowest-highest | tokens/s | model TFLOP/s | MFU |",
            "|---|---|---|---|---|---|---|",
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
