"""Text with units and plain numbers: the only parser and the only formatter.

Numbers inside the package are SI base units (bytes, seconds, FLOPs), and the suffix of a name says
which: ``hbm_bytes``, ``latency_s``, ``peak_flops_per_s``. Prefixes are decimal (1 GB = 1e9 bytes)
unless the binary form is written (1 GiB = 2^30 bytes); printed memory is binary, rates are decimal.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from decimal import Decimal
from typing import Final

from meshwright.errors import MeshwrightError

_DECIMAL: Final = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "p": 1e15, "e": 1e18}
_SECONDS: Final = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0}
_COUNTS: Final = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}
_NUMBER: Final = re.compile(
    r"\s*([+-]?(?:\d+(?:[_,]\d{3})*(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d{1,3})?)(\D.*)?"
)
_MICRO: Final = str.maketrans({"\u00b5": "u", "\u03bc": "u"})

EXAMPLES: Final = {
    "bytes": "80 GB, 80 GiB or 512 MB",
    "bytes_per_s": "450 GB/s, 400 Gbit/s or 3.35 TB/s",
    "s": "5 us, 1.2 ms or 3 s",
    "flops": "1e21 or 312 TFLOP",
    "flops_per_s": "989 TFLOP/s or 2.25 PFLOP/s",
    "tokens": "8192, 8k or 4M",
    "params": "7B or 405e9",
    "w": "700 W or 1.2 kW",
}
"""Every unit that can be parsed, by the suffix that names carry, with text that it accepts."""


def unit_of(name: str) -> str | None:
    """Return the unit that the suffix of ``name`` states (``hbm_bytes`` -> ``bytes``), or None.

    ``_per_gpu`` is no unit and left out; a rate of something without a unit has none.
    """
    name = name.removesuffix("_per_gpu")
    known = (u for u in _FORMATTERS if name == u or name.endswith(f"_{u}"))
    unit = max(known, key=len, default=None)
    return None if unit == "s" and name.endswith("_per_s") else unit


def parse(value: object, unit: str, field: str = "value") -> float:
    """Return ``value`` in the SI base unit that the suffix ``unit`` names.

    ``value`` is a number, which is in the base unit already, or text such as ``"450 GB/s"``.
    Raises ``MeshwrightError`` on ``field`` when the text is not a finite number >= 0 in that unit.
    """
    if unit not in EXAMPLES:
        raise ValueError(f"no such unit: {unit}")
    number, suffix = _split(value, unit, field)
    factor = _FACTORS[unit](suffix) if suffix else 1.0
    if factor is None:
        rule = f"The unit {suffix!r} is not one of {_words(unit)}."
        if unit == "bytes_per_s" and suffix == suffix.lower():
            rule += " A small b is a bit and a large B a byte."
        raise MeshwrightError(field, value, rule, f"Write it as {EXAMPLES[unit]}.")
    result = float(number * Decimal(repr(factor)))
    if not 0 <= result < math.inf:
        rule = f"It must be a finite number of {_words(unit)}, not below zero."
        raise MeshwrightError(field, value, rule, f"Write it as {EXAMPLES[unit]}.")
    return result


def _split(value: object, unit: str, field: str) -> tuple[Decimal, str]:
    """Return number and unit text of ``value``; decimal, so that 5 us is 5e-6 to the last bit."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return Decimal(value), ""
    match = _NUMBER.fullmatch(value[:400]) if isinstance(value, str) else None
    if match is None:
        rule = f"It must be a number of {_words(unit)}."
        raise MeshwrightError(field, value, rule, f"Write it as {EXAMPLES[unit]}.")
    digits = match[1].replace("_", "").replace(",", "")
    return Decimal(digits), (match[2] or "").strip().translate(_MICRO)


def _words(unit: str) -> str:
    """Return ``unit`` as a person would say it."""
    return {"s": "seconds", "w": "watts", "flops": "FLOPs", "flops_per_s": "FLOP/s"}.get(
        unit, unit.replace("_per_s", " per second")
    )


def _prefix(letters: str) -> float | None:
    """Return the factor of ``k``, ``M``, ``Gi`` and so on."""
    letters = letters.lower()
    if letters.endswith("i") and letters[:-1] in "kmgtpe" and len(letters) == 2:
        return 2.0 ** (10 * ("kmgtpe".index(letters[0]) + 1))
    return _DECIMAL.get(letters)


def _bytes_factor(text: str) -> float | None:
    match = re.fullmatch(r"([kmgtpe]?i?)(?:b|bytes?)?", text.replace(" ", ""), re.IGNORECASE)
    return _prefix(match[1]) if match else None


def _bytes_per_s_factor(text: str) -> float | None:
    match = re.fullmatch(
        r"([kKmMgGtTpP]?i?)(?:(B|bytes?|Bytes?)|(b|bits?|Bits?))(?:/s|/sec|ps)",
        text.replace(" ", ""),
    )
    if match is None or (text == text.lower() and match[3] == "b" and "/" in text):
        return None
    prefix = _prefix(match[1])
    return None if prefix is None else prefix / (8 if match[3] else 1)


