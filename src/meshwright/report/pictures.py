"""Three pictures of a plan as SVG: memory by stage, where the step goes, when the pipeline runs."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from meshwright.cost.step import MEMORY_TERMS
from meshwright.cost.timeline import Ran, timeline
from meshwright.plans import Plan
from meshwright.units import format_s

COLOURS = (
    "#4477aa",
    "#66ccee",
    "#228833",
    "#ccbb44",
    "#ee6677",
    "#aa3377",
    "#bbbbbb",
    "#8c6d46",
    "#222255",
)
"""Paul Tol's bright scheme, told apart by the colour-blind, and two dark ones."""
_ACTIONS = {
    "F": ("forward", "#4477aa"),
    "B": ("backward", "#228833"),
    "I": ("backward: inputs", "#66bb77"),
    "W": ("backward: weights", "#ccbb44"),
}
_STYLE: dict[str, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "meshwright",
    "svg.fonttype": "none",
}
MOST_NUMBERED = 16
"""Micro-batches up to which each is numbered in the timeline."""


def memory(plan: Plan) -> str:
    """Return stacked bars: what every pipeline stage holds at its peak, against the capacity."""
    e = plan.estimate
    with _styled():
        height = 1.4 + 0.26 * len(e.stages)
        figure, ax = _axes(height)
        names = [f"stage {s['stage']} ({s['layers']} layers)" for s in e.stages]
        left = [0.0] * len(names)
        for term, colour in zip(MEMORY_TERMS, COLOURS, strict=False):
            sizes = [s[term] / 2**30 for s in e.stages]
            ax.barh(names, sizes, left=left, color=colour, label=_name(term), height=0.75)
            left = [a + b for a, b in zip(left, sizes, strict=True)]
        for y, total in enumerate(left):
            ax.text(total, y, f" {total:.1f}", va="center", fontsize=8)
        capacity = e.capacity_bytes / 2**30
        ax.axvline(capacity, color="black", linestyle="--", linewidth=1)
        ax.text(capacity, -0.9, f"capacity {capacity:.1f} ", ha="right", va="center", fontsize=8)
        ax.set_ylim(len(names) - 0.5, -1.3)
        ax.set_xlim(0, 1.08 * max(capacity, *left))
        ax.set_xlabel("GiB a GPU")
        _legend(ax, figure, height)
        return _svg(figure)


def step(plan: Plan) -> str:
    """Return one bar: the terms of the step time, in order."""
    e = plan.estimate
    with _styled():
        figure, ax = _axes(1.8)
        left = 0.0
        for k, (term, seconds) in enumerate(e.time.items()):
            share = seconds / e.step_time_s
            if share >= 5e-4:
                label = f"{_name(term)} {share:.1%}"
                ax.barh([""], [seconds], left=left, color=COLOURS[k], label=label)
            left += seconds
        ax.set_xlim(0, e.step_time_s)
        ax.set_xlabel(f"seconds; the step takes {format_s(e.step_time_s)}")
        _legend(ax, figure, 1.8)
        return _svg(figure)


def pipeline(plan: Plan) -> tuple[str, int]:
    """Return when each pipeline rank runs what, and of how many micro-batches: enough to see it."""
    x = plan.layout
    num_microbatches = plan.job.gbs // (x.dp * x.mbs)
    shown = min(num_microbatches, max(2 * x.pp, 4))
    ran = timeline(plan.model, plan.cluster, plan.job, x, shown)
    with _styled():
        height = 1.5 + 0.3 * x.pp
        figure, ax = _axes(height)
        kinds = [kind for kind in _ACTIONS if any(r.action.kind == kind for r in ran)]
        for kind in kinds:
            _draw(ax, [r for r in ran if r.action.kind == kind], _ACTIONS[kind][1], x.vpp)
        if shown * x.vpp <= MOST_NUMBERED:
            for r in ran:
                middle = r.start_s + r.duration_s / 2
                text = str(r.action.microbatch)
                ax.text(middle, r.rank, text, ha="center", va="center", fontsize=6, color="white")
        ax.set_yticks(range(x.pp), [f"rank {rank}" for rank in range(x.pp)])
        ax.set_ylim(x.pp - 0.5, -0.5)
        ax.set_xlim(0, max(r.start_s + r.duration_s for r in ran))
        ax.set_xlabel("seconds")
        handles = [Patch(color=_ACTIONS[kind][1], label=_ACTIONS[kind][0]) for kind in kinds]
        _legend(ax, figure, height, handles)
        return _svg(figure), shown


def _draw(ax: Any, ran: Sequence[Ran], colour: str, vpp: int) -> None:
    """Draw the actions of one kind; later chunks are paler."""
    for chunk in range(vpp):
        alpha = 1.0 - 0.6 * chunk / max(vpp, 1)
        mine = [r for r in ran if r.action.chunk == chunk]
        ax.barh(
            [r.rank for r in mine],
            [r.duration_s for r in mine],
            left=[r.start_s for r in mine],
            height=0.8,
            color=colour,
            alpha=alpha,
            edgecolor="white",
            linewidth=0.3,
        )


def _styled() -> Any:
    library: Any = matplotlib  # its own types are partly unknown
    return library.rc_context(_STYLE)


def _axes(height: float) -> tuple[Any, Any]:
    figure: Any = Figure(figsize=(9.5, height))
    return figure, figure.add_subplot()


def _legend(ax: Any, figure: Any, height: float, handles: list[Patch] | None = None) -> None:
    found = handles if handles is not None else ax.get_legend_handles_labels()[0]
    columns = len(found) if len(found) <= 7 else 5
    figure.legend(handles=found, ncol=columns, loc="lower center", frameon=False, fontsize=8)
    bottom = (0.65 + 0.2 * -(-len(found) // columns)) / height
    figure.subplots_adjust(left=0.15, right=0.97, top=0.97, bottom=bottom)


def _name(term: str) -> str:
    return term.removesuffix("_bytes").removesuffix("_s").replace("_", " ")


def _svg(figure: Any) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]
