"""How long a command takes from a cold start: a fresh process, to its last byte.

    python bench/cold_start.py [--runs N] [--out bench/results/cold_start.md]

The median and the fastest of N runs of each command after a first that compiles the modules, wall
time; core time is that of the process.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

LAUNCH = (
    Path(__file__).parent.parent / "tests" / "golden" / "frameworks" / "megatron-lm" / "run.sbatch"
)
COMMANDS = {
    "meshwright --help": ["--help"],
    "meshwright plan llama3-70b 64xH100 --seq-len 8192 --global-batch-size 512": [
        *("plan", "llama3-70b", "64xH100"),
        *("--seq-len", "8192", "--global-batch-size", "512"),
    ],
    "meshwright check run.sbatch": ["check", str(LAUNCH)],
    'meshwright estimate llama3-70b 64xH100 --layout "tp=4 pp=4 vpp=5 cp=2"': [
        *("estimate", "llama3-70b", "64xH100", "--layout", "tp=4 pp=4 vpp=5 cp=2"),
        *("--seq-len", "8192", "--global-batch-size", "512"),
    ],
}


def once(words: list[str]) -> tuple[float, float]:
    """Return (wall, core) seconds of one fresh process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    command = [sys.executable, "-m", "meshwright", *words]
    plain = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    subprocess.run(command, check=True, capture_output=True, env=plain)
    wall = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def machine() -> str:
    """Return the kind of processor, the cores and the Python."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    kind = names[0] if names else platform.machine()
    return f"{kind}, {os.cpu_count()} cores, Python {platform.python_version()}"


def report(runs: int) -> str:
    lines = [
        "# Cold start",
        "",
        f"{datetime.date.today()}, {machine()}, load average {os.getloadavg()[0]:.1f} at the "
        f"start; {runs} runs of each, `python bench/cold_start.py`.",
        "",
        "| command | median wall | fastest wall | median core |",
        "|---|---|---|---|",
    ]
    for shown, words in COMMANDS.items():
        times = [once(words) for _ in range(runs + 1)][1:]
        walls, cores = zip(*times, strict=True)
        lines.append(
            f"| `{shown}` | {statistics.median(walls):.2f} s | {min(walls):.2f} s "
            f"| {statistics.median(cores):.2f} s |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=11)
    parser.add_argument("--out", type=Path, default=Path("bench/results/cold_start.md"))
    options = parser.parse_args()
    text = report(max(options.runs, 1))
    print(text, end="")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text)


if __name__ == "__main__":
    main()