def _flops_factor(text: str) -> float | None:
    match = re.fullmatch(r"([kmgtpe]?)(?:flops?)?", text, re.IGNORECASE)
    return _DECIMAL.get(match[1].lower()) if match else None


def _flops_per_s_factor(text: str) -> float | None:
    match = re.fullmatch(r"([kmgtpe]?)(?:flops?/s(?:ec)?|flops)", text, re.IGNORECASE)
    return _DECIMAL.get(match[1].lower()) if match else None


def _watts_factor(text: str) -> float | None:
    return {"w": 1.0, "kw": 1e3, "mw": 1e6}.get(text.lower())


def _count_factor(text: str) -> float | None:
    return _COUNTS.get(re.sub(r"\s*(tokens?|params?|parameters?)$", "", text.lower()))


_FACTORS: Final[dict[str, Callable[[str], float | None]]] = {
    "bytes": _bytes_factor,
    "bytes_per_s": _bytes_per_s_factor,
    "s": _SECONDS.get,
    "flops": _flops_factor,
    "flops_per_s": _flops_per_s_factor,
    "tokens": _count_factor,
    "params": _count_factor,
    "w": _watts_factor,
}


def _scaled(value: float, steps: tuple[str, ...], base: float, unit: str) -> str:
    """Return ``value`` with four digits and the largest prefix of ``steps`` that it fills."""
    if not math.isfinite(value):
        return f"{value} {unit}".rstrip()
    size, step = abs(value), 0
    while step < len(steps) - 1 and float(f"{size:.4g}") >= base:
        size, step = size / base, step + 1
    digits = f"{size:.0f}" if size >= 1000 else f"{size:.4g}"
    return f"{'-' if value < 0 else ''}{digits} {steps[step]}{unit}".rstrip()


def format_bytes(value: float) -> str:
    """Return a memory size in binary units: ``79.1 GiB``."""
    return _scaled(value, ("", "Ki", "Mi", "Gi", "Ti", "Pi"), 1024.0, "B")


def format_bytes_per_s(value: float) -> str:
    """Return a rate in decimal units: ``450 GB/s``."""
    return _scaled(value, ("", "k", "M", "G", "T", "P"), 1e3, "B/s")


def format_flops(value: float) -> str:
    """Return a number of floating-point operations: ``1.5 PFLOP``."""
    return _scaled(value, ("", "k", "M", "G", "T", "P", "E"), 1e3, "FLOP")


def format_flops_per_s(value: float) -> str:
    """Return a rate of floating-point operations: ``989.4 TFLOP/s``."""
    return _scaled(value, ("", "k", "M", "G", "T", "P", "E"), 1e3, "FLOP/s")


def format_count(value: float) -> str:
    """Return a number of tokens or parameters, without a space: ``1.2B``."""
    return _scaled(value, ("", "k", "M", "B", "T"), 1e3, "").replace(" ", "")


def format_s(value: float) -> str:
    """Return a duration: ``5 us``, ``1.2 ms``, ``3.4 s``, ``12 min``, ``2 h``."""
    size = abs(value)
    if not math.isfinite(value) or size == 0:
        return f"{value:g} s"
    if size >= 600:
        unit = "min" if float(f"{size / 60:.4g}") < 600 else "h"
        return f"{value / _SECONDS[unit]:.4g} {unit}"
    unit = "ns"
    for larger in ("us", "ms", "s"):
        if float(f"{size / _SECONDS[unit]:.4g}") >= 1000:
            unit = larger
    return f"{value / _SECONDS[unit]:.4g} {unit}"


def format_fraction(value: float) -> str:
    """Return a ratio as a percentage: ``41.3%``."""
    return f"{100 * value:.1f}%"


def format_w(value: float) -> str:
    """Return a power: ``700 W``, ``1.2 kW``."""
    return _scaled(value, ("", "k", "M"), 1e3, "W")


_FORMATTERS: Final[dict[str, Callable[[float], str]]] = {
    "bytes": format_bytes,
    "bytes_per_s": format_bytes_per_s,
    "s": format_s,
    "flops": format_flops,
    "flops_per_s": format_flops_per_s,
    "tokens": format_count,
    "tokens_per_s": lambda value: f"{format_count(value)} tokens/s",
    "params": format_count,
    "w": format_w,
    "fraction": format_fraction,
}


def format_value(name: str, value: float) -> str:
    """Return ``value`` with the unit that the suffix of ``name`` states, plain where it has none.

    ``format_value("compute_s", 0.0012)`` is ``"1.2 ms"``.
    """
    unit = unit_of(name)
    return f"{value:.6g}" if unit is None else _FORMATTERS[unit](value)
