"""Errors of predictions summed up: by group, by pair of layouts, and the worst rows."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from meshwright.fit.predict import Prediction

Row = Mapping[str, str]
Pair = tuple[Row, Prediction]

TUNED = ("benchmark", "paper", "matched-ab")
"""Qualities of runs that were tuned or controlled; only these count for step time."""

RANKED = (*TUNED, "sweep")
"""Qualities whose layouts are ranked: sweeps are noisy in time, and made to compare layouts."""

BETWEEN_STEPS = "mem_allocated_between_steps_gib"
"""What a run reports to hold on the card when no step runs."""

PAIR_DIFFERENCE = 0.02
"""Layouts whose measured times are nearer than this share are not ranked against each other."""

WORST_ROWS = 10


def summarize(
    rows: Sequence[Row], found: Sequence[Prediction], models: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the summary: counts, error tables of time and memory, ranking, worst rows.

    Rows marked inconsistent by the file are counted and left out of every error; so are rows
    without a measured value, and, with the reason, from the errors of memory those whose measured
    memory could not hold the model they name. Nothing that was refused is part of an error, only
    of the coverage.
    """
    pairs = list(zip(rows, found, strict=True))
    status = {s: sum(p.status == s for p in found) for s in ("ok", "unsupported", "refused")}
    usable = [(r, p) for r, p in pairs if not is_inconsistent(r)]
    timed = [(r, p) for r, p in usable if time_error(p) is not None]
    tuned = [(r, p) for r, p in timed if (r.get("quality") or "") in TUNED]
    weighed = [(r, p) for r, p in usable if memory_error(p) is not None and memory_counts(r)]
    impossible = {p.id: why for r, p in weighed if (why := impossible_memory(r, p))}
    weighed = [(r, p) for r, p in weighed if p.id not in impossible]
    return {
        "rows": len(found),
        **status,
        "coverage_fraction": status["ok"] / len(found) if found else 0.0,
        "inconsistent": len(pairs) - len(usable),
        "reasons": _reasons(found),
        "impossible_memory": impossible,
        "step_time": _tables(tuned, time_error, models),
        "step_time_by_quality": _table(timed, time_error, lambda r: r.get("quality") or ""),
        "peak_memory": _tables(weighed, memory_error, models),
        "peak_memory_by_statistic": _table(
            weighed, memory_error, lambda r: r.get("peak_memory_stat") or ""
        ),
        "interval": _interval(tuned),
        "ranking": ranking([m for m in timed if (m[0].get("quality") or "") in RANKED]),
        "worst_step_time": _worst(tuned, time_error),
        "worst_peak_memory": _worst(weighed, memory_error),
    }


def is_inconsistent(row: Row) -> bool:
    """Return whether the file itself marks the measurement as contradictory."""
    return (row.get("consistency") or "").startswith("inconsistent")


def impossible_memory(row: Row, p: Prediction) -> str:
    """Return why a row's memory cannot be of the model it names, empty where it can.

    Between steps a rank holds at least its weights; where ``mem_allocated_between_steps_gib`` is
    less, row and measurement are of different models. Predictions never read it.
    """
    between = re.search(rf'"{BETWEEN_STEPS}":\s*([0-9.]+)', row.get("other_settings") or "")
    if between is None or p.estimate is None:
        return ""
    held = float(between[1]) * 2.0**30
    weights = min(stage["weights_bytes"] for stage in p.estimate.stages)
    if held >= weights:
        return ""
    return f"{held / 1e9:.2f} GB held between steps are less than {weights / 1e9:.2f} GB of weights"


def memory_counts(row: Row) -> bool:
    """Return whether the row holds a measured peak (an OOM has none, "relative" has no bytes)."""
    return (row.get("peak_memory_stat") or "") not in ("oom", "relative", "accounting")


def time_error(p: Prediction) -> float | None:
    """Return predicted / measured step time - 1."""
    return _ratio(p.step_time_s, p.measured_step_time_s)


def memory_error(p: Prediction) -> float | None:
    """Return predicted / measured peak memory - 1."""
    return _ratio(p.peak_bytes, p.measured_peak_bytes)


def _ratio(predicted: float | None, measured: float | None) -> float | None:
    return predicted / measured - 1.0 if predicted and measured else None


