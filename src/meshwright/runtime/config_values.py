"""Numbers of a Hugging Face config that move no cost, so that only the runtime reads them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from meshwright.describe.config import Config
from meshwright.errors import ModelError


def number(values: Mapping[str, Any], key: str, default: float, *, above: bool = False) -> float:
    """Return a finite number of 0 or more, or ``above`` 0; null counts as left out.

    Raises ``ModelError`` for anything else.
    """
    value = values.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float):
        near = "1.0" if above else f"{default}"
        raise ModelError(f"config.{key}", value, "It is a number.", f"Use {near}.")
    if not math.isfinite(value) or value < 0 or (above and not value):
        rule = f"It is a finite number {'above 0' if above else 'of 0 or more'}."
        raise ModelError(f"config.{key}", value, rule, f"Use {default or 1.0}.")
    return float(value)


def whole(values: Mapping[str, Any], key: str, default: int) -> int:
    """Return a whole number of 1 or more. Raises ``ModelError`` for anything else."""
    return Config(values).size(key, default)


def mapping(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Return the object under a key, empty if left out. Raises ``ModelError`` for another kind."""
    return Config(values).nested(key).values if values.get(key) is not None else {}


def items(values: Mapping[str, Any], key: str) -> list[Any] | None:
    """Return the list under a key, if any. Raises ``ModelError`` for another kind."""
    return Config(values).items(key)


def word(values: Mapping[str, Any], key: str, default: str) -> str:
    """Return a text. Raises ``ModelError`` for another kind."""
    return Config(values).text(key, default)


def flag(values: Mapping[str, Any], key: str, default: bool) -> bool:
    """Return a truth value. Raises ``ModelError`` for anything else, such as the text "false"."""
    return Config(values).flag(key, default)
