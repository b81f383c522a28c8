"""What commands print without Rich, so that a check starts at once."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any


def print_json(value: Any) -> None:
    """Print JSON on standard output."""
    print(json.dumps(value, indent=2, default=str))


def signed(value: float, form: Callable[[float], str]) -> str:
    """Return a difference with its sign."""
    return f"{'-' if value < 0 else '+'}{form(abs(value))}"