def _tables(
    pairs: Sequence[Pair],
    error: Callable[[Prediction], float | None],
    models: Mapping[str, Any],
) -> dict[str, Any]:
    keys: dict[str, Callable[[Row], str]] = {
        "by_gpu": lambda r: r.get("gpu") or "",
        "by_class": lambda r: str(models.get(r.get("model") or "", {}).get("class", "")),
        "by_precision": lambda r: r.get("precision") or "",
        "by_source": lambda r: (r.get("source") or "").partition(":")[0].partition("@")[0],
        "by_quality": lambda r: r.get("quality") or "",
    }
    overall = _table(pairs, error, lambda _: "all").get("all", {"rows": 0})
    return {"all": overall, **{name: _table(pairs, error, key) for name, key in keys.items()}}


def _table(
    pairs: Iterable[Pair],
    error: Callable[[Prediction], float | None],
    key: Callable[[Row], str],
) -> dict[str, dict[str, float]]:
    groups: defaultdict[str, list[float]] = defaultdict(list)
    for row, prediction in pairs:
        value = error(prediction)
        if value is not None:
            groups[key(row)].append(value)
    return {name: _errors(groups[name]) for name in sorted(groups)}


def _errors(values: Sequence[float]) -> dict[str, float]:
    signed = np.asarray(values)
    size = np.abs(signed)
    return {
        "rows": len(values),
        "bias": float(np.median(signed)),
        "mean": float(np.mean(size)),
        "median": float(np.median(size)),
        "p90": float(np.quantile(size, 0.9)),
        "worst": float(np.max(size)),
    }


def _reasons(found: Iterable[Prediction]) -> dict[str, int]:
    counts: defaultdict[str, int] = defaultdict(int)
    for p in found:
        if p.why:
            counts[p.why] += 1
    return dict(counts)


def _interval(pairs: Sequence[Pair]) -> dict[str, float]:
    held = [
        p.low_s <= p.measured_step_time_s <= p.high_s
        for _, p in pairs
        if p.low_s is not None and p.high_s is not None and p.measured_step_time_s is not None
    ]
    return {"rows": len(held), "held_fraction": sum(held) / len(held) if held else 0.0}


def group_key(row: Row) -> tuple[str, ...]:
    """Return what runs share whose layouts can be ranked: model, machines, batch, source."""
    names = ("model", "gpu", "n_gpus", "seq_len", "gbs", "precision", "task", "release")
    return (*(row.get(n) or "" for n in names), (row.get("source") or "").partition("@")[0])


def layout_key(row: Row) -> tuple[str, ...]:
    """Return the cells that make two runs of a group different layouts."""
    names = ("tp", "pp", "vpp", "cp", "ep", "etp", "mbs", "fsdp", "recompute", "sequence_parallel")
    return tuple(row.get(n) or "" for n in names)


def ranking(pairs: Sequence[Pair]) -> dict[str, Any]:
    """Return how often layouts of one group are put in their measured order.

    ``pairs``: of two layouts whose times differ by more than ``PAIR_DIFFERENCE``. ``groups``: how
    often the layout predicted best is within that share of the one measured best.
    """
    groups: defaultdict[tuple[str, ...], list[Pair]] = defaultdict(list)
    for row, prediction in pairs:
        groups[group_key(row)].append((row, prediction))
    right = total = best = ranked = 0
    for members in groups.values():
        compared = _compared(members)
        right += sum(compared)
        total += len(compared)
        if compared:
            ranked += 1
            best += _best_is_near(members)
    return {
        "pairs": total,
        "right_fraction": right / total if total else 0.0,
        "groups": ranked,
        "best_near_fraction": best / ranked if ranked else 0.0,
    }


def _compared(members: Sequence[Pair]) -> list[bool]:
    out: list[bool] = []
    for (row_a, a), (row_b, b) in combinations(members, 2):
        if layout_key(row_a) == layout_key(row_b):
            continue
        ta, tb = a.measured_step_time_s or 0.0, b.measured_step_time_s or 0.0
        if abs(ta - tb) > PAIR_DIFFERENCE * min(ta, tb):
            out.append(((a.step_time_s or 0.0) < (b.step_time_s or 0.0)) == (ta < tb))
    return out


def _best_is_near(members: Sequence[Pair]) -> bool:
    chosen = min(members, key=lambda m: m[1].step_time_s or 0.0)[1].measured_step_time_s or 0.0
    best = min(p.measured_step_time_s or 0.0 for _, p in members)
    return chosen <= best * (1.0 + PAIR_DIFFERENCE)


def _worst(
    pairs: Sequence[Pair], error: Callable[[Prediction], float | None]
) -> list[dict[str, Any]]:
    ranked = sorted(pairs, key=lambda m: -abs(error(m[1]) or 0.0))
    return [{"id": p.id, "error": error(p)} for _, p in ranked[:WORST_ROWS]]
