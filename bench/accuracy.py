"""Predicted against measured on the shipped runs, and the direction of what settings change.

    python bench/accuracy.py [-o bench/results/accuracy.json]      about ten seconds

Prints the tables of ``meshwright accuracy`` for step time and memory, and for every pair of runs
that differ in one setting whether the predicted change has the sign of the measured one.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from meshwright.cost.detail import BAND_FRACTION
from meshwright.fit.documents import load_models, load_runs, shipped
from meshwright.fit.predict import Prediction, predict
from meshwright.fit.summary import TUNED, memory_error, summarize

SMALLEST_CHANGE = 0.03
"""Measured changes below this are within the noise between two runs."""


def main() -> None:
    """Print the tables, and write them on demand."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("-o", "--output", type=Path, help="write the summaries as JSON")
    wanted = parser.parse_args()
    models = load_models(shipped("models.json.gz"))
    results: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, Python {platform.python_version()}",
    }
    known: dict[str, Prediction] = {}
    by_id: dict[str, Mapping[str, str]] = {}
    for name in ("runs", "memory"):
        rows = load_runs(shipped(f"{name}.csv.gz"))
        found = predict(rows, models)
        known |= {p.id: p for p in found if p.status == "ok" and p.id not in known}
        by_id |= {row["id"]: row for row in rows if row["id"] not in by_id}
        results[name] = summarize(rows, found, models)
        for kind in ("step_time", "peak_memory"):
            print(name, kind, _text(results[name][kind]["all"]))
            for gpu, errors in results[name][kind].get("by_gpu", {}).items():
                print(f"    {gpu:<28} {_text(errors)}")
        print(name, "ranking", results[name]["ranking"])
        results[name]["ranking_tuned"] = ranking_of_tuned(rows, found)
        print(name, "ranking, sweeps left out", results[name]["ranking_tuned"])
    results["capacity"] = capacity(known, by_id)
    print("capacity", results["capacity"])
    results["allocated"] = allocated(known, by_id)
    print("allocated", results["allocated"])
    results["changes"] = changes(load_runs(shipped("ablations.csv.gz")), known, by_id)
    for kind, counts in results["changes"].items():
        print(f"changes: {kind:<26} {counts['right']} of {counts['pairs']} have the right sign")
    if wanted.output:
        wanted.output.write_text(json.dumps(results, indent=1) + "\n", encoding="ascii")


def ranking_of_tuned(
    rows: Sequence[Mapping[str, str]], found: Sequence[Prediction]
) -> dict[str, Any]:
    """Return the ranking of runs that were tuned or controlled, single iterations left out."""
    tuned = [r for r in rows if (r.get("quality") or "").strip() in TUNED]
    ids = {r["id"] for r in tuned}
    return summarize(tuned, [p for p in found if p.id in ids], {})["ranking"]


def capacity(
    known: Mapping[str, Prediction], rows: Mapping[str, Mapping[str, str]]
) -> dict[str, dict[str, int]]:
    """Return what is said of runs that ran and that ended out of memory, and what measured peaks
    of the whole card hold of the peak that is compared with its capacity."""
    said: dict[str, dict[str, int]] = {"ran": {}, "oom": {}, "beyond_the_band": {}}
    for p in known.values():
        if p.estimate is None:
            continue
        statistic = rows[p.id].get("peak_memory_stat") or ""
        kind, verdict = "oom" if statistic == "oom" else "ran", p.estimate.verdict
        said[kind][verdict] = said[kind].get(verdict, 0) + 1
        if statistic in ("reserved", "nvidia-smi") and p.measured_peak_bytes:
            beyond = p.measured_peak_bytes > p.estimate.peak_bytes / (1.0 - BAND_FRACTION)
            counts = said["beyond_the_band"]
            counts["runs"] = counts.get("runs", 0) + 1
            counts[statistic] = counts.get(statistic, 0) + int(beyond)
    return said


def allocated(
    known: Mapping[str, Prediction], rows: Mapping[str, Mapping[str, str]]
) -> dict[str, Any]:
    """Return how many peaks of allocated memory are far off, and the mean of the one-node B200s."""
    errors: dict[str, float] = {}
    for p in known.values():
        error = memory_error(p)
        if error is not None and rows[p.id].get("peak_memory_stat") == "allocated":
            errors[p.id] = abs(error)
    b200 = [e for i, e in errors.items() if rows[i]["gpu"] == "B200" and rows[i]["n_gpus"] == "8"]
    return {
        "beyond_6_percent": sum(e > 0.06 for e in errors.values()),
        "one_node_b200_runs": len(b200),
        "one_node_b200_mean": sum(b200) / max(len(b200), 1),
    }


def changes(
    pairs: Sequence[Mapping[str, str]],
    known: Mapping[str, Prediction],
    rows: Mapping[str, Mapping[str, str]],
) -> dict[str, dict[str, int]]:
    """Return, by kind of change, how many pairs are predicted to move the way they did."""
    counts: defaultdict[str, dict[str, int]] = defaultdict(lambda: {"pairs": 0, "right": 0})
    for pair in pairs:
        base, variant = known.get(pair["base_id"]), known.get(pair["variant_id"])
        if base is None or variant is None:
            continue
        measured = _throughput_change(pair)
        if measured is None or abs(measured) < SMALLEST_CHANGE or pair.get("confounds"):
            continue
        before = (base.step_time_s or 0.0) / _tokens(rows[base.id])
        after = (variant.step_time_s or 0.0) / _tokens(rows[variant.id])
        for kind in (pair["class"], "all"):
            counts[kind]["pairs"] += 1
            counts[kind]["right"] += (before > after) == (measured > 0)
    return dict(counts)


def _throughput_change(pair: Mapping[str, str]) -> float | None:
    for name, sign in (("throughput_change_pct", 1.0), ("step_time_change_pct", -1.0)):
        if pair.get(name):
            return sign * float(pair[name]) / 100.0
    return None


def _tokens(row: Mapping[str, str]) -> float:
    """Return tokens a GPU and step, which throughput is counted over."""
    return float(row["gbs"] or 1) * float(row["seq_len"] or 1) / float(row["n_gpus"] or 1)


def _text(errors: Mapping[str, float]) -> str:
    if not errors.get("rows"):
        return "no rows"
    return (
        f"{errors['rows']:4.0f} rows, bias {errors['bias']:+.1%}, median {errors['median']:.1%}, "
        f"p90 {errors['p90']:.1%}"
    )


if __name__ == "__main__":
    main()
