"""Why not another layout: what a change costs against the layout that was chosen, term by term."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from meshwright.describe.cluster import Cluster
from meshwright.describe.job import Job
from meshwright.describe.model import Model
from meshwright.errors import LayoutError, MeshwrightError
from meshwright.parallel.layout import from_text, layout_fields, read_fields, to_text
from meshwright.plans import Plan, difference, estimate_plan
from meshwright.search import LIMITED, candidate_tables, read_space, search
from meshwright.units import format_bytes, format_s


@dataclass(frozen=True, kw_only=True)
class WhyNot:
    """Two layouts side by side: the one asked about against the one chosen.

    ``other`` is the base with nothing but the change, or ``best``, the best layout with the change,
    whichever was meant; ``refused`` says why the change alone is not legal. Without ``other`` no
    layout has what was asked, and ``nearest`` has the values next to it that some layout has.
    """

    base: Plan
    asked: str
    other: Plan | None
    other_text: str
    best: Plan | None
    refused: LayoutError | None
    nearest: dict[str, list[int]]

    def gap(self) -> dict[str, dict[str, float]]:
        """Return term by term what the other costs more; the terms add up to the gap."""
        if self.other is None:
            return {"time": {}, "memory": {}}
        return difference(self.other.estimate, self.base.estimate)

    def verdict(self) -> str:
        """Return in a few sentences what the other costs, and what else there is to know."""
        if self.other is None:
            near = " or ".join(f"{k}={v}" for k, values in self.nearest.items() for v in values)
            told = f"No layout has {self.asked}: it is not legal. {self.refused}"
            return f"{told} The nearest that some layout has: {near}." if near else told
        if self.other is not self.best:
            told = _compared(f"Changing {self.asked} alone", self.other, self.base)
            if self.best is None or to_text(self.best.layout) == to_text(self.other.layout):
                return told
            return f"{told} {_compared(f'The best layout with {self.asked}', self.best, self.base)}"
        told = _compared(f"The best layout with {self.asked}", self.other, self.base)
        if self.refused is None:
            return told
        return f"{told} Changing {self.asked} alone is not legal: {self.refused}"

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object of the command line."""
        out: dict[str, Any] = {"base": self.base.to_dict(), "other_layout": self.other_text}
        out["verdict"] = self.verdict()
        if self.refused is not None:
            names = ("field", "value", "rule", "remedy")
            out["refused"] = {name: getattr(self.refused, name) for name in names}
        if self.best is not None:
            out["best"] = self.best.to_dict()
        if self.other is None:
            return out | {"nearest": self.nearest}
        a, b = self.other.estimate, self.base.estimate
        return out | {
            "other": self.other.to_dict(),
            "step_time_difference_s": a.step_time_s - b.step_time_s,
            "peak_difference_bytes": a.peak_bytes - b.peak_bytes,
            "difference": self.gap(),
        }


def _compared(what: str, other: Plan, base: Plan) -> str:
    a, b = other.estimate, base.estimate
    slower, larger = a.step_time_s - b.step_time_s, a.peak_bytes - b.peak_bytes
    fits = f"it {a.verdict}" if a.verdict != "borderline" else "borderline"
    time, memory = "as long", "as much"
    if is_worth_telling(slower, b.step_time_s):
        share = f"({abs(slower) / b.step_time_s:.1%})"
        time = f"{format_s(abs(slower))} {share} {'longer' if slower > 0 else 'less'}"
    if is_worth_telling(larger, b.peak_bytes):
        memory = f"{format_bytes(abs(larger))} {'more' if larger > 0 else 'less'}"
    return f"{what} takes {time} and needs {memory}; {fits}."


def is_worth_telling(change: float, of: float) -> bool:
    """Return whether a change is large enough to be told to a person."""
    return abs(change) >= 1e-4 * abs(of)


def why_not(
    model: Model, cluster: Cluster, job: Job, base: Plan, change: str, given: bool
) -> WhyNot:
    """Return what ``change`` ("tp=8 pp=2") costs against ``base``, or which rule forbids it.

    Two readings are priced: nothing but the change, and the best of all layouts with the change.
    Where the base was ``given`` the first is compared if it is legal, else the second. In the first
    reading, keys that the change leaves out stay; ``dp`` follows from the GPUs.

    Raises ``LayoutError`` when the change cannot be read.
    """
    asked = layout_fields(change)
    read_fields(change)
    if not asked:
        rule = "It names nothing to change."
        raise LayoutError("why_not", change, rule, 'Write --why-not "tp=8".')
    text = changed_alone(to_text(base.layout), asked)
    alone, refused = None, None
    try:
        alone = estimate_plan(model, cluster, job, from_text(text, gpus=cluster.num_gpus))
    except LayoutError as error:
        refused = error
    best = _best_with(model, cluster, job, asked)
    other = alone if best is None or (given and alone is not None) else best
    nearest: dict[str, list[int]] = {}
    if other is None:
        nearest = _nearest(model, cluster, job, asked)
    return WhyNot(
        base=base,
        asked=" ".join(f"{k}={v}" for k, v in asked.items()),
        other=other,
        other_text=text if other is None else to_text(other.layout),
        best=best,
        refused=refused,
        nearest=nearest,
    )


def changed_alone(layout: str, asked: dict[str, str]) -> str:
    """Return layout text with the keys of ``asked`` replaced, and what hangs on them left out."""
    kept = layout_fields(layout)
    for derived in ("dp", "edp"):
        kept.pop(derived, None)
    if "tp" in asked:
        kept.pop("sp", None)
    if asked.keys() & {"pp", "vpp", "schedule"}:
        # A pipeline is one choice: what hangs on the changed part follows it.
        for follows in (
            *("vpp", "schedule", "pipeline_layout", "microbatch_group_size"),
            *("first", "last", "account_for_embedding", "account_for_loss"),
        ):
            kept.pop(follows, None)
    return " ".join(f"{k}={v}" for k, v in {**kept, **asked}.items())


def _best_with(model: Model, cluster: Cluster, job: Job, asked: dict[str, str]) -> Plan | None:
    """Return the best layout with what was asked (the closest, if none fits), or nothing."""
    if not asked.keys() <= set(LIMITED):
        return None
    try:
        space = read_space([f"{k}={v}" for k, v in asked.items()])
    except MeshwrightError:
        return None
    found = search(model, cluster, job, top=1, space=space)
    best = found.best[0] if found.best else found.closest
    return None if best is None else estimate_plan(model, cluster, job, best.layout)


def _nearest(
    model: Model, cluster: Cluster, job: Job, asked: dict[str, str]
) -> dict[str, list[int]]:
    """Return, for each number asked, the legal values below and above it, the others kept."""
    out: dict[str, list[int]] = {}
    for key, value in asked.items():
        others = {k: v for k, v in asked.items() if k != key}
        if not value.isdecimal() or not asked.keys() <= set(LIMITED):
            continue
        space = read_space([f"{k}={v}" for k, v in others.items()])
        tables = candidate_tables(model, cluster, job, space)[1]
        if not tables:
            continue
        legal = np.unique(np.concatenate([getattr(x, key) for x in tables]))
        below, above = legal[legal < int(value)], legal[legal > int(value)]
        out[key] = [*below[-1:].tolist(), *above[:1].tolist()]
    return out
