"""How fast the search is: layouts a second through memory and bound, seconds to the exact best.

    python bench/search_speed.py [--runs N] [--out bench/results/search_speed.md]

4,096 H100 and a DeepSeek-V3, 16,384 sequences of 4,096 tokens, the whole space, on one core. Every
run is a fresh process; the fastest is shown, because others use the machine too.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

MODEL, CLUSTER, SEQ_LEN, GLOBAL_BATCH_SIZE, TOP = "deepseek-v3", "4096xH100", 4096, 16384, 10


def one_run() -> dict[str, Any]:
    """Search once on one core; return the counts and the seconds, of the core and of the wall."""
    os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    from meshwright import api
    from meshwright.search import search

    model, cluster = api.load_model(MODEL), api.load_cluster(CLUSTER)
    job = api.job(model, SEQ_LEN, GLOBAL_BATCH_SIZE)
    clocks: dict[str, tuple[float, float]] = {}

    def progress(what: str, done: int, of: int) -> None:
        del done, of
        clocks.setdefault(what, (time.process_time(), time.perf_counter()))

    found = search(model, cluster, job, top=TOP, progress=progress)
    end = (time.process_time(), time.perf_counter())
    start, bounded = clocks["enumerating"], clocks["sorting"]
    return {
        "candidates": found.candidates,
        "legal": found.legal,
        "fit": found.fit,
        "simulated": found.simulated,
        "bounded_s": [b - a for a, b in zip(start, bounded, strict=True)],
        "best_s": [b - a for a, b in zip(start, end, strict=True)],
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def machine() -> str:
    """Return the kind of processor, the cores in use here and the Python."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    kind = names[0] if names else platform.machine()
    return f"{kind}, {os.cpu_count()} cores, Python {platform.python_version()}"


def report(runs: list[dict[str, Any]]) -> str:
    best = min(runs, key=lambda run: run["best_s"][1])
    core, wall = best["bounded_s"]
    best_core, best_wall = best["best_s"]
    lines = [
        "# Speed of the search",
        "",
        f"{datetime.date.today()}, {machine()}, load average {os.getloadavg()[0]:.1f} at the end; "
        f"one core, the fastest of {len(runs)} runs.",
        f"`python bench/search_speed.py`: {MODEL} on {CLUSTER}, {GLOBAL_BATCH_SIZE:,} sequences of "
        f"{SEQ_LEN:,} tokens, the whole space, the exact top {TOP}.",
        "",
        "| | core time | wall time |",
        "|---|---|---|",
        f"| through memory and bound | {core:.2f} s | {wall:.2f} s |",
        f"| legal layouts a second through memory and bound | {best['legal'] / core:,.0f} "
        f"| {best['legal'] / wall:,.0f} |",
        f"| to the exact top {TOP} | {best_core:.2f} s | {best_wall:.2f} s |",
        "",
        f"{best['candidates']:,} candidates, {best['legal']:,} legal, {best['fit']:,} fit, "
        f"{best['simulated']:,} simulated. Peak memory {best['peak_bytes'] / 2**20:,.0f} MiB.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("bench/results/search_speed.md"))
    parser.add_argument("--one-run", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one_run:
        print(json.dumps(one_run()))
        return
    command = [sys.executable, __file__, "--one-run"]
    runs = [
        json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        for _ in range(max(options.runs, 1))
    ]
    text = report(runs)
    print(text, end="")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text)


if __name__ == "__main__":
    main()
