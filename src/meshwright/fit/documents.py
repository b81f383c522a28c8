"""The files of measured runs (CSV) and of the models they name (JSON), plain or gzipped."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

from meshwright.errors import DocumentError

NEEDED = ("id", "model", "gpu")
"""Columns without which a file is not one of measured runs."""

SURPLUS = "cells beyond the first line"
"""Where a row keeps what stands in more cells than the first line names."""


def load_runs(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file of runs, its columns in lower case; empty rows are none.

    Cells are parted by commas, or by semicolons or tabs where the first line has no comma. Raises
    ``DocumentError`` where the file is none of runs.
    """
    text = _read(path, "runs")
    first = text.partition("\n")[0]
    delimiter = next((d for d in ",;\t" if d in first), ",")
    try:
        lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
        names = [name.strip().lower() for name in next(lines, list[str]())]
        rows = [_row(names, cells) for cells in lines if any(cell.strip() for cell in cells)]
    except csv.Error as error:
        rule = f"It is a CSV file ({error})."
        raise DocumentError("runs", str(path), rule, "Save it as CSV with commas.") from None
    missing = [name for name in NEEDED if name not in names]
    if missing:
        rule = f"It has the columns of runs.csv, {', '.join(missing)} among them."
        raise DocumentError("runs", str(path), rule, "Give the file its first line.")
    return rows


def _row(names: list[str], cells: list[str]) -> dict[str, str]:
    row = {name: cell for name, cell in zip(names, cells, strict=False) if name}
    surplus = [cell for cell in cells[len(names) :] if cell.strip()]
    return {**row, SURPLUS: " ".join(surplus)} if surplus else row


def load_models(path: Path) -> dict[str, Any]:
    """Return the models of a JSON file by name. Raises ``DocumentError`` where it is none."""
    text = _read(path, "models")
    try:
        found: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        rule = f"It is JSON ({getattr(error, 'msg', 'numbers or levels without end')})."
        raise DocumentError("models", str(path), rule, "Give models.json.") from None
    entries = cast("dict[str, Any]", found) if isinstance(found, dict) else {}
    if not entries or not all(isinstance(v, dict) for v in entries.values()):
        rule = "It is an object that holds one object for every model."
        raise DocumentError("models", str(path), rule, "Give models.json.")
    return entries


def _read(path: Path, field: str) -> str:
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8-sig")
    except (OSError, EOFError, zlib.error) as error:
        why = getattr(error, "strerror", None) or error
        rule, remedy = f"It cannot be read: {why}.", "Give the path of a file."
        raise DocumentError(field, str(path), rule, remedy) from None
    except UnicodeDecodeError:
        rule, remedy = "It is no text in UTF-8.", "Save it as UTF-8."
        raise DocumentError(field, str(path), rule, remedy) from None


def shipped(name: str) -> Path:
    """Return the path of a calibration file that the package ships (``runs.csv.gz`` and others)."""
    return Path(str(files("meshwright.fit") / "data" / name))
