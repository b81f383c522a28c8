"""How well launches are judged: agreement with the frameworks' own answers, and speed.

    python bench/launch_rules.py [--megatron-lm ROWS] [--megatron-bridge ROWS] [--out FILE]

ROWS are JSON lines, gzipped, in the form of ``tests/data/megatron_lm_validation.jsonl.gz``.
"""

from __future__ import annotations

import argparse
import datetime
import gzip
import json
import platform
import time
from collections import Counter
from pathlib import Path
from typing import Any

from meshwright import check_launch

DATA = Path(__file__).parent.parent / "tests" / "data"


def read(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt") as file:
        return [json.loads(line) for line in file]


def command(row: dict[str, Any]) -> list[str]:
    if "argv" in row:
        return row["argv"]
    return [
        f"{path}={value}" if isinstance(value, str) else f"{path}={json.dumps(value)}"
        for path, value in row["overrides"].items()
    ]


def environment(row: dict[str, Any]) -> dict[str, Any]:
    return row["env"] | {f"site.{name}": value for name, value in row.get("site", {}).items()}


def judge(rows: list[dict[str, Any]], framework: str) -> tuple[list[str | None], float]:
    """Return the first error of every launch, and seconds for 10,000 of them."""
    check_launch(command(rows[0]), 8, framework)
    first: list[str | None] = []
    begin = time.perf_counter()
    for row in rows:
        found = check_launch(command(row), row["world_size"], framework, environment(row))
        first.append(next((f.id for f in found if f.severity == "error"), None))
    return first, (time.perf_counter() - begin) / len(rows) * 10_000


def report(rows: list[dict[str, Any]], framework: str) -> list[str]:
    first, seconds = judge(rows, framework)
    judged = list(zip(rows, first, strict=True))
    lines = [
        f"## {framework}: {len(rows)} launches, {seconds:.1f} s for 10,000",
        "",
        "| stage of the framework's answer | launches | accept/reject | first rule |",
        "|---|---|---|---|",
    ]
    for stage in [*Counter(row["stage"] for row in rows), "all"]:
        here = [(r, f) for r, f in judged if stage in (r["stage"], "all")]
        agreed = sum(r["accepted"] == (f is None) for r, f in here)
        refused = [(r, f) for r, f in here if not r["accepted"]]
        named = sum(r["rule_id"] == f for r, f in refused)
        share = f"{named / len(refused):.2%}" if refused else "-"
        lines.append(f"| {stage} | {len(here)} | {agreed / len(here):.2%} | {share} |")
    differing = [(r, f) for r, f in judged if r["rule_id"] != f]
    lines += ["", *(f"- {r['id']}: {r['rule_id']}, here {f}" for r, f in differing)]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    for framework in ("megatron-lm", "megatron-bridge"):
        name = framework.replace("-", "_")
        default = DATA / f"{name}_validation.jsonl.gz"
        parser.add_argument(f"--{framework}", dest=name, type=Path, default=default)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    machine = f"{platform.machine()}, Python {platform.python_version()}"
    lines = ["# Launch rules", "", f"{datetime.date.today()}, {machine}.", ""]
    lines += report(read(given.megatron_lm), "megatron-lm")
    lines += report(read(given.megatron_bridge), "megatron-bridge")
    text = "\n".join(lines).rstrip() + "\n"
    print(text, end="")
    if given.out is not None:
        given.out.write_text(text)


if __name__ == "__main__":
    main()
