"""A working launch on another number of GPUs: the batch stays what it is, the layout follows."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from meshwright.checks import Case, illegal
from meshwright.describe.job import Job
from meshwright.describe.model import Model
from meshwright.errors import LaunchError, LayoutError, divisors
from meshwright.frameworks.check import CheckResult, check
from meshwright.frameworks.convert import Known, carried_to, known_of
from meshwright.frameworks.write import launch_files
from meshwright.parallel.layout import (
    Layout,
    Layouts,
    Pipeline,
    row,
    table,
    take,
    to_dict,
    with_columns,
)

_WEIGHTS: Final = {"tp": 1.2, "pp": 1.1, "cp": 1.0, "ep": 0.9, "etp": 0.9, "vpp": 0.3, "mbs": 0.2}
"""What doubling or halving a choice costs: TP is given up last, the micro batch first."""


@dataclass(frozen=True, kw_only=True)
class Resized:
    """A launch on another number of GPUs: what changed, what did not, and its files."""

    read: CheckResult
    before: Layout[int]
    layout: Layout[int]
    job: Job
    changes: dict[str, tuple[object, object]]
    kept: list[str]
    notes: list[str]
    files: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object of the command line."""
        return {
            "framework": self.read.launch.framework,
            "gpus": self.layout.world_size,
            "layout": to_dict(self.layout),
            "before": to_dict(self.before),
            "changes": {k: list(v) for k, v in self.changes.items()},
            "kept": self.kept,
            "notes": self.notes,
            "files": self.files,
        }


def resize(
    source: str | Path | Sequence[str],
    gpus: int,
    *,
    framework: str | None = None,
    model: str | None = None,
    launcher: str = "torchrun",
) -> Resized:
    """Move a launch to ``gpus`` GPUs with its batch kept.

    Sequences a step, sequence length and precision stay, and with them learning rate and tokens.
    Where the degrees cannot stay, the nearest legal ones are taken.

    What the launch says besides (data, tokenizer, optimizer, logging, flags of its own) is kept.

    Raises ``LayoutError`` when no legal layout of the job exists on that many GPUs, and
    ``LaunchError`` for SkyRL's RL trainer, which is not written.
    """
    read = check(source, framework=framework)
    if read.launch.framework == "skyrl" and read.launch.words.get("rl_trainer"):
        rule = "What is written for SkyRL is its SFT trainer; this launch starts the RL trainer."
        remedy = "Change placement and degrees in the launch itself, and check it."
        raise LaunchError("launch", read.launch.program, rule, remedy)
    known = known_of(read, model)
    layout = nearest_legal(known.model, known.job, known.layout, gpus)
    name = read.launch.framework
    carried = carried_to(read, known, name)
    files = launch_files(known.model, None, known.job, layout, name, launcher, carried)
    return Resized(
        read=read,
        before=known.layout,
        layout=layout,
        job=known.job,
        changes=_changes(known.layout, layout),
        kept=_kept(known, layout),
        notes=[
            *notes_on(known.model, known.layout, layout),
            *(f"not carried: {line}" for line in carried.lost),
        ],
        files=files,
    )


def _changes(before: Layout[int], after: Layout[int]) -> dict[str, tuple[object, object]]:
    a, b = to_dict(before), to_dict(after)
    return {k: (a.get(k), b.get(k)) for k in {**a, **b} if a.get(k) != b.get(k)}


