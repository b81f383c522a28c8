"""Layouts over 1 to 8 ranks against one process: losses, gradients, parameters.

    python bench/runtime_parity.py [--every N] [--random N] [--seed S] [--out FILE.md]

Every choice alone, every pair of choices that fits 8 ranks, and random legal layouts, on models of
every structure, in float64 (every third one in float32).
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import os
import platform
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from meshwright.errors import LaunchError, MeshwrightError
from meshwright.parallel.layout import from_text
from meshwright.runtime.shape import ModelShape
from meshwright.verify.numerics import VerifyReport, verify
from meshwright.verify.structures import STRUCTURES

CHOICES: dict[str, list[str]] = {
    "tp": ["tp=2", "tp=2 sp=false", "tp=4"],
    "cp": [
        "cp=2",
        "cp=2 cp_comm=all_gather",
        "cp=2 cp_comm=a2a",
        "cp=4 cp_comm=a2a+p2p",
        "cp=4 cp_comm=a2a+p2p hierarchical_cp=2x2",
    ],
    "pp": [
        "pp=2",
        "pp=2 schedule=gpipe",
        "pp=2 vpp=2",
        "pp=2 schedule=zb_h1",
        "pp=2 vpp=2 schedule=zb_v",
        "pp=3 first=1 last=2",
        "pp=2 pipeline_layout=Ettt|tL",
        "pp=2 account_for_embedding=true account_for_loss=true",
        "pp=4 vpp=2 microbatch_group_size=4",
    ],
    "ep": ["ep=2", "ep=2 etp=2", "ep=4", "etp=2"],
    "dp": [
        "dp=2 zero=no_shard",
        "dp=2 zero=optim",
        "dp=2 zero=optim_grads",
        "dp=2 zero=optim_grads_params",
        "dp=4 dp_replicate=2 zero=optim_grads_params",
    ],
    "recompute": ["recompute=full", "recompute=full:block:1", "recompute=core_attn+mlp+moe"],
    "mbs": ["mbs=2"],
    "order": ["order=tp-cp-ep-pp-dp", "order=tp-ep-dp-cp-pp"],
}
MODELS: dict[str, ModelShape | None] = {"default": None, **STRUCTURES}
MIXTURES = ["default", *(name for name, shape in STRUCTURES.items() if shape.moe)]
"""Models with experts: dropless, of limited capacity, padded to it, with biases that move."""
MOST_RANKS = 8


@dataclass(frozen=True)
class Row:
    """One layout on one model, and what came of it."""

    model: str
    text: str
    report: VerifyReport | None
    why: str = ""


def grid() -> Iterator[tuple[str, str]]:
    """Yield (model, layout) for every choice alone and every pair of choices."""
    models = itertools.cycle(MODELS)
    moe_models = itertools.cycle(MIXTURES)
    singles = [(name, text) for name, texts in CHOICES.items() for text in texts]
    combined = [[text] for _, text in singles]
    combined += [[a, b] for (n, a), (m, b) in itertools.combinations(singles, 2) if n != m]
    for parts in combined:
        text = " ".join(parts)
        yield next(moe_models if "ep=" in text or "etp=" in text else models), text


def random_layouts(count: int, seed: int) -> Iterator[tuple[str, str]]:
    """Yield random combinations of three to six choices."""
    rng = random.Random(seed)
    for _ in range(count * 20):
        names = rng.sample(sorted(CHOICES), rng.randint(3, 6))
        text = " ".join(rng.choice(CHOICES[name]) for name in names)
        moe = "ep=" in text or "etp=" in text
        yield rng.choice(MIXTURES if moe else sorted(MODELS)), text


def run(model: str, text: str, dtype: str) -> Row:
    """Verify one layout; a refusal is a row too."""
    try:
        x = from_text(text)
        if x.world_size > MOST_RANKS:
            return Row(model, text, None, "too many ranks")
        return Row(model, text, verify(x, MODELS[model], dtype, timeout_s=120.0))
    except LaunchError as error:
        return Row(model, text, None, f"FAILED {error}")
    except MeshwrightError as error:
        return Row(model, text, None, f"refused: {error}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--random", type=int, default=0, help="random layouts after the grid")
    parser.add_argument("--no-grid", action="store_true")
    parser.add_argument("--every", type=int, default=1, help="draw one case of the grid in so many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    start_s = time.monotonic()
    cases = [] if given.no_grid else list(grid())
    part = sorted(random.Random(given.seed).sample(range(len(cases)), len(cases) // given.every))
    rows = list(measure(cases[i] for i in part))
    ran = sum(row.report is not None for row in rows)
    for row in measure(random_layouts(given.random, given.seed)) if given.random else ():
        if sum(r.report is not None for r in rows) - ran >= given.random:
            break
        rows.append(row)
    text = summary(rows, time.monotonic() - start_s)
    if given.out:
        given.out.write_text(text, encoding="utf-8")
    sys.stdout.write(text)
    bad = [r for r in rows if r.why.startswith("FAILED") or (r.report and not r.report.ok)]
    return 1 if bad else 0


def measure(cases: Iterator[tuple[str, str]]) -> Iterator[Row]:
    for number, (model, text) in enumerate(cases):
        row = run(model, text, "float32" if number % 3 == 0 else "float64")
        if row.report is not None or row.why.startswith("FAILED"):
            state = row.why or ("ok" if row.report and row.report.ok else "DIFFERS")
            print(f"{state:8} {model:11} {text}", file=sys.stderr, flush=True)
        yield row


def cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if platform.system() == "Linux" else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def summary(rows: list[Row], seconds: float) -> str:
    done = [(row, row.report) for row in rows if row.report is not None]
    lines = [
        "# Runtime parity: layouts against one process",
        "",
        f"{datetime.date.today()}, {cpu()}, {os.cpu_count()} cores, gloo on CPU, "
        f"{seconds:.0f} s for all.",
        "3 AdamW steps with clipping; largest relative differences of losses, of each gradient to "
        "its norm, of each parameter to its norm.",
        "",
        f"{len(done)} layouts ran, {sum(report.ok for _, report in done)} equal one process, "
        f"{sum(row.why.startswith('refused') for row in rows)} were refused before start, "
        f"{sum(row.why.startswith('FAILED') for row in rows)} failed.",
        "",
        "| dtype | layouts | loss | gradient | parameter |",
        "|---|---|---|---|---|",
    ]
    for dtype in ("float32", "float64"):
        of = [report for _, report in done if report.dtype == dtype]
        if of:
            worst = (
                max(r.max_loss_diff for r in of),
                max(r.max_grad_diff for r in of),
                max(r.max_param_diff for r in of),
            )
            lines.append(f"| {dtype} | {len(of)} | " + " | ".join(f"{w:.1e}" for w in worst) + " |")
    lines += ["", "| model | layout | ranks | dtype | loss | gradient | parameter | ok |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for row, r in done:
        lines.append(
            f"| {row.model} | `{row.text}` | {r.ranks} | {r.dtype} | {r.max_loss_diff:.1e} | "
            f"{r.max_grad_diff:.1e} | {r.max_param_diff:.1e} | {'yes' if r.ok else 'NO'} |"
        )
    refused = [row for row in rows if row.why.startswith(("refused", "FAILED"))]
    lines += ["", "Refused before start (or failed):", ""]
    lines += [f"- {row.model} `{row.text}`: {row.why}" for row in refused]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
