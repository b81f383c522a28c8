"""What a search may choose from, and how people write it: ``tp=8 pp=2..8 recompute=none,full``."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from meshwright.describe.cluster import MAX_GPUS
from meshwright.errors import LayoutError, did_you_mean
from meshwright.parallel.layout import CHOICES, CpComm, Pipeline, Zero, recompute_from_text


@dataclass(frozen=True, kw_only=True)
class Space:
    """What the search may choose from; ``allowed[key]`` limits a key to some values.

    Keys are those of the layout text. Without limits everything sensible is tried.
    """

    allowed: Mapping[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])

    def choices(self, key: str, sensible: Sequence[int], of: int = 0) -> list[int]:
        """Return the values of ``key`` to try: what the user allows, else what is sensible.

        Only divisors of ``of``, if it is given.
        """
        return [v for v in self.allowed.get(key, tuple(sensible)) if not of or of % v == 0]


def read_space(texts: Sequence[str]) -> Space:
    """Read limits such as ``tp=8``, ``pp=2..8`` or ``ep=8,16`` (several may share a text).

    Raises ``LayoutError`` naming the key and the forms that are understood.
    """
    allowed: dict[str, tuple[int, ...]] = {}
    for item in itertools.chain.from_iterable(text.split() for text in texts):
        key, sign, value = item.partition("=")
        if not sign or not value:
            raise LayoutError("fix", item, "A limit is key=value.", "Write tp=8 or pp=2..8.")
        if key in allowed:
            rule, remedy = "It is limited twice.", f"Write all values at once, as in {key}=2,4."
            raise LayoutError(f"fix.{key}", value, rule, remedy)
        allowed[key] = _read_values(key, value)
    return Space(allowed=allowed)


_NAMED: dict[str, type[Zero] | type[CpComm] | type[Pipeline]] = {
    "zero": Zero,
    "cp_comm": CpComm,
    "schedule": Pipeline,
}
_NUMBERS = ("tp", "cp", "dp", "pp", "vpp", "ep", "etp", "mbs", "dp_replicate")
LIMITED = (*_NUMBERS, *_NAMED, "sp", "recompute")
"""The keys of a layout that a search may be limited to values of."""


def _read_values(key: str, value: str) -> tuple[int, ...]:
    if key == "recompute":
        return tuple(_recompute_flags(v) for v in value.split(","))
    if key == "sp":
        return tuple(int(_boolean(v)) for v in value.split(","))
    if key in _NAMED:
        return tuple(_named(key, v) for v in value.split(","))
    if key not in _NUMBERS:
        raise LayoutError("fix", key, "This key cannot be limited.", did_you_mean(key, LIMITED))
    low, dots, high = value.partition("..")
    try:
        ends = [int(v) for v in ((low, high) if dots else value.split(","))]
    except ValueError:
        ends = []
    if not ends or min(ends) < 1 or max(ends) > MAX_GPUS or (dots and ends[0] > ends[1]):
        raise LayoutError(
            f"fix.{key}",
            value,
            f"A limit is whole numbers from 1 to {MAX_GPUS:,}.",
            f"Write {key}=2..8 or {key}=2,4.",
        )
    return tuple(range(ends[0], ends[1] + 1)) if dots else tuple(ends)


def _recompute_flags(text: str) -> int:
    flags, num_layers = recompute_from_text(text)
    if num_layers:
        raise LayoutError(
            "fix.recompute",
            text,
            "The search recomputes whole stages: none, modules, or full.",
            "Write recompute=full, and price numbers of layers with estimate.",
        )
    return int(flags)


def _boolean(text: str) -> bool:
    if text not in ("true", "false"):
        raise LayoutError("fix.sp", text, "It is true or false.", "Write sp=true.")
    return text == "true"


def _named(key: str, text: str) -> int:
    if text not in CHOICES[key]:
        raise LayoutError(f"fix.{key}", text, "Unknown choice.", did_you_mean(text, CHOICES[key]))
    return int(CHOICES[key][text])
