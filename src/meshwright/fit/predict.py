"""Predictions for the rows of a file of measured runs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from meshwright.cost.detail import Estimate, estimate
from meshwright.cost.factors import Factors, fitted
from meshwright.cost.memory import spare_fraction, statistic_bytes
from meshwright.errors import MeshwrightError
from meshwright.fit.interval import PEAK, step_time_width
from meshwright.fit.measured import MEMORY, TIME, measured
from meshwright.fit.reported import reported
from meshwright.fit.rows import Run, read_row

UNFORESEEN = (ArithmeticError, LookupError, TypeError, ValueError)
"""What one row that nobody thought of may raise: it must not take the others with it."""

Status = Literal["ok", "unsupported", "refused"]


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One row's answer: ``ok`` with figures, or why there are none.

    ``low_s`` to ``high_s`` and ``low_bytes`` to ``high_bytes`` are intervals that hold
    ``interval.HELD_FRACTION`` of what is measured.
    ``refused``: the row contradicts itself or names what cannot be. ``unsupported``: it is sound,
    but says something that the cost model has no words for.
    """

    id: str
    status: Status
    why: str = ""
    assumed: tuple[str, ...] = ()
    step_time_s: float | None = None
    low_s: float | None = None
    high_s: float | None = None
    measured_step_time_s: float | None = None
    peak_bytes: float | None = None
    low_bytes: float | None = None
    high_bytes: float | None = None
    measured_peak_bytes: float | None = None
    estimate: Estimate | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the row of the command's JSON."""
        return {
            "id": self.id,
            "status": self.status,
            "why": self.why,
            "assumed": list(self.assumed),
            "predicted_step_time_s": self.step_time_s,
            "predicted_step_time_low_s": self.low_s,
            "predicted_step_time_high_s": self.high_s,
            "measured_step_time_s": self.measured_step_time_s,
            "predicted_peak_bytes": self.peak_bytes,
            "predicted_peak_low_bytes": self.low_bytes,
            "predicted_peak_high_bytes": self.high_bytes,
            "measured_peak_bytes": self.measured_peak_bytes,
        }


def predict(
    rows: Iterable[Mapping[str, str]], models: Mapping[str, Any], factors: Factors | None = None
) -> list[Prediction]:
    """Return a prediction for every row, from its settings alone, in order."""
    return [_predict_row(row, models, factors) for row in rows]


def _predict_row(
    row: Mapping[str, str], models: Mapping[str, Any], factors: Factors | None
) -> Prediction:
    blank = Prediction(
        id=row.get("id") or "",
        status="refused",
        measured_step_time_s=measured(row, TIME),
        measured_peak_bytes=measured(row, MEMORY),
    )
    try:
        run = read_row(row, models)
    except MeshwrightError as error:
        return replace(blank, why=str(error))
    except UNFORESEEN as error:
        return replace(blank, status="unsupported", why=_unforeseen(error))
    blank = replace(blank, status="unsupported", assumed=run.assumed)
    try:
        found = estimate(run.model, run.cluster, run.job, run.layout, factors)
        step_time_s = asked_s(found, run)
        peak_bytes = asked_bytes(reported(found, row, run, factors), run, factors)
    except MeshwrightError as error:
        return replace(blank, why=str(error))
    except UNFORESEEN as error:
        return replace(blank, why=_unforeseen(error))
    if not (0.0 < step_time_s < math.inf and 0.0 < peak_bytes < math.inf):
        return replace(blank, why="The price of this row is no finite number.")
    width = step_time_width(run.model, run.job, run.cluster.gpu.name, run.assumed)
    return replace(
        blank,
        status="ok",
        step_time_s=step_time_s,
        low_s=step_time_s * math.exp(-width),
        high_s=step_time_s * math.exp(width),
        peak_bytes=peak_bytes,
        low_bytes=peak_bytes * math.exp(-PEAK[run.statistic]),
        high_bytes=peak_bytes * math.exp(PEAK[run.statistic]),
        estimate=found,
    )


def _unforeseen(error: Exception) -> str:
    return f"No rule foresees this row ({type(error).__name__}: {error}). Report it."


def asked_s(found: Estimate, run: Run) -> float:
    """Return the time that a row asks for: a step, or forward and backward of a module alone."""
    if not run.is_module:
        return found.step_time_s
    return found.step_time_s - found.time["optimizer_s"] - found.time["dp_comm_s"]


def asked_bytes(found: Estimate, run: Run, factors: Factors | None = None) -> float:
    """Return the memory that a row asks for: that statistic, on that rank."""
    stages = {"first": found.stages[:1], "last": found.stages[-1:], "fullest": found.stages}
    spare = spare_fraction(run.job, factors or fitted())
    return max(statistic_bytes(stage, run.statistic, spare) for stage in stages[run.rank])
