"""The settings of a measured run: cells of its row and the words of ``other_settings``.

``other_settings`` is JSON, nested or flat (``model.*``, ``ddp.*``, ``optimizer.*``, ``args.*``);
what stands under ``cli_overrides`` wins. Only settings are read: measured values and notes that the
object also holds are dropped here, so that no prediction can see them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from meshwright.errors import DocumentError

SECTIONS = (
    "cli_overrides",
    "comm_overlap",
    "mixed_precision",
    "ddp",
    "optimizer",
    "model",
    "peft",
    "env_vars",
    "args",
)
"""Where a word is looked for first to last, before the top level."""

MEASURED = re.compile(
    r"mfu|hfu|tflops|peak_|_gib|_gb$|_pct|predicted|published|earlier_publication|_ms$|_s$"
    r"|nearest_recipe|mem_allocated|memory_|activation_memory|case$|step_time|tokens_per_s"
)
"""Words of measured values and of notes about how a row was found."""

Setting = bool | int | float | str | list[Any] | None


@dataclass
class Settings:
    """Cells and further settings of one row; ``assumed`` collects what had to be supplied."""

    cells: Mapping[str, str]
    words: Mapping[str, Setting]
    assumed: list[str] = field(default_factory=list[str])

    def cell(self, name: str) -> str:
        """Return the text of a cell, empty where the row does not state it."""
        return (self.cells.get(name) or "").strip()

    def number(self, name: str) -> int | None:
        """Return the whole number in a cell, or None where it is empty or no number."""
        text = self.cell(name)
        if re.fullmatch(r"[+-]?\d+(\.0+)?", text):
            return int(float(text))
        if text:
            self.assumed.append(f"{name} = {text!r} is not a number and is read as not stated")
        return None

    def find(self, *names: str) -> Setting:
        """Return the first of ``names`` that is set, in the order of ``SECTIONS``; else None."""
        for name in names:
            for section in SECTIONS:
                for key in (f"{section}.{name}", *self._deeper(section, name)):
                    if self.words.get(key) is not None:
                        return self.words[key]
            if self.words.get(name) is not None:
                return self.words[name]
        return None

    def _deeper(self, section: str, name: str) -> Iterator[str]:
        if section == "cli_overrides":
            return (f"{section}.{inner}.{name}" for inner in SECTIONS[1:])
        return iter(())

    def flag(self, *names: str, default: bool) -> bool:
        """Return a switch; words other than true and false count as set."""
        value = self.find(*names)
        if value is None:
            return default
        if isinstance(value, str):
            return value.strip().lower() not in ("false", "0", "no", "none", "off", "")
        return bool(value)

    def text(self, *names: str, default: str = "") -> str:
        """Return a word in lower case."""
        value = self.find(*names)
        return default if value is None else str(value).strip().lower()

    def whole(self, *names: str, default: int = 0) -> int:
        """Return a whole number, ``default`` where none is set."""
        value = self.find(*names)
        try:
            return default if value is None or isinstance(value, list) else int(float(value))
        except (ValueError, OverflowError):
            self.assumed.append(f"{names[0]} = {value!r} is not a number and is not used")
            return default

    def items(self, *names: str) -> list[str]:
        """Return a list of words: a JSON list, or text such as ``[a b]`` or ``a+b``."""
        value = self.find(*names)
        if isinstance(value, list):
            return [str(v).lower() for v in value]
        return re.findall(r"[a-z0-9_]+", str(value).lower()) if value is not None else []

    def section(self, name: str) -> bool:
        """Return whether any setting of a section is given."""
        return any(key.startswith(f"{name}.") for key in self.words)


def read_settings(row: Mapping[str, str]) -> Settings:
    """Return the settings of a row. Raises ``DocumentError`` where they are no JSON object."""
    text = (row.get("other_settings") or "").strip()
    try:
        nested: Any = json.loads(text) if text else {}
    except json.JSONDecodeError as error:
        raise DocumentError(
            "other_settings", text[:60], f"It is a JSON object ({error.msg}).", "Write it as JSON."
        ) from None
    if not isinstance(nested, dict):
        raise DocumentError("other_settings", text[:60], "It is a JSON object.", "Write {}.")
    flat = _flat(cast("dict[str, Any]", nested), "")
    words = {k: v for k, v in flat if not MEASURED.search(k)}
    return Settings(cells=row, words=words)


def _flat(nested: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Setting]]:
    for key, value in nested.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _flat(cast("dict[str, Any]", value), f"{path}.")
        else:
            yield path, value
