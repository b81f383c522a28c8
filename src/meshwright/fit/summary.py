"""Errors of predictions summed up: by group, by pair of layouts, and the worst rows."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any, cast

import numpy as np

from meshwright.fit.interval import HELD_FRACTION
from meshwright.fit.measured import MEMORY, TIME, unusable
from meshwright.fit.predict import Prediction

Row = Mapping[str, str]
Pair = tuple[Row, Prediction]

TUNED = ("benchmark", "paper", "matched-ab", "")
"""Qualities of runs that were tuned or controlled; only these count for step time. A row that
states none is taken for one."""

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

    ``step_time_rows`` and ``peak_memory_rows`` say where every row went: into the errors, or why
    into none (not predicted, called inconsistent by the file, not measured, measured as what cannot
    be, of a quality or a kind of memory that is not scored). ``impossible_memory`` is measured
    memory that could not hold the model that its row names.
    """
    pairs = list(zip(rows, found, strict=True))
    status = {s: sum(p.status == s for p in found) for s in ("ok", "unsupported", "refused")}
    usable = [(r, p) for r, p in pairs if not is_inconsistent(r)]
    timed = [(r, p) for r, p in usable if time_error(p) is not None]
    tuned = [(r, p) for r, p in timed if _quality(r) in TUNED]
    weighed, impossible = _weighed(usable)
    return {
        "rows": len(found),
        **status,
        "coverage_fraction": status["ok"] / len(found) if found else 0.0,
        "inconsistent": len(pairs) - len(usable),
        "reasons": _reasons(found),
        "not_predicted": [{"id": p.id, "why": p.why} for p in found if p.why],
        "impossible_memory": impossible,
        "unusable_measurements": {p.id: why for r, p in pairs if (why := _unusable(r))},
        "step_time_rows": _counted(pairs, tuned, time_error, TIME, "other_quality"),
        "peak_memory_rows": _counted(pairs, weighed, memory_error, MEMORY, "not_comparable"),
        "step_time": _tables(pairs, tuned, time_error, models),
        "step_time_by_quality": _table(pairs, timed, time_error, _quality),
        "peak_memory": _tables(pairs, weighed, memory_error, models),
        "peak_memory_by_statistic": _table(
            pairs, weighed, memory_error, lambda r: r.get("peak_memory_stat") or ""
        ),
        "interval": _interval(tuned, _time_is_held, models),
        "peak_interval": _interval(weighed, _peak_is_held, models),
        "ranking": ranking([m for m in timed if _quality(m[0]) in RANKED]),
        "worst_step_time": _worst(tuned, time_error, _times),
        "worst_peak_memory": _worst(weighed, memory_error, _peaks),
    }


def _quality(row: Row) -> str:
    return (row.get("quality") or "").strip()


def _unusable(row: Row) -> str:
    return "; ".join(why for columns in (TIME, MEMORY) if (why := unusable(row, columns)))


def _counted(
    pairs: Sequence[Pair],
    scored: Sequence[Pair],
    error: Callable[[Prediction], float | None],
    columns: tuple[str, ...],
    rest: str,
) -> dict[str, int]:
    """Return where every row went: ``scored``, or why it is in no error. The counts make all."""
    counts = {"scored": len(scored), "not_predicted": 0, "inconsistent": 0}
    counts |= {"not_measured": 0, "unusable": 0}
    for row, p in pairs:
        if p.status != "ok":
            counts["not_predicted"] += 1
        elif is_inconsistent(row):
            counts["inconsistent"] += 1
        elif error(p) is None:
            counts["unusable" if unusable(row, columns) else "not_measured"] += 1
    return {**counts, rest: len(pairs) - sum(counts.values())}


