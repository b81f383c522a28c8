"""Reading the frameworks' own answers in ``tests/data``."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

DATA = Path(__file__).parent / "data"


def rows(name: str) -> list[dict[str, Any]]:
    """Return the rows of a gzipped JSON-lines file or a CSV file."""
    path = DATA / name
    if path.suffix == ".csv":
        with path.open(newline="") as file:
            return list(csv.DictReader(file))
    with gzip.open(path, "rt") as file:
        return [json.loads(line) for line in file]
