"""A layout against one process: losses, every gradient and every updated parameter."""

# torch annotates some functions only in part.
# pyright: reportUnknownMemberType=false
from __future__ import annotations

import importlib
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from meshwright.describe.job import Execution
from meshwright.errors import LayoutError, did_you_mean
from meshwright.parallel.layout import Layout, Zero, from_text, layout, to_dict
from meshwright.runtime.engine import Engine, Settings
from meshwright.runtime.flat_buffer import FlatBuffer
from meshwright.runtime.launch import run_ranks
from meshwright.runtime.legality import check_runnable
from meshwright.runtime.optimizer import OptimizerSettings
from meshwright.runtime.parameters import Box
from meshwright.runtime.shape import ModelShape
from meshwright.verify.small import Case, default_shape, shrink

Floats = NDArray[np.float64]

STEPS = 3
MOST_RANKS = 64
"""Every rank is a process of this machine."""
TOLERANCE: Mapping[str, tuple[float, float, float]] = {
    "float32": (1e-5, 1e-4, 1e-4),
    "float64": (1e-10, 1e-10, 1e-10),
}
"""Largest relative difference of losses, gradients and parameters."""
NEGLIGIBLE = 1e-6
"""Gradients below this part of the whole gradient's norm are rounding noise: compared to it."""
WHOLE_NORM = "norm of the whole gradient"
"""Compared too, since AdamW's steps hardly change when every gradient is scaled alike."""


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """What ``verify`` found; differences are relative, ``worst`` is the parameter with the largest.

    Losses (those of prediction depths and routers too) to the reference loss, gradients (and the
    norm that they are clipped by) and parameters to their own norm.
    """

    layout: Layout[int]
    shape: ModelShape
    ranks: int
    ok: bool
    dtype: str
    losses: list[float]
    reference_losses: list[float]
    max_loss_diff: float
    max_grad_diff: float
    max_param_diff: float
    worst: str
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return the report as the JSON object of the command line."""
        return {
            "layout": to_dict(self.layout),
            "ranks": self.ranks,
            "ok": self.ok,
            "dtype": self.dtype,
            "losses": self.losses,
            "reference_losses": self.reference_losses,
            "max_loss_diff": self.max_loss_diff,
            "max_grad_diff": self.max_grad_diff,
            "max_param_diff": self.max_param_diff,
            "worst": self.worst,
            "seconds": self.seconds,
        }


@dataclass(frozen=True, kw_only=True)
class Part:
    """Elements begin..end, laid flat, of the local tensor that ``box`` describes."""

    box: Box
    local_shape: tuple[int, ...]
    begin: int
    values: Floats


@dataclass(frozen=True, kw_only=True)
class _RankResult:
    """Per step the losses (main, prediction depths, routers), gradients and their norm."""

    losses: list[list[float]]
    norms: list[float]
    grads: list[list[Part]]
    params: list[Part]


def verify(
    layout_given: str | Layout[int],
    model: ModelShape | None = None,
    dtype: str = "float32",
    timeout_s: float = 120.0,
    execution: Execution | None = None,
) -> VerifyReport:
    """Run 3 training steps of a small model under a layout and on one process, and compare.

    ``model`` gives the structure (``None``: a small one that the layout can use); its sizes are
    made small. Every rank is a local process that talks by gloo. ``execution`` has the switches of
    communication beside compute.

    Raises ``LayoutError`` before any process starts when the layout cannot run, ``LaunchError``
    naming rank and cause when a rank fails or ``timeout_s`` passes.
    """
    start_s = time.monotonic()
    x = from_text(layout_given) if isinstance(layout_given, str) else layout_given
    case = prepare(x, model)
    check_dtype(dtype)
    execution = execution or Execution()
    if x.recompute:
        # Checkpointing imports it at first use, 1.3 s: once here, not in every rank.
        importlib.import_module("torch._dynamo")
    results = run_ranks(
        x.world_size, _run_rank, x, case, dtype, execution, timeout_s=timeout_s, extra=1
    )
    ranks, reference = cast("list[_RankResult]", results[:-1]), results[-1]
    return _report(x, case, dtype, ranks, cast("_RankResult", reference), start_s)


def prepare(x: Layout[int], model: ModelShape | None = None) -> Case:
    """Return the small model and batch that ``verify`` runs. Raises ``LayoutError``."""
    if x.world_size > MOST_RANKS:
        raise LayoutError(
            "layout.world_size",
            x.world_size,
            f"Every rank runs as a process of this machine, at most {MOST_RANKS}.",
            "Verify the same layout with smaller degrees.",
        )
    case = shrink(model or default_shape(x), x)
    check_runnable(case.shape, x, seq_len=case.seq_len, gbs=case.gbs)
    return case


def check_dtype(dtype: str) -> None:
    """Raise ``LayoutError`` unless the dtype has a tolerance."""
    if dtype not in TOLERANCE:
        raise LayoutError("dtype", dtype, "Unknown dtype.", did_you_mean(dtype, TOLERANCE))


def _run_rank(
    rank: int, x: Layout[int], case: Case, dtype: str, execution: Execution
) -> _RankResult:
    capacity_layout = x
    if rank >= x.world_size:
        x, rank = _one_process(x), 0
    settings = Settings(
        seq_len=case.seq_len,
        gbs=case.gbs,
        dtype=torch.float64 if dtype == "float64" else torch.float32,
        noise=0.02,
        execution=execution,
        capacity_layout=capacity_layout,
        optimizer=OptimizerSettings(lr=1e-3, clip_norm=0.1),
    )
    engine = Engine(case.shape, x, settings, rank=rank)
    generator = torch.Generator().manual_seed(settings.seed)
    losses: list[list[float]] = []
    norms: list[float] = []
    grads: list[list[Part]] = []
    for _ in range(STEPS):
        size = (case.gbs, case.seq_len + 1)
        batch = torch.randint(0, case.shape.vocab_size, size, generator=generator)
        found, of_routers = engine.forward_backward(engine.own_rows(batch))
        grads.append(
            [
                Part(
                    box=piece.parameter.box,
                    local_shape=tuple(piece.parameter.shape),
                    begin=piece.begin,
                    values=_array(piece.grad),
                )
                for piece in engine.dp.pieces()
            ]
        )
        norm, _ = engine.update(settings.optimizer.lr)
        losses.append([*found, of_routers])
        norms.append(norm)
    return _RankResult(
        losses=losses, norms=norms, grads=grads, params=_parameters(engine.dp.buffers)
    )


def _one_process(x: Layout[int]) -> Layout[int]:
    return layout(tp=1, mbs=x.mbs, zero=Zero.no_shard)


def _parameters(buffers: list[FlatBuffer]) -> list[Part]:
    parts: list[Part] = []
    for buffer in buffers:
        buffer.gather()
        parts += [
            Part(
                box=member.box,
                local_shape=tuple(member.shape),
                begin=0,
                values=_array(member.detach().flatten()),
            )
            for member in buffer.members
        ]
        buffer.release()
    return parts


def _array(x: Tensor) -> Floats:
    return x.detach().to(torch.float64, copy=True).numpy()


def _relative(found: float, expected: float) -> float:
    """Return the difference relative to what is expected; infinite if that means nothing."""
    if found == expected and math.isfinite(expected):
        return 0.0
    difference = abs(found - expected) / abs(expected) if expected else math.inf
    return difference if math.isfinite(difference) else math.inf


@dataclass
class _Differences:
    """Per parameter: squared norm of the reference and of the difference, and what was covered."""

    reference: dict[str, Floats]
    squares: dict[str, dict[tuple[object, ...], float]] = field(
        default_factory=lambda: dict[str, dict[tuple[object, ...], float]]()
    )
    covered: dict[str, NDArray[np.bool_]] = field(
        default_factory=lambda: dict[str, NDArray[np.bool_]]()
    )

    def add(self, part: Part) -> None:
        """Compare a part of a rank; of equal parts on several ranks the worst counts."""
        box = part.box
        whole = self.reference[box.name]
        expected, seen = np.zeros(part.local_shape), np.zeros(part.local_shape, dtype=np.bool_)
        here = tuple(slice(o, o + n) for o, n in zip(box.offsets, part.local_shape, strict=True))
        inside = tuple(slice(0, n) for n in whole[here].shape)
        expected[inside] = whole[here]
        end = part.begin + part.values.size
        difference = float(np.square(part.values - expected.ravel()[part.begin : end]).sum())
        if not math.isfinite(difference):
            # Against NaN no comparison holds: it would not count as the worst.
            difference = math.inf
        key = (box.offsets, part.begin)
        squares = self.squares.setdefault(box.name, {})
        squares[key] = max(squares.get(key, 0.0), difference)
        seen.ravel()[part.begin : end] = True
        covered = self.covered.setdefault(box.name, np.zeros(whole.shape, dtype=np.bool_))
        covered[here] |= seen[inside]

    def relative(self, negligible: float = 0.0) -> dict[str, float]:
        """Return each parameter's difference relative to its norm; not covered is infinite.

        Where the norm is at most ``negligible`` of the norm of all, relative to the latter.
        """
        norms = {name: float(np.linalg.norm(whole)) for name, whole in self.reference.items()}
        total = math.sqrt(sum(norm**2 for norm in norms.values()))
        found: dict[str, float] = {}
        for name, norm in norms.items():
            if name not in self.covered or not self.covered[name].all():
                found[name] = math.inf
                continue
            difference = math.sqrt(sum(self.squares[name].values()))
            scale = norm if norm > negligible * total else total
            ratio = difference / scale if scale else difference and math.inf
            found[name] = ratio if math.isfinite(ratio) else math.inf
        return found


def _whole(parts: list[Part]) -> dict[str, Floats]:
    """Put the parts of a one-process run together, without padding rows."""
    found: dict[str, Floats] = {}
    for part in parts:
        shape = part.box.shape
        values = part.values.reshape(part.local_shape)
        found[part.box.name] = values[tuple(slice(0, n) for n in shape)]
    return found


def compare(reference: list[Part], ranks: list[list[Part]], negligible: float) -> dict[str, float]:
    """Return how far the ranks' parts of each parameter are from the reference's, relatively."""
    differences = _Differences(_whole(reference))
    for parts in ranks:
        for part in parts:
            differences.add(part)
    return differences.relative(negligible)


def _loss_difference(ranks: list[_RankResult], reference: _RankResult) -> float:
    return max(
        _relative(found, expected)
        for rank in ranks
        for step, steps in zip(rank.losses, reference.losses, strict=True)
        for found, expected in zip(step, steps, strict=True)
    )


def _gradient_differences(ranks: list[_RankResult], reference: _RankResult) -> dict[str, float]:
    """Return the largest difference of every gradient, and of their norm, over the steps."""
    grads: dict[str, float] = {}
    for step in range(STEPS):
        found = compare(reference.grads[step], [rank.grads[step] for rank in ranks], NEGLIGIBLE)
        expected = reference.norms[step]
        found[WHOLE_NORM] = max(_relative(rank.norms[step], expected) for rank in ranks)
        for name, difference in found.items():
            grads[name] = max(grads.get(name, 0.0), difference)
    return grads


def _report(
    x: Layout[int],
    case: Case,
    dtype: str,
    ranks: list[_RankResult],
    reference: _RankResult,
    start_s: float,
) -> VerifyReport:
    loss_diff = _loss_difference(ranks, reference)
    grads = _gradient_differences(ranks, reference)
    params = compare(reference.params, [rank.params for rank in ranks], 0.0)
    worst_grad = max(grads, key=lambda name: grads[name])
    worst_param = max(params, key=lambda name: params[name])
    found = (loss_diff, grads[worst_grad], params[worst_param])
    loss_ok, grads_ok, params_ok = (
        value <= limit for value, limit in zip(found, TOLERANCE[dtype], strict=True)
    )
    return VerifyReport(
        layout=x,
        shape=case.shape,
        ranks=x.world_size,
        ok=loss_ok and grads_ok and params_ok,
        dtype=dtype,
        losses=[max(rank.losses[i][0] for rank in ranks) for i in range(STEPS)],
        reference_losses=[losses[0] for losses in reference.losses],
        max_loss_diff=found[0],
        max_grad_diff=found[1],
        max_param_diff=found[2],
        worst=worst_param if grads_ok and not params_ok else worst_grad,
        seconds=time.monotonic() - start_s,
    )