def _kept(known: Known, after: Layout[int]) -> list[str]:
    job = known.job
    micro = [job.gbs // (x.mbs * x.dp) for x in (known.layout, after)]
    return [
        f"global batch {job.gbs} sequences, {job.tokens_per_step} tokens a step",
        f"sequence length {job.seq_len}, precision {job.precision.name}",
        f"microbatches a step and pipeline: {micro[0]} before, {micro[1]} now",
    ]


def notes_on(
    model: Model, a: Layout[int], b: Layout[int], divisors_of: tuple[int, int] = (128, 128)
) -> list[str]:
    """Return what silently differs between two layouts of a run: data order, padded vocabulary.

    ``divisors_of`` is what the vocabulary of each is padded to a multiple of, times TP.
    """
    notes: list[str] = []
    if a.dp != b.dp:
        notes.append(
            f"Data parallelism {a.dp} -> {b.dp}: samples come in another order, and saved"
            " positions of the data loader do not carry over; weights and optimizer state do if"
            " the checkpoint is reshardable."
        )
    padded = [
        padded_vocabulary(model.vocab_size, x.tp, divisor)
        for x, divisor in zip((a, b), divisors_of, strict=True)
    ]
    if padded[0] != padded[1]:
        notes.append(
            f"Padded vocabulary {padded[0]} -> {padded[1]} (a multiple of the divisor times tp):"
            " checkpoints do not fit without re-padding, and loss curves are not comparable."
        )
    return notes


def padded_vocabulary(vocab_size: int, tp: int, divisor: int = 128) -> int:
    """Return the vocabulary rounded up to a multiple of ``divisor*tp``, as Megatron pads it."""
    unit = divisor * tp
    return -(-vocab_size // unit) * unit


def nearest_legal(model: Model, job: Job, x: Layout[int], gpus: int) -> Layout[int]:
    """Return the legal layout on ``gpus`` GPUs that is nearest to ``x``, counted in doublings.

    Raises ``LayoutError`` when there is none.
    """
    best: tuple[float, Layout[int]] | None = None
    for candidates in _candidates(model, job, x, gpus):
        legal = take(candidates, ~illegal(Case(model=model, job=job, x=candidates)))
        if not len(legal.tp):
            continue
        away = np.zeros(len(legal.tp))
        for name, weight in _WEIGHTS.items():
            away += weight * np.abs(np.log2(getattr(legal, name) / getattr(x, name)))
        at = int(np.argmin(away))
        if best is None or float(away[at]) < best[0]:
            best = float(away[at]), row(legal, at)
    if best is None:
        rule = f"No layout of {model.name} with {job.gbs} sequences a step is legal on that many."
        near = [n for n in _near_sizes(gpus, x) if _exists(model, job, x, n)]
        remedy = f"Use {' or '.join(map(str, near))} GPUs." if near else "Use another number."
        raise LayoutError("gpus", gpus, rule, remedy)
    return best[1]


def _near_sizes(gpus: int, x: Layout[int]) -> list[int]:
    unit = x.tp * x.cp * x.pp
    below = 1 << max(gpus.bit_length() - 1, 0)
    sizes = {below, 2 * below, gpus // unit * unit, (gpus // unit + 1) * unit}
    return sorted(s for s in sizes if s >= 1 and s != gpus)[:3]


def _exists(model: Model, job: Job, x: Layout[int], gpus: int) -> bool:
    tables = _candidates(model, job, x, gpus)
    return any(not illegal(Case(model=model, job=job, x=t)).all() for t in tables if len(t.tp))


def _candidates(model: Model, job: Job, x: Layout[int], gpus: int) -> list[Layouts]:
    """Return the layouts around ``x`` on ``gpus`` GPUs.

    A stated placement of layers holds for its own pipeline only: elsewhere it is left out.
    """
    sizes = divisors(gpus)
    degrees = {
        "tp": [d for d in sizes if d <= max(8, x.tp)],
        "pp": [d for d in sizes if d <= min(model.num_layers + 2, 64)],
        "cp": [d for d in sizes if d <= max(8, x.cp)],
        "ep": divisors(model.num_experts) if model.is_moe else [1],
        "etp": sorted({1, x.etp}),
        "vpp": sorted({1, x.vpp, max(x.vpp // 2, 1), 2 * x.vpp} if x.vpp > 1 else {1}),
        "mbs": sorted({1, x.mbs, max(x.mbs // 2, 1)}),
    }
    rows = np.array(list(itertools.product(*degrees.values())), dtype=np.int64)
    columns = dict(zip(degrees, rows.T, strict=True))
    unit = columns["tp"] * columns["pp"] * columns["cp"]
    columns["dp"] = gpus // unit
    batch = columns["mbs"] * np.maximum(columns["dp"], 1)
    keep = (gpus % unit == 0) & (job.gbs % batch == 0)
    keep &= (columns["vpp"] == 1) | (columns["pp"] > 1)
    columns = {name: column[keep] for name, column in columns.items()}
    same = (columns["pp"] == x.pp) & (columns["vpp"] == x.vpp)
    free = replace(x, pipeline_layout=None, first=0, last=0, hierarchical_cp=None)
    placed = x.pipeline_layout is not None or bool(x.first) or bool(x.last)
    found = [_table(free, {n: c[~same | (not placed)] for n, c in columns.items()}, x)]
    if placed:
        found.append(_table(x, {n: c[same] for n, c in columns.items()}, x))
    return found


def _table(base: Layout[int], columns: dict[str, Any], x: Layout[int]) -> Layouts:
    number = len(columns["tp"])
    made = take(table([base]), np.zeros(number, dtype=np.int64))
    plain = x.schedule in (Pipeline.one_f_one_b, Pipeline.interleaved)
    schedule = np.where(columns["vpp"] > 1, int(Pipeline.interleaved), int(Pipeline.one_f_one_b))
    replicate = np.where((columns["dp"] * columns["cp"]) % x.dp_replicate == 0, x.dp_replicate, 1)
    cp_comm = np.where(columns["cp"] > 1, x.cp_comm, 0)
    had_sp = bool(x.sp) or x.tp == 1
    return with_columns(
        made,
        **columns,
        sp=(columns["tp"] > 1) & had_sp,
        schedule=schedule if plain else x.schedule,
        dp_replicate=replicate,
        cp_comm=cp_comm,
    )
