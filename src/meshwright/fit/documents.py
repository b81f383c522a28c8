"""The files of measured runs (CSV) and of the models they name (JSON), plain or gzipped."""

from __future__ import annotations

import csv
import gzip
import io
import json
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

from meshwright.errors import DocumentError

NEEDED = ("id", "model", "gpu")
"""Columns without which a file is not one of measured runs."""


def load_runs(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file of runs. Raises ``DocumentError`` where it is none."""
    text = _read(path, "runs")
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), restkey="", restval="")
        rows = [{k: v for k, v in row.items() if k} for row in reader]
    except csv.Error as error:
        raise DocumentError("runs", str(path), f"It is a CSV file ({error}).", "") from None
    missing = [name for name in NEEDED if name not in (reader.fieldnames or ())]
    if missing:
        rule = f"It has the columns of runs.csv; {', '.join(missing)} is missing."
        raise DocumentError("runs", str(path), rule, "Give the file its first line.")
    return rows


def load_models(path: Path) -> dict[str, Any]:
    """Return the models of a JSON file by name. Raises ``DocumentError`` where it is none."""
    text = _read(path, "models")
    try:
        found: Any = json.loads(text)
    except json.JSONDecodeError as error:
        raise DocumentError("models", str(path), f"It is JSON ({error.msg}).", "") from None
    entries = cast("dict[str, Any]", found) if isinstance(found, dict) else {}
    if not entries or not all(isinstance(v, dict) for v in entries.values()):
        rule = "It is an object that holds one object for every model."
        raise DocumentError("models", str(path), rule, "Give models.json.")
    return entries


def _read(path: Path, field: str) -> str:
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DocumentError(field, str(path), f"It cannot be read: {error}.", "") from None


def shipped(name: str) -> Path:
    """Return the path of a calibration file that the package ships (``runs.csv.gz`` and others)."""
    return Path(str(files("meshwright.fit") / "data" / name))