def _weighed(usable: Sequence[Pair]) -> tuple[list[Pair], dict[str, str]]:
    """Return the rows whose memory is scored, and why others cannot be of the model they name."""
    kept: list[Pair] = []
    impossible: dict[str, str] = {}
    for row, p in usable:
        if memory_error(p) is None or not memory_counts(row):
            continue
        why = impossible_memory(row, p)
        if why:
            impossible[p.id] = why
        else:
            kept.append((row, p))
    return kept, impossible


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
    scored: Sequence[Pair],
    error: Callable[[Prediction], float | None],
    models: Mapping[str, Any],
) -> dict[str, Any]:
    keys: dict[str, Callable[[Row], str]] = {
        "by_gpu": lambda r: r.get("gpu") or "",
        "by_class": lambda r: _class_of(r, models),
        "by_precision": lambda r: r.get("precision") or "",
        "by_source": lambda r: (r.get("source") or "").partition(":")[0].partition("@")[0],
        "by_quality": _quality,
    }
    overall = _table(pairs, scored, error, lambda _: "all").get("all", {"rows": 0})
    tables = {name: _table(pairs, scored, error, key) for name, key in keys.items()}
    return {"all": overall, **tables}


def _table(
    pairs: Sequence[Pair],
    scored: Iterable[Pair],
    error: Callable[[Prediction], float | None],
    key: Callable[[Row], str],
) -> dict[str, dict[str, float]]:
    """Return the errors of each group of ``scored``, and which share of all its rows is predicted.

    A group of ``pairs`` without a scored row is not listed: it has no error.
    """
    groups: defaultdict[str, list[float]] = defaultdict(list)
    for row, prediction in scored:
        value = error(prediction)
        if value is not None:
            groups[key(row)].append(value)
    coverage = _shares((key(row), p.status == "ok") for row, p in pairs)
    return {
        name: {**_errors(groups[name]), "coverage_fraction": coverage[name]}
        for name in sorted(groups)
    }


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


def _interval(
    pairs: Sequence[Pair], is_held: Callable[[Prediction], bool], models: Mapping[str, Any]
) -> dict[str, Any]:
    """Return how often the interval of a prediction holds what was measured."""
    held = [(row, is_held(p)) for row, p in pairs]
    return {
        "stated_fraction": HELD_FRACTION,
        "rows": len(held),
        "held_fraction": sum(h for _, h in held) / len(held) if held else 0.0,
        "by_gpu": _shares((row.get("gpu") or "", h) for row, h in held),
        "by_class": _shares((_class_of(row, models), h) for row, h in held),
    }


def _time_is_held(p: Prediction) -> bool:
    return (p.low_s or 0.0) <= (p.measured_step_time_s or 0.0) <= (p.high_s or 0.0)


def _peak_is_held(p: Prediction) -> bool:
    return (p.low_bytes or 0.0) <= (p.measured_peak_bytes or 0.0) <= (p.high_bytes or 0.0)


def _shares(held: Iterable[tuple[str, bool]]) -> dict[str, float]:
    groups: defaultdict[str, list[bool]] = defaultdict(list)
    for name, value in held:
        groups[name].append(value)
    return {name: sum(groups[name]) / len(groups[name]) for name in sorted(groups)}


def _class_of(row: Row, models: Mapping[str, Any]) -> str:
    entry = models.get(row.get("model") or "")
    return str(cast("Mapping[str, Any]", entry).get("class", "")) if isinstance(entry, dict) else ""


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
    pairs: Sequence[Pair],
    error: Callable[[Prediction], float | None],
    values: Callable[[Prediction], dict[str, float | None]],
) -> list[dict[str, Any]]:
    ranked = sorted(pairs, key=lambda m: -abs(error(m[1]) or 0.0))
    return [{"id": p.id, "error": error(p), **values(p)} for _, p in ranked[:WORST_ROWS]]


def _times(p: Prediction) -> dict[str, float | None]:
    return {
        "predicted_step_time_s": p.step_time_s,
        "measured_step_time_s": p.measured_step_time_s,
    }


def _peaks(p: Prediction) -> dict[str, float | None]:
    return {"predicted_peak_bytes": p.peak_bytes, "measured_peak_bytes": p.measured_peak_bytes}
