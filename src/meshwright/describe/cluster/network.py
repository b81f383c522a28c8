"""A network told in words, and the latency of each kind of link."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from meshwright import units
from meshwright.describe.cluster.fields import Link
from meshwright.describe.gpu import read_hardware

_COUNT: Final = re.compile(r"(?<!\d)(\d{1,6})\s*x\s*(?=\w)", re.I)
_RATE: Final = re.compile(r"(\d+(?:\.\d+)?)\s*([GT])(b(?:ps|it/s|/s|E|it)?|B(?:ps|/s)|)(?!\w)")
_SCOPE: Final = re.compile(
    r"(?:per|/|a|each)\s*(?:(\d{1,6})[- ]?)?(gpu|node|tray|server|host)", re.I
)


def parse_network(text: str, gpus_per_node: int) -> Link | None:
    """Return one GPU's share of a network told in words, or None where no rate is told.

    ``"8x400Gb NDR IB"``, ``"4x800Gb per 4-GPU tray"``, ``"1600Gb RoCE per node"`` and ``"4x
    Omni-Path links per node"`` are links of a node that its GPUs share. A single rate without "per"
    is one card a GPU, unless no card is that fast (above 800 Gbit/s) or it is plain Ethernet.
    Rates are line rates, in bits unless written with a large B; the latency is the kind's.
    """
    plain = re.sub(r"^\s*platform-default:", "", text).strip()
    words = re.findall(r"[a-z]+\d*(?:-[a-z]*\d*)?", plain.lower())
    count, scope = _COUNT.search(plain), _SCOPE.search(plain)
    rate = _rate_bytes_per_s(plain, words) * int(count[1] if count else 1)
    if not rate:
        return None
    kinds = read_hardware("networks")["kinds"].items()
    kind = next((k for k, known in kinds if _first(words, known)), "infiniband")
    if scope is not None:
        own = scope[2].lower() == "gpu" and scope[1] is None
        sharers = 1 if own else int(scope[1] or gpus_per_node)
    else:
        sharers = gpus_per_node if count or rate > 100e9 or kind == "ethernet" else 1
    return Link(rate / max(sharers, 1), latency_s(kind), plain)


def _rate_bytes_per_s(text: str, words: list[str]) -> float:
    """Return the rate of one link, as written or as its generation has it; 0 where none is told."""
    match = _RATE.search(text)
    if match is not None:
        letter = "B" if match[3].startswith("B") else "bit"
        return units.parse(f"{match[1]} {match[2]}{letter}/s", "bytes_per_s", "network")
    rates = read_hardware("networks")["rates"]
    return units.parse(rates.get(_first(words, rates), 0), "bytes_per_s", "network")


def _first(words: Iterable[str], known: Iterable[str]) -> str | None:
    """Return the first of ``known`` with which one of ``words`` begins."""
    return next((k for k in known if any(word.startswith(k) for word in words)), None)


def latency_s(kind: str) -> float:
    """Return the latency of the kind of link that ``kind`` begins with."""
    key = re.sub(r"\s*\d.*", "", kind.lower()).replace(" ", "-").removesuffix("-c2c")
    return units.parse(read_hardware("networks")["latency_s"][key], "s", f"latency_s.{key}")
