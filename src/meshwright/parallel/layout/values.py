"""Values of users: whole numbers and text, refused by name when they are neither."""

from __future__ import annotations

import operator
from typing import SupportsIndex, cast

from meshwright.errors import LayoutError


def whole_number(field: str, value: object, low: int = 1, high: int = 2**31 - 1) -> int:
    """Return ``value`` as an int. Raises ``LayoutError`` unless it is one, from low to high."""
    try:
        number = operator.index(cast("SupportsIndex", value))
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise LayoutError(field, value, "It is a whole number.", f"Use {low} or more.")
    if not low <= number <= high:
        rule = f"It is a whole number from {low} to {high:,}."
        raise LayoutError(
            field, number, rule, f"Use {low} or more." if number < low else "Use less."
        )
    return number


def written(field: str, value: object) -> str:
    """Return ``value``. Raises ``LayoutError`` unless it is text."""
    if not isinstance(value, str):
        raise LayoutError(field, value, "It is text.", "Write it in quotes.")
    return value
