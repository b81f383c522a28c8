"""The measured values of a row: what predictions are compared with and never read."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

TIME = ("step_time_best_s", "step_time_s")
"""Columns of the step time: what is scored, and what stands in for it where that is absent."""

MEMORY = ("peak_memory_bytes",)


def measured(row: Mapping[str, str], columns: tuple[str, ...]) -> float | None:
    """Return the first measured value of ``columns``, None where there is none above zero."""
    for name in columns:
        value = _number(row, name)
        if value is not None and _can_be(value):
            return value
    return None


def unusable(row: Mapping[str, str], columns: tuple[str, ...]) -> str:
    """Return why a row's measured value counts for nothing; empty where it counts or is absent."""
    for name in columns:
        text = _text(row, name)
        value = _number(row, name)
        if text and (value is None or not _can_be(value)):
            return f"{name} = {text[:40]!r} is no finite number above zero"
    return ""


def _can_be(value: float) -> bool:
    return 0.0 < value < math.inf


def _text(row: Mapping[str, str], name: str) -> str:
    return str(row.get(name) or "").strip()


def _number(row: Mapping[str, str], name: str) -> float | None:
    text = _text(row, name)
    grouped = re.fullmatch(r"\d{1,3}(,\d{3})+(\.\d*)?", text)
    try:
        return float(text.replace(",", "") if grouped else text)
    except ValueError:
        return None
