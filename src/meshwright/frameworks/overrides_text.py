"""Values as Hydra and OmegaConf read them on a command line."""

from __future__ import annotations

from typing import Any


def text_of(value: Any) -> str:
    """Return a value as an override writes it: true, null, [a,b], plain text."""
    if isinstance(value, str):
        return value
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(text_of, value)) + "]"  # pyright: ignore[reportUnknownArgumentType]
    return str(value)
