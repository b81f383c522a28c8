"""Tables priced once: rows that share all that a formula reads share one evaluation.

A million layouts differ in their pipeline, their batch and their sharding, yet hold only a few
thousand distinct slices of a layer. ``distinct`` finds them; a formula runs on them and its result
is spread back with one indexing. This is what lets the physics be rich and the search fast.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meshwright.parallel.layout import Ints, Layouts, take

Floats = NDArray[np.float64]
Index = NDArray[np.intp]

_TABLE_LIMIT = 1 << 23
"""Keys below this are numbered through a table, which is many times faster than sorting them."""


@dataclass(frozen=True)
class Distinct:
    """``rows`` (D of them) hold each combination once; ``inverse`` [N] says where each row went."""

    rows: Layouts
    inverse: Index


def distinct(x: Layouts, columns: Sequence[Ints]) -> Distinct:
    """Return the rows of ``x`` that differ in ``columns`` ([N] each)."""
    first, inverse = distinct_index(columns)
    return Distinct(rows=take(x, first), inverse=inverse)


def distinct_index(columns: Sequence[Ints]) -> tuple[Index, Index]:
    """Return (number of one row of each combination [D], combination of each row [N]).

    Columns are packed into one key in mixed radix; where that would overflow 62 bits, the part
    packed so far is renumbered first.
    """
    key = np.zeros(len(columns[0]), dtype=np.int64)
    span = 1
    for column in columns:
        low, high = int(column.min(initial=2**62)), int(column.max(initial=0))
        radix = high - low + 1
        if radix <= 1:
            continue
        if span * radix >= 2**62:
            key = _renumbered(key, span)[1]
            span = int(key.max(initial=0)) + 1
        key = key * radix + (column - low)
        span *= radix
    return _renumbered(key, span)


def _renumbered(key: Ints, span: int) -> tuple[Index, Index]:
    if span > _TABLE_LIMIT:
        _, first, inverse = np.unique(key, return_index=True, return_inverse=True)
        return first, inverse
    place = np.full(span, -1, dtype=np.intp)
    place[key] = np.arange(len(key))
    values = np.flatnonzero(place >= 0)
    first = place[values]
    place[values] = np.arange(len(values))
    return first, place[key]
