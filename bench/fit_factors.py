"""Fit the factors of the cost model to the shipped runs, and cross-validate the fit.

    python bench/fit_factors.py [--turns 3] [--write]      a few minutes on one core

Prints the errors after each turn of the fit, then those with every model, every GPU type, and every
model on one GPU in one precision, left out of the fit in turn. ``--write`` replaces
``src/meshwright/cost/factors.toml``.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import numpy as np

import meshwright.cost
from meshwright.cost.columns import Floats
from meshwright.cost.factors import Factors, fitted
from meshwright.fit.documents import load_models, load_runs, shipped
from meshwright.fit.fitting import (
    LIMITS,
    Measured,
    describe,
    fit,
    left_out_errors,
    log_errors,
    measured_runs,
    slopes_of,
    uninformed,
)
from meshwright.fit.interval import step_time_width

FOLDS = {
    "model": ("model",),
    "GPU type": ("gpu",),
    "model on one GPU type, in one precision and task,": ("model", "gpu", "precision", "task"),
}
"""What is left out of the fit together, in turn."""


def main() -> None:
    """Fit, validate, and write on demand."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--turns", type=int, default=3, help="Gauss-Newton steps")
    parser.add_argument("--write", action="store_true", help="replace factors.toml")
    wanted = parser.parse_args()
    models = load_models(shipped("models.json.gz"))
    rows, runs = measured_runs(load_runs(shipped("runs.csv.gz")), models)
    names = list(LIMITS)
    print(f"{len(runs)} runs, {len(names)} factors; before: {describe(log_errors(runs, fitted()))}")
    found = fit(runs, fitted(), names, iterations=wanted.turns, progress=print, prior_of=uninformed)
    errors = log_errors(runs, found)
    slopes = slopes_of(runs, found, names, errors)
    for title, columns in FOLDS.items():
        folds = ["|".join(row[c] for c in columns) for row in rows]
        left_out = left_out_errors(errors, slopes, folds, found, names)
        share = held(runs, left_out, gpu_is_new="gpu" in columns and len(columns) == 1)
        print(f"with each {title} left out in turn: {describe(left_out)}; {share}")
    if wanted.write:
        path = Path(str(meshwright.cost.__file__)).parent / "factors.toml"
        path.write_text(as_toml(found), encoding="ascii")
        print(f"wrote {path.name}")


def held(runs: Sequence[Measured], left_out: Floats, *, gpu_is_new: bool) -> str:
    """Return the share of runs whose intervals hold what was measured, as text.

    With its GPU type left out (``gpu_is_new``) a run has the interval of one without runs.
    """
    widths = [
        step_time_width(
            m.run.model, m.run.job, "" if gpu_is_new else m.run.cluster.gpu.name, m.run.assumed
        )
        for m in runs
    ]
    return f"intervals hold {np.mean(np.abs(left_out) <= np.asarray(widths)):.1%}"


def held_fixed(factors: Factors) -> list[str]:
    """Return the dotted names of the factors that no run moves."""
    names: list[str] = []
    for entry in fields(Factors):
        value: Any = getattr(factors, entry.name)
        if isinstance(value, Mapping):
            known = cast("Mapping[str, float]", value)
            names += [f"{entry.name}.{key}" for key in sorted(known)]
        else:
            names.append(entry.name)
    return [name for name in names if name not in LIMITS]


def as_toml(factors: Factors) -> str:
    """Return the document of ``factors.toml``."""
    today, machine = datetime.date.today().isoformat(), platform.machine()
    fixed = ", ".join(held_fixed(factors))
    lines = [
        "# Fitted factors of the cost model. Facts of hardware are in describe/hardware.",
        f"# How: bench/fit_factors.py on the shipped runs, {today}, Python "
        f"{platform.python_version()} on {machine}.",
        *textwrap.wrap(
            f"Not fitted (docs/accuracy.md says where each is from): {fixed}.",
            width=98,
            initial_indent="# ",
            subsequent_indent="# ",
            break_on_hyphens=False,
        ),
        "",
    ]
    tables: list[str] = []
    for entry in fields(Factors):
        value: Any = getattr(factors, entry.name)
        if isinstance(value, Mapping):
            known = cast("Mapping[str, float]", value)
            tables += ["", f"[{entry.name}]", *(_line(k, v) for k, v in sorted(known.items()))]
        else:
            lines.append(_line(entry.name, value))
    return "\n".join(lines + tables) + "\n"


def _line(key: str, value: float) -> str:
    return f"{key if '.' not in key else repr(key).replace(chr(39), chr(34))} = {value:.4g}"


if __name__ == "__main__":
    main()
